#include "../core/perturb_norms.h"

#include "../core/random.h"
#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

template <class T> struct Job {
  AtlasPerturbNorms p;
  Scalar<T> eps, step_size, momentum, clip_min, clip_max;
  Walk walk;
};

// Apgd: the steps of APGD, which have an image more to hold, in kernels of their own.
template <class Access, bool Apgd> struct Sample {
  using T = typename Access::T;
  using Values = typename Access::Values;
  static constexpr int V = Access::kPixels, C = Access::kChannels, kImages = Apgd ? 4 : 3;
  static constexpr int kThreads = Apgd ? 256 : 512;  // a block, which sweeps over one sample

  const Job<T>& job;
  int64_t sample;
  bool active;
  NormStep<T> step;

  __device__ __forceinline__ NoiseCounter counter(uint32_t number) const {
    const AtlasPerturbNorms& p = job.p;
    return {p.key[0], p.ids ? p.ids[sample] : wrapping_sum(p.key[1], sample), p.draw, p.stream, number};
  }

  __device__ __forceinline__ Sample(const Job<T>& job, int64_t sample) : job(job), sample(sample) {
    const AtlasPerturbNorms& p = job.p;
    const int64_t dimensions = p.channels * p.pixels;
    active = !p.active || p.active[sample];
    step = {step_of(p), kWrite, dimensions, largest_of(p, sample), job.eps.at(sample), job.step_size.at(sample),
            job.momentum.at(sample)};
    if (p.key) {
      step.step = T(double(step.eps) * ball_radius(counter(1).group(0).w[0], dimensions));
      step.eps = T(kInfinite);
    }
    if (p.descend) step.step = -step.step;
    if (active && p.norm != kLinf) step.sweep = p.key || p.grad.data ? kGradient : kDistance;
  }

  __device__ __forceinline__ void run() {
    const int64_t units = job.walk.by_sample.value;
    for (;;) {
      Sums sums = {0.0, 0.0};
      for (int64_t unit = threadIdx.x; unit < units; unit += kThreads) visit(sample * units + unit, sums);
      if (step.sweep == kWrite) return;
      step.advance({block_sum<kThreads>(sums.a), block_sum<kThreads>(sums.b)});
    }
  }

  __device__ __forceinline__ void visit(int64_t unit, Sums& sums) const {
    const AtlasPerturbNorms& p = job.p;
    const Place at = Access::locate(job.walk, unit);
    const AtlasImages* const images[] = {&p.grad, &p.adv, &p.x, &p.old};
    typename Access::Raw raw[kImages];
    Values values[kImages] = {};
    const bool carries = Apgd && active && step.norm == kMomentumL2 && step.sweep >= kCarry;
    const int end = step.sweep == kGradient ? 1 : carries ? 4 : 3;
#pragma unroll
    for (int i = 0; i < kImages; ++i)
      if (i < end && images[i]->data) Access::template fetch<Rounded>(raw[i], *images[i], job.walk, at);
#pragma unroll
    for (int i = 0; i < kImages; ++i)
      if (i < end && images[i]->data) Access::decode(values[i], raw[i], *images[i]);
    auto &grad = values[0], &adv = values[1], &x = values[2], &old = values[kImages - 1];
    if (!Apgd && p.key) draw(grad, at);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const PixelBounds<T> bounds = {job.clip_min.at(at.channel + c), job.clip_max.at(at.channel + c)};
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (j >= at.size) continue;
        if (carries) adv[c][j] = step.carried(adv[c][j], old[c][j], grad[c][j], x[c][j], bounds);
        if (step.sweep == kWrite) {
          adv[c][j] = written(adv[c][j], grad[c][j], x[c][j], bounds);
        } else {
          const Sums t = terms(adv[c][j], grad[c][j], x[c][j], bounds);
          sums = {sums.a + t.a, sums.b + t.b};
        }
      }
    }
    if (step.sweep != kWrite) return;
    Access::store(p.out, 0, adv, job.walk, at);
    if (p.cast.data) Access::store(p.cast, 0, adv, job.walk, at);
  }

  __device__ __forceinline__ void draw(Values& z, const Place& at) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Words4 words = counter(0).group(at.group + uint32_t(c * job.walk.groups));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (step.norm == kL2) {
          normal_pair(words.w[j], words.w[j + 1], z[c][j], z[c][j + 1]);
        } else {
          z[c][j] = laplace<T>(words.w[j]);
          z[c][j + 1] = laplace<T>(words.w[j + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ T written(T adv, T grad, T x, const PixelBounds<T>& bounds) const {
    if (!active) return adv;
    if constexpr (Apgd)
      return step.norm == kSignL1 ? step.template written<kSignL1>(adv, grad, x, bounds)
                                  : step.template brought<kL2>(adv, x, bounds);
    if (step.norm == kLinf) return step.template written<kLinf>(adv, grad, x, bounds);
    return step.norm == kL2 ? step.template written<kL2>(adv, grad, x, bounds)
                            : step.template written<kSparseL1>(adv, grad, x, bounds);
  }

  __device__ __forceinline__ Sums terms(T adv, T grad, T x, const PixelBounds<T>& bounds) const {
    if constexpr (Apgd) {
      if (step.norm == kMomentumL2)
        return step.sweep == kGradient   ? step.template terms<kGradient, kL2>(adv, grad, x, bounds)
               : step.sweep == kDistance ? step.template terms<kDistance, kL2>(adv, grad, x, bounds)
                                         : step.template away<kDistance, kL2>(adv, x, bounds);
      return step.sweep == kGradient   ? step.template terms<kGradient, kSignL1>(adv, grad, x, bounds)
             : step.sweep == kSelect   ? step.template terms<kSelect, kSignL1>(adv, grad, x, bounds)
             : step.sweep == kDistance ? step.template terms<kDistance, kSignL1>(adv, grad, x, bounds)
                                       : step.template terms<kSearch, kSignL1>(adv, grad, x, bounds);
    }
    if (step.norm == kL2)
      return step.sweep == kGradient ? step.template terms<kGradient, kL2>(adv, grad, x, bounds)
                                     : step.template terms<kDistance, kL2>(adv, grad, x, bounds);
    return step.sweep == kGradient   ? step.template terms<kGradient, kSparseL1>(adv, grad, x, bounds)
           : step.sweep == kSelect   ? step.template terms<kSelect, kSparseL1>(adv, grad, x, bounds)
           : step.sweep == kDistance ? step.template terms<kDistance, kSparseL1>(adv, grad, x, bounds)
                                     : step.template terms<kSearch, kSparseL1>(adv, grad, x, bounds);
  }
};

template <class Access, bool Apgd>
__global__ void __launch_bounds__(Sample<Access, Apgd>::kThreads, 1)
    norms_kernel(const __grid_constant__ Job<typename Access::T> job) {
  Sample<Access, Apgd>(job, blockIdx.x).run();
}

template <class Access, bool Apgd = false> int walk(Job<typename Access::T>& job, const AtlasWhere& where) {
  if constexpr (!Apgd)
    if (job.p.old.data) return walk<Access, true>(job, where);
  constexpr int kThreads = Sample<Access, Apgd>::kThreads;
  job.walk.template begin<Access>(job.p.batch);
  return launch(where, job.p.batch * kThreads, 1, kThreads, norms_kernel<Access, Apgd>, job);
}

template <class T> int run(const AtlasPerturbNorms& p, const AtlasWhere& where) {
  if (const int status = status_of(p)) return status;
  if (p.batch * p.channels * p.pixels == 0) return ATLAS_OK;
  Job<T> job = {p, scalar<T>(p.eps), scalar<T>(p.step_size), scalar<T>(p.momentum), scalar<T>(p.clip_min),
                scalar<T>(p.clip_max), {}};
  AtlasPerturbNorms& q = job.p;
  AtlasImages* const images[] = {&q.adv, &q.old, &q.grad, &q.x, &q.out, &q.cast};
  bool in_planes = true, channels_last = true;
  for (const AtlasImages* i : images) {
    in_planes = in_planes && !(i->data && i->channels_last);
    channels_last = channels_last && !(i->data && !i->channels_last);
  }
  const bool per_channel = p.clip_min.per_row || p.clip_max.per_row;
  const bool flat = (in_planes || channels_last) && !p.key && !per_channel;
  if (flat) {  // a pixel's place means nothing
    for (AtlasImages* i : images) i->channels_last = 0;
    job.walk = {1, p.channels * p.pixels, true, false};
  } else {
    job.walk = {p.channels, p.pixels, in_planes, per_channel};
  }
  if constexpr (sizeof(T) == 4) {
    bool vectors = job.walk.pixels % 4 == 0;
    for (const AtlasImages* i : images) vectors = vectors && (!i->data || is_vector(*i, 4));
    if (vectors && (flat || in_planes)) return walk<Vectors<4, 1>>(job, where);
    if (vectors && p.channels == 3) return walk<Vectors<4, 3>>(job, where);
  }
  return walk<Singles<T>>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_perturb_norms(const AtlasPerturbNorms* params, const AtlasWhere* where) {
  if (params->adv.dtype < atlas::kFloat32 || params->adv.dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->adv.dtype == atlas::kFloat64 ? atlas::cuda::run<double>(atlas::with_centre(*params), *where)
                                              : atlas::cuda::run<float>(atlas::with_centre(*params), *where);
}
