// What a test may ask about the launches so far, and about sizes that no test can allocate.
#include "../../csrc/cuda/tile.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int on_host_device() { return on_host::device; }
EXPORT int on_host_launched_on() { return on_host::launched_on; }
EXPORT int on_host_last_error() { return on_host::last_error; }
EXPORT void* on_host_ran(size_t i) { return i < on_host::ran.size() ? *std::next(on_host::ran.begin(), i) : nullptr; }

// (sample, channel, size, first element in planes, first element channels_last) of a unit.
EXPORT void on_host_locate(int64_t batch, int64_t channels, int64_t pixels, bool plane_major, int64_t i, int64_t* at) {
  atlas::cuda::Walk walk = {channels, pixels, plane_major, true};
  walk.begin<atlas::cuda::Singles<float>>(batch);
  const atlas::cuda::Place p = atlas::cuda::Singles<float>::locate(walk, i);
  at[0] = p.sample, at[1] = p.channel, at[2] = p.size, at[3] = p.in_planes, at[4] = p.channels_last;
}
