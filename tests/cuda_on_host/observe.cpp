// What a test may ask about the launches so far, and about sizes that no test can allocate.
#include <dlfcn.h>

#include "../../csrc/cuda/tile.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int on_host_device() { return on_host::device; }
EXPORT int on_host_launched_on() { return on_host::launched_on; }
EXPORT int on_host_last_error() { return on_host::last_error; }

// Addresses of the kernels that ran, as `nm` prints them: up to `capacity` are written, their number is returned.
EXPORT size_t on_host_ran(uintptr_t* addresses, size_t capacity) {
  size_t count = 0;
  for (void* kernel : on_host::ran) {
    Dl_info library;
    if (count < capacity && dladdr(kernel, &library))
      addresses[count] = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    ++count;
  }
  return count;
}

// (sample, channel, size, first element in planes, first element channels_last) of a unit.
EXPORT void on_host_locate(int64_t batch, int64_t channels, int64_t pixels, bool plane_major, int64_t unit,
                           int64_t* at) {
  atlas::cuda::Walk walk = {channels, pixels, plane_major, true};
  walk.begin<atlas::cuda::Singles<float>>(batch);
  const atlas::cuda::Place place = atlas::cuda::Singles<float>::locate(walk, unit);
  at[0] = place.sample, at[1] = place.channel, at[2] = place.size, at[3] = place.in_planes, at[4] = place.channels_last;
}
