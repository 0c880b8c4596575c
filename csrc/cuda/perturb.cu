#include "../core/perturb.h"

#include "../core/philox.h"
#include "launch.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 128;

template <class T> struct Job {
  Pass p;
  Scalar<T> eps, step_size, radius, clip_min, clip_max;
  Walk walk;
  struct { AtlasImages to; bool of_x; } copy[3];  // results beside the neighbours
  int64_t numel;
  int copies;
  bool rows_differ;  // in parameters, activity or sample number
};

// The direction is all that matters of a gradient: taken before fp64 is narrowed, so that a tiny one keeps it.
struct Direction {
  static __device__ __forceinline__ float from(double v) { return sign<float>(v); }
};

// One unit in the registers of one thread.
template <class Access> struct Tile {
  using T = typename Access::T;
  using Values = typename Access::Values;
  static constexpr int V = Access::kPixels, C = Access::kChannels;

  Place at;
  PerturbRow<T> row[C];
  uint8_t active;
  int64_t id;
  typename Access::Raw adv, grad, x;

  // Issues every load that does not hang on another one.
  __device__ __forceinline__ void read(const Job<T>& job, int64_t unit) {
    const Pass& p = job.p;
    at = Access::locate(job.walk, unit);
    Access::template fetch<Rounded>(adv, p.adv, job.walk, at);
    if (p.x.data) Access::template fetch<Rounded>(x, p.x, job.walk, at);
    if (p.grad.data) Access::template fetch<Direction>(grad, p.grad, job.walk, at);
    for (int c = 0; c < C; ++c)
      row[c] = {job.eps.value, job.step_size.value, job.radius.value, job.clip_min.value, job.clip_max.value};
    active = 1;
    id = 0;
    if (!job.rows_differ) return;
    for (int c = 0; c < C; ++c)
      row[c] = {job.eps.at(at.sample), job.step_size.at(at.sample), job.radius.at(at.sample),
                job.clip_min.at(at.channel + c), job.clip_max.at(at.channel + c)};
    if (p.active) active = p.active[at.sample];
    if (p.ids) id = p.ids[at.sample];
  }

  template <bool Noise> __device__ __forceinline__ void write(const Job<T>& job, int64_t seed, int64_t base) const {
    const Pass& p = job.p;
    Values v, centre = {}, out;
    Access::decode(v, adv, p.adv);
    if (p.x.data) Access::decode(centre, x, p.x);
    if (p.grad.data) {
      Access::decode(out, grad, p.grad);
      step(v, out, centre, p.descend);
    }
    for (int i = 0; i < job.copies; ++i) {
      for (int c = 0; c < C; ++c)
        for (int j = 0; j < V; ++j) out[c][j] = job.copy[i].of_x ? centre[c][j] : v[c][j];
      Access::store(job.copy[i].to, 0, out, job.walk, at);
    }
    if constexpr (Noise) {
      const uint32_t count = uint32_t(p.count);
      for (uint32_t k = 0; k < count; ++k) {
        const int64_t own = p.ids ? id : wrapping_sum(base, at.sample);
        neighbours(out, NoiseCounter(seed, own, p.draw, p.stream, k), v, centre, job);
        Access::store(p.out_z, k * job.numel, out, job.walk, at);
      }
    }
  }

  __device__ __forceinline__ void step(Values& v, const Values& grad, const Values& centre, bool descend) const {
    for (int c = 0; c < C; ++c) {
      PerturbRow<T> r = row[c];
      if (descend) r.step = -r.step;
      for (int j = 0; j < V; ++j) {
        const T moved = pgd_step(v[c][j], sign<T>(grad[c][j]), centre[c][j], r);
        v[c][j] = active ? moved : v[c][j];
      }
    }
  }

  __device__ __forceinline__ void neighbours(Values& z, const NoiseCounter& counter, const Values& v,
                                             const Values& centre, const Job<T>& job) const {
    for (int c = 0; c < C; ++c) {
      const Words4 words = counter.group(at.group + uint32_t(c * job.walk.groups));
      if (job.p.project) {
        for (int j = 0; j < 4; ++j) z[c][j] = neighbour<true>(v[c][j], uniform<T>(words.w[j]), centre[c][j], row[c]);
      } else {
        for (int j = 0; j < 4; ++j) z[c][j] = neighbour<false>(v[c][j], uniform<T>(words.w[j]), T(0), row[c]);
      }
    }
  }
};

// Plain stores, no cache hints: the network reads next what is written here, and at the usual sizes finds it in L2.
template <class Access, int Tiles, bool Noise>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ Job<typename Access::T> job) {
  const int64_t unit = int64_t(blockIdx.x) * kThreads * Tiles + threadIdx.x;
  if (unit >= job.walk.units) return;
  Tile<Access> tiles[Tiles];
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
    if (i == 0 || unit + i * kThreads < job.walk.units) tiles[i].read(job, unit + i * kThreads);
  // Out here the compiler sees that the key is the same for all threads, and schedules its rounds once a warp.
  const int64_t* const key = Noise ? job.p.key : nullptr;
  const int64_t seed = key ? key[0] : 0, base = key ? key[1] : 0;
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
    if (i == 0 || unit + i * kThreads < job.walk.units) tiles[i].template write<Noise>(job, seed, base);
}

template <class Access, int Tiles, bool Noise> int walk(Job<typename Access::T>& job, const AtlasWhere& where) {
  job.walk.template begin<Access>(job.numel / (job.walk.channels * job.walk.pixels));
  return launch(where, job.walk.units, Tiles, kThreads, perturb_kernel<Access, Tiles, Noise>, job);
}

template <class T> int run(const Pass& p, const AtlasWhere& where) {
  Job<T> job = {p, scalar<T>(p.eps), scalar<T>(p.step_size), scalar<T>(p.radius), scalar<T>(p.clip_min),
                scalar<T>(p.clip_max), {}, {}, p.batch * p.channels * p.pixels, 0, false};
  if (job.numel == 0) return ATLAS_OK;
  Pass& q = job.p;
  AtlasImages* const images[] = {&q.adv, &q.grad, &q.x, &q.out_x, &q.out_adv, &q.cast, &q.out_z};
  bool in_planes = true, channels_last = true;
  for (const AtlasImages* i : images) {
    in_planes = in_planes && !(i->data && i->channels_last);
    channels_last = channels_last && !(i->data && !i->channels_last);
  }
  const bool per_sample = p.active || p.eps.per_row || p.step_size.per_row || p.radius.per_row;
  const bool per_channel = p.clip_min.per_row || p.clip_max.per_row;
  job.rows_differ = per_sample || per_channel || p.ids;
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
    if (flat && vectors(8)) return walk<Vectors<8, 1>, 1, false>(job, where);
    if (flat && vectors(4)) return walk<Vectors<4, 1>, 2, false>(job, where);  // two tiles, to have more under way
    if (in_planes && vectors(4)) return walk<Vectors<4, 1>, 1, true>(job, where);
    if (p.channels == 3 && vectors(4)) return walk<Vectors<4, 3>, 1, true>(job, where);
  }
  return walk<Singles<T>, 1, true>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_perturb(const AtlasPerturb* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  const atlas::Pass pass = atlas::pass_of(*params);
  return pass.adv.dtype == atlas::kFloat64 ? atlas::cuda::run<double>(pass, *where)
                                           : atlas::cuda::run<float>(pass, *where);
}
