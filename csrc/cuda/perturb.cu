#include "../core/perturb.h"

#include "../core/philox.h"
#include "launch.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 128;
// Blocks at once on a processor, of the kernels for the usual case: registers to load all first.
constexpr int kBlocks = 10, kMomentumBlocks = 12;

template <class T> struct Job {
  Pass p;
  Scalar<T> eps, step_size, momentum, radius, clip_min, clip_max;
  Walk walk;
  struct { AtlasImages to; bool of_x; } copy[3];  // results beside the neighbours
  int64_t numel;
  int copies;
  bool rows_differ;  // in parameters or activity
};

// The direction is all that matters of a gradient: taken before fp64 is narrowed, so that a tiny one keeps it.
struct Direction {
  static __device__ __forceinline__ float from(double v) { return sign<float>(v); }
};

// What a kernel has to do: looked up in the job, or known when it is compiled, for the usual case. of_rows: by numbers
// that differ between samples or channels.
template <bool Noise> struct Asked {
  static constexpr bool known = false, noise = Noise;
  static constexpr int blocks = 0;
  template <class T> static __device__ __forceinline__ bool step(const Job<T>& job) { return job.p.grad.data; }
  template <class T> static __device__ __forceinline__ bool momentum(const Job<T>& job) { return job.p.old.data; }
  template <class T> static __device__ __forceinline__ bool ball(const Job<T>& job) { return job.p.x.data; }
  template <class T> static __device__ __forceinline__ bool labels(const Job<T>& job) { return Noise && job.p.labels; }
  template <class T> static __device__ __forceinline__ bool project(const Job<T>& job) { return job.p.project; }
  template <class T> static __device__ __forceinline__ bool of_rows(const Job<T>& job) { return job.rows_differ; }
};

template <bool Step, bool Noise, bool Project, bool Labels = false, bool Momentum = false> struct Known {
  static constexpr bool known = true, noise = Noise;
  static constexpr int blocks = Momentum ? kMomentumBlocks : kBlocks;
  template <class T> static __device__ __forceinline__ constexpr bool step(const Job<T>&) { return Step; }
  template <class T> static __device__ __forceinline__ constexpr bool momentum(const Job<T>&) { return Momentum; }
  template <class T> static __device__ __forceinline__ constexpr bool ball(const Job<T>&) {
    return Step || Project || Labels;
  }
  template <class T> static __device__ __forceinline__ constexpr bool labels(const Job<T>&) { return Labels; }
  template <class T> static __device__ __forceinline__ constexpr bool project(const Job<T>&) { return Project; }
  // APGD's step sizes are those of the samples.
  template <class T> static __device__ __forceinline__ constexpr bool of_rows(const Job<T>&) { return Momentum; }
};

