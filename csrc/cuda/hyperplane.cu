#include "../core/hyperplane.h"

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 256;  // a block, which sweeps over one sample

template <class T> struct Job {
  AtlasHyperplane p;
  Scalar<T> clip_min, clip_max;
  Walk walk;
};

template <class Access, Norm kNorm> struct Sample {
  using T = typename Access::T;
  using Values = typename Access::Values;
  static constexpr int V = Access::kPixels, C = Access::kChannels;

  const Job<T>& job;
  int64_t sample;
  PlaneStep<T> step;

  __device__ __forceinline__ void run() {
    while (step.sweep != kMove) {
      if (step.sweep == kMeasure) sweep<kMeasure>();
      else if (step.sweep == kSeek) sweep<kSeek>();
      else sweep<kLengths>();
    }
    Folded none = {};
    for (int64_t unit = threadIdx.x; unit < units(); unit += kThreads) visit<kMove>(unit, none);
  }

  __device__ __forceinline__ int64_t units() const { return job.walk.by_sample.value; }

  template <PlaneSweep kSweep> __device__ __forceinline__ void sweep() {
    constexpr int kUsed = kSweep == kSeek && kNorm != kL1 ? 4 : 2;
    Folded found = {};
    for (int64_t unit = threadIdx.x; unit < units(); unit += kThreads) visit<kSweep>(unit, found);
#pragma unroll
    for (int i = 0; i < kUsed; ++i)
      found.v[i] = kSweep == kLengths && kNorm == kLinf ? block_max<kThreads>(found.v[i]) : block_sum<kThreads>(found.v[i]);
    step.advance(found);
  }

  template <PlaneSweep kSweep> __device__ __forceinline__ void visit(int64_t unit, Folded& found) const {
    const AtlasHyperplane& p = job.p;
    const Place at = Access::locate(job.walk, sample * units() + unit);
    const AtlasImages* const images[] = {&p.adv, &p.grad, &p.x};
    typename Access::Raw raw[3];
    Values values[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i) Access::template fetch<Rounded>(raw[i], *images[i], job.walk, at);
#pragma unroll
    for (int i = 0; i < 3; ++i) Access::decode(values[i], raw[i], *images[i]);
    auto &adv = values[0], &grad = values[1], &x = values[2];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const PixelBounds<T> bounds = {job.clip_min.at(at.channel + c), job.clip_max.at(at.channel + c)};
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (j >= at.size) continue;
        if constexpr (kSweep == kMove) adv[c][j] = step.template moved<kNorm>(adv[c][j], grad[c][j], x[c][j], bounds);
        else add<kSweep>(found, step.template terms<kSweep, kNorm>(adv[c][j], grad[c][j], x[c][j], bounds));
      }
    }
    if constexpr (kSweep == kMove) Access::store(p.out, 0, adv, job.walk, at);
  }

  template <PlaneSweep kSweep> static __device__ __forceinline__ void add(Folded& to, const Folded& t) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to.v[i] = kSweep == kLengths && kNorm == kLinf ? Max::of(to.v[i], t.v[i]) : to.v[i] + t.v[i];
  }
};

template <class Access, Norm kNorm>
__global__ void __launch_bounds__(kThreads, 1) hyperplane_kernel(const __grid_constant__ Job<typename Access::T> job) {
  using T = typename Access::T;
  const double gap = static_cast<const T*>(job.p.gap)[blockIdx.x];
  Sample<Access, kNorm>{job, blockIdx.x, {kNorm, gap, job.p.alpha_max, T(job.p.overshoot)}}.run();
}

template <class Access> int walk(Job<typename Access::T>& job, const AtlasWhere& where) {
  job.walk.template begin<Access>(job.p.batch);
  const int64_t threads = job.p.batch * kThreads;
  if (job.p.norm == kLinf) return launch(where, threads, 1, kThreads, hyperplane_kernel<Access, kLinf>, job);
  if (job.p.norm == kL2) return launch(where, threads, 1, kThreads, hyperplane_kernel<Access, kL2>, job);
  return launch(where, threads, 1, kThreads, hyperplane_kernel<Access, kL1>, job);
}

template <class T> int run(const AtlasHyperplane& p, const AtlasWhere& where) {
  if (p.batch * p.channels * p.pixels == 0) return ATLAS_OK;
  Job<T> job = {p, scalar<T>(p.clip_min), scalar<T>(p.clip_max), {}};
  AtlasHyperplane& q = job.p;
  AtlasImages* const images[] = {&q.adv, &q.grad, &q.x, &q.out};
  bool in_planes = true, channels_last = true;
  for (const AtlasImages* i : images) {
    in_planes = in_planes && !i->channels_last;
    channels_last = channels_last && i->channels_last;
  }
  const bool per_channel = p.clip_min.per_row || p.clip_max.per_row;
  const bool flat = (in_planes || channels_last) && !per_channel;
  if (flat) {  // a pixel's place means nothing
    for (AtlasImages* i : images) i->channels_last = 0;
    job.walk = {1, p.channels * p.pixels, true, false};
  } else {
    job.walk = {p.channels, p.pixels, in_planes, per_channel};
  }
  if constexpr (sizeof(T) == 4) {
    bool vectors = job.walk.pixels % 4 == 0;
    for (const AtlasImages* i : images) vectors = vectors && is_vector(*i, 4);
    if (vectors && (flat || in_planes)) return walk<Vectors<4, 1>>(job, where);
    if (vectors && p.channels == 3) return walk<Vectors<4, 3>>(job, where);
  }
  return walk<Singles<T>>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_hyperplane(const AtlasHyperplane* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  return params->adv.dtype == atlas::kFloat64 ? atlas::cuda::run<double>(*params, *where)
                                              : atlas::cuda::run<float>(*params, *where);
}
