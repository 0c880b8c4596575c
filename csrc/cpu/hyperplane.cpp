#include "../core/hyperplane.h"

#include <type_traits>

#include "tile.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasHyperplane p;
  PlaneShape shape;
  int64_t tile;
};

struct Sum {
  static ATLAS_HD double of(double a, double b) { return a + b; }
};
struct Largest {
  static ATLAS_HD double of(double a, double b) { return a > b ? a : b; }
};
template <PlaneSweep kSweep, Norm kNorm>
using Fold = std::conditional_t<kSweep == kLengths && kNorm == kLinf, Largest, Sum>;

// As many partial results on every instruction set, so that the order is the same; in memory, and enough of them that no
// addition waits for the one before.
constexpr int kLanes = 64;
struct Lanes {
  double v[4][kLanes];

  template <class With> ATLAS_HD Folded total() {
    for (int half = kLanes / 2; half; half /= 2)
      for (auto& lane : v)
        for (int j = 0; j < half; ++j) lane[j] = With::of(lane[j], lane[j + half]);
    return {v[0][0], v[1][0], v[2][0], v[3][0]};
  }
};

template <class T> struct Tile {
  const T *adv, *grad, *x;
  PixelBounds<T> bounds;
  int64_t size;
};

template <class T> ATLAS_HD T at_row(const AtlasScalar& s, int64_t row) {
  return s.per_row ? static_cast<const T*>(s.per_row)[row] : T(s.value);
}

template <PlaneSweep kSweep, Norm kNorm, class T>
ATLAS_HD void add(Lanes& to, const Tile<T>& tile, const PlaneStep<T>& how) {
  const PlaneStep<T> step = how;  // a copy, of which the compiler knows that no store changes it
  const T *adv = tile.adv, *grad = tile.grad, *x = tile.x;
  const PixelBounds<T> bounds = tile.bounds;
  using With = Fold<kSweep, kNorm>;
  constexpr int kUsed = kSweep == kSeek && kNorm != kL1 ? 4 : 2;
  for (int64_t first = 0; first < tile.size; first += kLanes) {
    const int64_t size = tile.size - first < kLanes ? tile.size - first : kLanes;
    ATLAS_IVDEP for (int64_t j = 0; j < size; ++j) {
      const int64_t i = first + j;
      const Folded t = step.template terms<kSweep, kNorm>(adv[i], grad[i], x[i], bounds);
      to.v[0][j] = With::of(to.v[0][j], t.v[0]);
      to.v[1][j] = With::of(to.v[1][j], t.v[1]);
      if (kUsed == 4) to.v[2][j] += t.v[2], to.v[3][j] += t.v[3];
    }
  }
}

template <Norm kNorm, class T> ATLAS_HD void move(T* to, const Tile<T>& tile, const PlaneStep<T>& how) {
  const PlaneStep<T> step = how;
  const T *adv = tile.adv, *grad = tile.grad, *x = tile.x;
  const PixelBounds<T> bounds = tile.bounds;
  ATLAS_IVDEP for (int64_t i = 0; i < tile.size; ++i)
    to[i] = step.template moved<kNorm>(adv[i], grad[i], x[i], bounds);
}

template <Norm kNorm, class T>
ATLAS_HD void visit(Lanes& lanes, T* to, const Tile<T>& tile, const PlaneStep<T>& step) {
  switch (step.sweep) {
    case kMeasure: return add<kMeasure, kNorm>(lanes, tile, step);
    case kSeek: return add<kSeek, kNorm>(lanes, tile, step);
    case kLengths: return add<kLengths, kNorm>(lanes, tile, step);
    default: return move<kNorm>(to, tile, step);
  }
}

template <class T> struct Body {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) run_sample(job, sample);
  }

  static ATLAS_HD void run_sample(const Job& job, int64_t sample) {
    const double gap = static_cast<const T*>(job.p.gap)[sample];
    PlaneStep<T> step = {Norm(job.p.norm), gap, job.p.alpha_max, T(job.p.overshoot)};
    for (;;) {
      Lanes lanes = {};
      for (int64_t channel = 0; channel < job.shape.channels; ++channel) {
        for (int64_t first = 0; first < job.shape.pixels; first += job.tile) {
          const int64_t left = job.shape.pixels - first;
          sweep_tile(job, {sample, channel, first, left < job.tile ? left : job.tile}, step, lanes);
        }
      }
      if (step.sweep == kMove) return;
      step.advance(step.sweep == kLengths && step.norm == kLinf ? lanes.total<Largest>() : lanes.total<Sum>());
    }
  }

  static ATLAS_HD void sweep_tile(const Job& job, const Place& at, const PlaneStep<T>& step, Lanes& lanes) {
    const AtlasHyperplane& p = job.p;
    alignas(64) T buffers[3][kTile];
    const AtlasImages* images[3] = {&p.adv, &p.grad, &p.x};
    const T* tiles[3];
    for (int i = 0; i < 3; ++i) tiles[i] = load(*images[i], job.shape, at, buffers[i]);
    const PixelBounds<T> bounds = {at_row<T>(p.clip_min, at.channel), at_row<T>(p.clip_max, at.channel)};
    const Tile<T> tile = {tiles[0], tiles[1], tiles[2], bounds, at.size};
    T* const to = step.sweep == kMove ? in_place_of(p.out, job.shape, at, buffers[0], false) : buffers[0];
    if (p.norm == kLinf) visit<kLinf>(lanes, to, tile, step);
    else if (p.norm == kL2) visit<kL2>(lanes, to, tile, step);
    else visit<kL1>(lanes, to, tile, step);
    if (step.sweep == kMove) store(p.out, job.shape, at, to, false);
  }
};

template <class T> int run(const AtlasHyperplane& p, int threads) {
  if (p.batch * p.channels * p.pixels == 0) return ATLAS_OK;
  Job job = {p, {p.channels, p.pixels}, kTile};
  AtlasImages* images[] = {&job.p.adv, &job.p.grad, &job.p.x, &job.p.out};
  bool same_order = true, direct = true;
  for (const AtlasImages* i : images) {
    same_order = same_order && i->channels_last == p.adv.channels_last;
    direct = direct && i->dtype == dtype_of<T>::value;
  }
  if (same_order && !p.clip_min.per_row && !p.clip_max.per_row) {
    for (AtlasImages* i : images) i->channels_last = 0;
    job.shape = {1, p.channels * p.pixels};
    // A tile may be longer than a buffer when nothing passes through one.
    if (direct) job.tile = 16 * kTile;
  }
  constexpr int64_t kGrain = 4096;  // about what a thread must do to be worth waking
  const int64_t grain = (kGrain + p.channels * p.pixels - 1) / (p.channels * p.pixels);
  parallel_ranges<Body<T>>(job, p.batch, grain, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_hyperplane(const AtlasHyperplane* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  return params->adv.dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params, where->threads)
                                              : atlas::cpu::run<float>(*params, where->threads);
}