// One unit in the registers of one thread.
template <class Access, class Parts> struct Tile {
  using T = typename Access::T;
  using Unit = typename Access::Unit;
  using Values = typename Access::Values;
  static constexpr int V = Access::kPixels, C = Access::kChannels;

  bool inside;  // else it is another thread's unit, and not written here
  Place at;
  PerturbRow<T> row[C];
  uint8_t active;
  int64_t id, label;
  typename Access::Raw adv, old, grad, x;
  Values v, centre;

  // Issues every load that does not hang on another one.
  __device__ __forceinline__ void read(const Job<T>& job, Unit unit, bool is_inside) {
    const Pass& p = job.p;
    inside = is_inside;
    at = Access::locate(job.walk, inside ? unit : Unit(job.walk.units - 1));
    Access::template fetch<Rounded>(adv, p.adv, job.walk, at);
    Place of_x = at;
    if (Parts::labels(job)) of_x = of_label(job);
    if (Parts::ball(job)) Access::template fetch<Rounded>(x, p.x, job.walk, of_x);
    if (Parts::step(job)) Access::template fetch<Direction>(grad, p.grad, job.walk, at);
    if (Parts::momentum(job)) Access::template fetch<Rounded>(old, p.old, job.walk, at);
    for (int c = 0; c < C; ++c)
      row[c] = {job.eps.value, job.step_size.value, job.momentum.value, job.radius.value, job.clip_min.value,
                job.clip_max.value, 0, T(0)};
    active = 1;
    id = 0;
    if (Parts::noise && p.ids) id = p.ids[at.sample];
    if (!Parts::of_rows(job)) return;
    for (int c = 0; c < C; ++c)
      row[c] = {job.eps.at(at.sample), job.step_size.at(at.sample), job.momentum.at(at.sample),
                job.radius.at(at.sample), job.clip_min.at(at.channel + c), job.clip_max.at(at.channel + c), 0, T(0)};
    if (p.active) active = p.active[at.sample];
  }

  // Where the noise of the sample's label lies.
  __device__ __forceinline__ Place of_label(const Job<T>& job) {
    label = job.p.labels[at.sample];
    Place there = at;
    there.sample = is_class(label, job.p.classes) ? label : 0;
    const int64_t away = (there.sample - at.sample) * (job.walk.channels * job.walk.pixels);
    there.in_planes += away;
    there.channels_last += away;
    return there;
  }

  // Makes the step, and writes what comes before the neighbours.
  __device__ __forceinline__ void move(const Job<T>& job) {
    const Pass& p = job.p;
    Values out;
    for (int c = 0; c < C; ++c)
      for (int j = 0; j < V; ++j) centre[c][j] = 0;
    Access::decode(v, adv, p.adv);
    if (Parts::ball(job)) Access::decode(centre, x, p.x);
    if (Parts::step(job)) {
      Access::decode(out, grad, p.grad);
      Values before;
      if (Parts::momentum(job)) Access::decode(before, old, p.old);
      step(out, before, Parts::momentum(job), p.descend, Parts::of_rows(job));
    }
    if constexpr (Parts::known) {
      if (Parts::step(job) && p.out_x.data) write(job, p.out_x, 0, centre);
      if (Parts::step(job)) write(job, p.out_adv, 0, v);
    } else {
      for (int i = 0; i < job.copies; ++i) {
        for (int c = 0; c < C; ++c)
          for (int j = 0; j < V; ++j) out[c][j] = job.copy[i].of_x ? centre[c][j] : v[c][j];
        write(job, job.copy[i].to, 0, out);
      }
    }
  }

  __device__ __forceinline__ void step(const Values& grad, const Values& before, bool momentum, bool descend,
                                       bool may_rest) {
    for (int c = 0; c < C; ++c) {
      PerturbRow<T> r = row[c];
      if (descend) r.step = -r.step;
      for (int j = 0; j < V; ++j) {
        const T direction = sign<T>(grad[c][j]);
        const T moved = momentum ? apgd_step(v[c][j], before[c][j], direction, centre[c][j], r)
                                 : pgd_step(v[c][j], direction, centre[c][j], r);
        v[c][j] = !may_rest || active ? moved : v[c][j];
      }
    }
  }

  __device__ __forceinline__ void neighbour(const Job<T>& job, int64_t seed, int64_t base, uint32_t k) const {
    const Pass& p = job.p;
    const NoiseCounter counter(seed, p.ids ? id : wrapping_sum(base, at.sample), p.draw, p.stream, k);
    Values z;
    for (int c = 0; c < C; ++c) {
      const Words4 words = counter.group(at.group + uint32_t(c * job.walk.groups));
      if (Parts::labels(job)) {
        for (int j = 0; j < 4; ++j) z[c][j] = label_start(v[c][j], words.w[j], centre[c][j], row[c]);
      } else if (Parts::project(job)) {
        for (int j = 0; j < 4; ++j)
          z[c][j] = atlas::neighbour<true>(v[c][j], uniform<T>(words.w[j]), centre[c][j], row[c]);
      } else {
        for (int j = 0; j < 4; ++j) z[c][j] = atlas::neighbour<false>(v[c][j], uniform<T>(words.w[j]), T(0), row[c]);
      }
    }
    write(job, p.out_z, k * job.numel, z);
  }

  __device__ __forceinline__ void write(const Job<T>& job, const AtlasImages& to, int64_t offset,
                                        const Values& values) const {
    if (inside) Access::store(to, offset, values, job.walk, at);
  }
};

// Plain stores, no cache hints: the network reads next what is written here, and at the usual sizes finds it in L2. At
// large sizes hints gain nothing, nor do other block sizes or a cheaper generator: on an H200 the memory is the limit.
template <class Access, int Tiles, class Parts>
__global__ void __launch_bounds__(kThreads, Parts::blocks)
    perturb_kernel(const __grid_constant__ Job<typename Access::T> job) {
  using Unit = typename Access::Unit;
  const Unit unit = Unit(blockIdx.x) * (kThreads * Tiles) + threadIdx.x, units = Unit(job.walk.units);
  if (unit >= units) return;
  Tile<Access, Parts> tiles[Tiles];
#pragma unroll
  for (int i = 0; i < Tiles; ++i) tiles[i].read(job, unit + i * kThreads, i == 0 || unit + i * kThreads < units);
  // Out here the compiler sees that the key is the same for all threads, and schedules its rounds once a warp.
  int64_t seed = 0, base = 0;
  if (Parts::noise && (Parts::known || job.p.key)) seed = job.p.key[0], base = job.p.key[1];
  if (Parts::labels(job)) {
    const LabelNoise drawn(job.p, seed);
#pragma unroll
    for (int i = 0; i < Tiles; ++i)
      for (int c = 0; c < Access::kChannels; ++c) drawn.put(tiles[i].row[c], tiles[i].label, job.p.classes);
  }
#pragma unroll
  for (int i = 0; i < Tiles; ++i) tiles[i].move(job);
  if constexpr (Parts::noise) {
    const uint32_t count = uint32_t(job.p.count);
    uint32_t k = 0;
    if (!Parts::known && count == 0) return;
    do {
#pragma unroll
      for (int i = 0; i < Tiles; ++i) tiles[i].neighbour(job, seed, base, k);
    } while (++k < count);
  }
}

