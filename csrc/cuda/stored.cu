#include "../core/stored.h"

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 128;

template <class T> struct Job {
  AtlasStored p;
  Scalar<T> eps, step_size, clip_min, clip_max;
  Walk walk;
};

// The sum of |grad| over the block's share of it, whose vectors all threads take in turn.
template <class S, class T, int V>
__global__ void __launch_bounds__(kThreads) stored_norm_kernel(const __grid_constant__ AtlasStored p, int64_t vectors) {
  const int64_t block = blockIdx.x, last = vectors * (block + 1) / p.blocks;
  double sum = 0;
#pragma unroll 4
  for (int64_t vector = vectors * block / p.blocks + threadIdx.x; vector < last; vector += kThreads) {
    const S* from = static_cast<const S*>(p.grad.data) + vector * V;
    if constexpr (V == 1) {
      sum += fabs(double(convert<T>(*from)));
    } else {
      uint32_t words[V * sizeof(S) / 4];
      load_words<V * sizeof(S)>(words, from);
      for (int i = 0; i < V; ++i) sum += fabs(double(convert<T>(get<S>(words, i))));
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) p.partial[block] = sum;
}

// The same place of another row of as many pixels.
__device__ __forceinline__ Place moved_to(Place at, const Walk& walk, int64_t row) {
  const int64_t by = (row - at.sample) * walk.channels * walk.pixels;
  at.in_planes += by;
  at.channels_last += by;
  return at;
}

template <class Access, bool Step>
__global__ void __launch_bounds__(kThreads) stored_kernel(const __grid_constant__ Job<typename Access::T> job) {
  using T = typename Access::T;
  const AtlasStored& p = job.p;
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = unit < job.walk.units;
  const Place at = Access::locate(job.walk, inside ? unit : job.walk.units - 1);
  const int64_t number = p.index[at.sample];
  const bool there = is_row(p, number);
  const Place kept = moved_to(at, job.walk, there ? number : 0);
  typename Access::Raw raw_x, raw_grad, raw_d = {}, raw_m = {};
  Access::template fetch<Rounded>(raw_x, p.x, job.walk, at);
  if constexpr (Step) Access::template fetch<Rounded>(raw_grad, p.grad, job.walk, at);
  if (there) {
    Access::template fetch<Rounded>(raw_d, p.stored, job.walk, kept);
    if constexpr (Step) Access::template fetch<Rounded>(raw_m, p.momentum, job.walk, kept);
  }

  T norm = 0;
  if constexpr (Step) {
    double sum = 0;
#pragma unroll 2
    for (int64_t block = threadIdx.x; block < p.blocks; block += kThreads) sum += p.partial[block];
    norm = T(block_sum<kThreads>(sum));
  }
  if (!inside) return;

  typename Access::Values x, g, d, m, out;
  Access::decode(x, raw_x, p.x);
  Access::decode(d, raw_d, p.stored);
  if constexpr (Step) {
    Access::decode(g, raw_grad, p.grad);
    Access::decode(m, raw_m, p.momentum);
  }
  for (int c = 0; c < Access::kChannels; ++c) {
    const StoredRow<T> row = {job.eps.at(at.sample), job.step_size.at(at.sample), job.clip_min.at(at.channel + c),
                              job.clip_max.at(at.channel + c), T(p.decay)};
    for (int j = 0; j < Access::kPixels; ++j) {
      if constexpr (Step) {
        out[c][j] = adversary(x[c][j], d[c][j], g[c][j], row);
        m[c][j] = next_momentum(m[c][j], g[c][j], norm, row);
        d[c][j] = next_perturbation(d[c][j], m[c][j], x[c][j], row);
      } else {
        out[c][j] = to_range(x[c][j] + d[c][j], row);
      }
      out[c][j] = there ? out[c][j] : no_row<T>();
    }
  }
  Access::store(p.out, 0, out, job.walk, at);
  if constexpr (Step) {
    if (!there || !is_usable(norm)) return;
    Access::store(p.stored, 0, d, job.walk, kept);
    Access::store(p.momentum, 0, m, job.walk, kept);
  }
}

template <class Access> int walk(Job<typename Access::T>& job, const AtlasWhere& where) {
  job.walk.template begin<Access>(job.p.batch);
  return job.p.grad.data ? launch(where, job.walk.units, 1, kThreads, stored_kernel<Access, true>, job)
                         : launch(where, job.walk.units, 1, kThreads, stored_kernel<Access, false>, job);
}

template <class S, class T> int sum(const AtlasStored& p, const AtlasWhere& where) {
  constexpr int V = sizeof(S) == 8 ? 1 : 16 / sizeof(S);
  const int64_t numel = p.batch * p.channels * p.pixels;
  const bool whole = numel % V == 0 && reinterpret_cast<uintptr_t>(p.grad.data) % 16 == 0;
  return whole ? launch(where, p.blocks * kThreads, 1, kThreads, stored_norm_kernel<S, T, V>, p, numel / V)
               : launch(where, p.blocks * kThreads, 1, kThreads, stored_norm_kernel<S, T, 1>, p, numel);
}

template <class T> int sum_of(const AtlasStored& p, const AtlasWhere& where) {
  switch (p.grad.dtype) {
    case kFloat32: return sum<float, T>(p, where);
    case kFloat64: return sum<double, T>(p, where);
    case kFloat16: return sum<half_t, T>(p, where);
    default: return sum<bfloat16_t, T>(p, where);
  }
}

template <class T> int run(const AtlasStored& p, const AtlasWhere& where) {
  if (p.batch * p.channels * p.pixels == 0) return ATLAS_OK;
  Job<T> job = {p, scalar<T>(p.eps), scalar<T>(p.step_size), scalar<T>(p.clip_min), scalar<T>(p.clip_max), {}};
  if (p.grad.data)
    if (const int status = sum_of<T>(p, where)) return status;
  AtlasStored& q = job.p;
  AtlasImages* const images[] = {&q.x, &q.grad, &q.stored, &q.momentum, &q.out};
  bool in_planes = true, channels_last = true;
  for (const AtlasImages* i : images) {
    in_planes = in_planes && !(i->data && i->channels_last);
    channels_last = channels_last && !(i->data && !i->channels_last);
  }
  const bool per_channel = p.clip_min.per_row || p.clip_max.per_row, flat = (in_planes || channels_last) && !per_channel;
  if (flat) {  // a pixel's place within its sample means nothing: run through memory as it lies
    for (AtlasImages* i : images) i->channels_last = 0;
    job.walk = {1, p.channels * p.pixels, true, false};
  } else {
    job.walk = {p.channels, p.pixels, in_planes, per_channel};
  }
  if constexpr (sizeof(T) == 4) {
    const auto vectors = [&](int64_t elements) {
      bool whole = job.walk.pixels % elements == 0;
      for (const AtlasImages* i : images) whole = whole && (!i->data || is_vector(*i, elements));
      return whole;
    };
    if ((flat || in_planes) && vectors(4)) return walk<Vectors<4, 1>>(job, where);
    if (p.channels == 3 && !flat && vectors(4)) return walk<Vectors<4, 3>>(job, where);
  }
  return walk<Singles<T>>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_stored(const AtlasStored* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  return params->x.dtype == atlas::kFloat64 ? atlas::cuda::run<double>(*params, *where)
                                            : atlas::cuda::run<float>(*params, *where);
}