template <class Access, int Tiles, class Parts> int walk(Job<typename Access::T>& job, const AtlasWhere& where) {
  job.walk.template begin<Access>(job.numel / (job.walk.channels * job.walk.pixels));
  return launch(where, job.walk.units, Tiles, kThreads, perturb_kernel<Access, Tiles, Parts>, job);
}

template <class T> int run(const Pass& p, const AtlasWhere& where) {
  Job<T> job = {p, scalar<T>(p.eps), scalar<T>(p.step_size), scalar<T>(p.momentum), scalar<T>(p.radius),
                scalar<T>(p.clip_min), scalar<T>(p.clip_max), {}, {}, p.batch * p.channels * p.pixels, 0, false};
  if (job.numel == 0) return ATLAS_OK;
  Pass& q = job.p;
  AtlasImages* const images[] = {&q.adv, &q.old, &q.grad, &q.x, &q.out_x, &q.out_adv, &q.cast, &q.out_z};
  bool in_planes = true, channels_last = true, single = p.grad.data || p.count;
  for (const AtlasImages* i : images) {
    single = single && (!i->data || i->dtype == kFloat32);
    in_planes = in_planes && !(i->data && i->channels_last);
    channels_last = channels_last && !(i->data && !i->channels_last);
  }
  const bool per_sample =
      p.active || p.eps.per_row || p.step_size.per_row || p.momentum.per_row || p.radius.per_row;
  const bool per_channel = p.clip_min.per_row || p.clip_max.per_row;
  job.rows_differ = per_sample || per_channel;
  const bool flat = (in_planes || channels_last) && !p.count && !per_channel;
  if (flat) {  // a pixel's place means nothing: run through memory as it lies
    for (AtlasImages* i : images) i->channels_last = 0;
    job.walk = {1, per_sample ? p.channels * p.pixels : job.numel, true, false};
  } else {
    job.walk = {p.channels, p.pixels, in_planes, per_channel};
  }
  if (q.out_x.data) job.copy[job.copies++] = {q.out_x, true};
  if (q.out_adv.data) job.copy[job.copies++] = {q.out_adv, false};
  if (q.cast.data) job.copy[job.copies++] = {q.cast, false};

  if constexpr (sizeof(T) == 4) {
    const auto vectors = [&](int64_t elements) {
      bool whole = job.walk.pixels % elements == 0;
      for (const AtlasImages* i : images) whole = whole && (!i->data || is_vector(*i, elements));
      return whole;
    };
    // The usual case. Two tiles a thread, to have more under way; one where four tensors are.
    using Plain = Vectors<4, 1, true>;
    const bool usual = vectors(4) && single && !q.cast.data && job.numel >> 33 == 0;
    if (flat && usual && p.old.data) return walk<Plain, 1, Known<true, false, false, false, true>>(job, where);
    if ((flat || in_planes) && usual && !job.rows_differ && !p.old.data) {
      if (!p.count) return walk<Plain, 2, Known<true, false, false>>(job, where);
      if (!p.grad.data)
        return p.labels    ? walk<Plain, 2, Known<false, true, false, true>>(job, where)
               : p.project ? walk<Plain, 2, Known<false, true, true>>(job, where)
                           : walk<Plain, 2, Known<false, true, false>>(job, where);
      return p.project ? walk<Plain, 2, Known<true, true, true>>(job, where)
                       : walk<Plain, 2, Known<true, true, false>>(job, where);
    }
    if (flat && vectors(8)) return walk<Vectors<8, 1>, 1, Asked<false>>(job, where);
    if (flat && vectors(4)) return walk<Vectors<4, 1>, 2, Asked<false>>(job, where);
    if (in_planes && vectors(4)) return walk<Vectors<4, 1>, 1, Asked<true>>(job, where);
    if (p.channels == 3 && vectors(4)) return walk<Vectors<4, 3>, 1, Asked<true>>(job, where);
  }
  return walk<Singles<T>, 1, Asked<true>>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_perturb(const AtlasPerturb* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  const atlas::Pass pass = atlas::pass_of(*params);
  return pass.adv.dtype == atlas::kFloat64 ? atlas::cuda::run<double>(pass, *where)
                                           : atlas::cuda::run<float>(pass, *where);
}
