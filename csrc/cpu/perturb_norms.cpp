#include "../core/perturb_norms.h"

#include "../core/random.h"
#include "noise.h"
#include "tile.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasPerturbNorms p;
  PlaneShape shape;
  int64_t tile;
  int64_t seed, base;
  FillWords fill;
};

// As many partial sums on every instruction set, so that the order of the additions is the same; in memory, and enough
// of them that no addition waits for the one before.
constexpr int kLanes = 64;
struct Lanes {
  double a[kLanes], b[kLanes];

  ATLAS_HD Sums total() {
    for (int half = kLanes / 2; half; half /= 2)
      for (int j = 0; j < half; ++j) a[j] += a[j + half], b[j] += b[j + half];
    return {a[0], b[0]};
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

template <Sweep kSweep, Norm kNorm, class T> ATLAS_HD void add(Lanes& to, const Tile<T>& tile, const NormStep<T>& how) {
  const NormStep<T> step = how;  // a copy, of which the compiler knows that no store changes it
  const T *adv = tile.adv, *grad = tile.grad, *x = tile.x;
  const PixelBounds<T> bounds = tile.bounds;
  for (int64_t first = 0; first < tile.size; first += kLanes) {
    const int64_t size = tile.size - first < kLanes ? tile.size - first : kLanes;
    ATLAS_IVDEP for (int64_t j = 0; j < size; ++j) {
      const int64_t i = first + j;
      constexpr bool kFar = kSweep != kGradient;
      const Sums t = step.template terms<kSweep, kNorm>(kFar ? adv[i] : T(0), grad[i], kFar ? x[i] : T(0), bounds);
      to.a[j] += t.a;
      if (kFar && (is_l1(kNorm) || sizeof(T) == 8)) to.b[j] += t.b;
    }
  }
}

template <Norm kNorm, class T> ATLAS_HD void add(Lanes& to, const Tile<T>& tile, const NormStep<T>& step) {
  switch (step.sweep) {
    case kGradient: return add<kGradient, kNorm>(to, tile, step);
    case kSelect: return add<kSelect, kNorm>(to, tile, step);
    case kSearch: return add<kSearch, kNorm>(to, tile, step);
    default: return add<kDistance, kNorm>(to, tile, step);
  }
}

// Moves a tile before anything else is done with it: gcc makes vectors of a sparse step and of the sweeps, but not of
// both in one loop.
template <Norm kNorm, class T> ATLAS_HD void move(T* to, const Tile<T>& tile, const NormStep<T>& how) {
  const NormStep<T> step = how;
  const T *adv = tile.adv, *grad = tile.grad;
  const PixelBounds<T> bounds = tile.bounds;
  ATLAS_IVDEP for (int64_t i = 0; i < tile.size; ++i) to[i] = step.template moved<kNorm>(adv[i], grad[i], bounds);
}

template <class T> ATLAS_HD void carry(T* to, const Tile<T>& tile, const T* old, const NormStep<T>& how) {
  const NormStep<T> step = how;
  const T *adv = tile.adv, *grad = tile.grad, *x = tile.x;
  const PixelBounds<T> bounds = tile.bounds;
  ATLAS_IVDEP for (int64_t i = 0; i < tile.size; ++i) to[i] = step.carried(adv[i], old[i], grad[i], x[i], bounds);
}

template <Norm kNorm, class T> ATLAS_HD void write(T* to, const Tile<T>& tile, const NormStep<T>& how) {
  const NormStep<T> step = how;
  const T *adv = tile.adv, *grad = tile.grad, *x = tile.x;
  const PixelBounds<T> bounds = tile.bounds;
  ATLAS_IVDEP for (int64_t i = 0; i < tile.size; ++i)
    to[i] = step.template written<kNorm>(adv[i], grad[i], x[i], bounds);
}

template <class T> ATLAS_HD void random_direction(T* to, const uint32_t* words, Norm norm, int64_t size) {
  if (norm == kL2) {
    for (int64_t i = 0; i < size; i += 2) normal_pair(words[i], words[i + 1], to[i], to[i + 1]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = laplace<T>(words[i]);
  }
}

template <class T> struct Body {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) run_sample(job, sample);
  }

  static ATLAS_HD void run_sample(const Job& job, int64_t sample) {
    NormStep<T> step = first_sweep(job, sample);
    for (;;) {
      Lanes sums = {};
      for (int64_t channel = 0; channel < job.shape.channels; ++channel) {
        for (int64_t first = 0; first < job.shape.pixels; first += job.tile) {
          const int64_t left = job.shape.pixels - first;
          sweep_tile(job, {sample, channel, first, left < job.tile ? left : job.tile}, step, sums);
        }
      }
      if (step.sweep == kWrite) return;
      step.advance(sums.total());
    }
  }

  static ATLAS_HD NoiseCounter counter(const Job& job, int64_t sample, uint32_t number) {
    const int64_t own = job.p.ids ? job.p.ids[sample] : wrapping_sum(job.base, sample);
    return {job.seed, own, job.p.draw, job.p.stream, number};
  }

  static ATLAS_HD NormStep<T> first_sweep(const Job& job, int64_t sample) {
    const AtlasPerturbNorms& p = job.p;
    const int64_t dimensions = p.channels * p.pixels;
    NormStep<T> step = {step_of(p), kWrite, dimensions, largest_of(p, sample), at_row<T>(p.eps, sample),
                        at_row<T>(p.step_size, sample), at_row<T>(p.momentum, sample)};
    if (p.active && !p.active[sample]) return step;
    if (p.key) {
      step.step = T(double(step.eps) * ball_radius(counter(job, sample, 1).group(0).w[0], dimensions));
      step.eps = T(kInfinite);
    }
    if (p.descend) step.step = -step.step;
    if (p.norm != kLinf) step.sweep = p.key || p.grad.data ? kGradient : kDistance;
    return step;
  }

  static ATLAS_HD void sweep_tile(const Job& job, const Place& at, const NormStep<T>& step, Lanes& sums) {
    const AtlasPerturbNorms& p = job.p;
    alignas(64) T buffers[4][kTile];
    const AtlasImages* images[4] = {&p.grad, &p.adv, &p.x, &p.old};
    const T* tiles[4] = {buffers[0], nullptr, nullptr, nullptr};
    const bool active = !p.active || p.active[at.sample];
    const bool carries = active && step.norm == kMomentumL2 && step.sweep >= kCarry;
    for (int i = p.grad.data ? 0 : 1; i < (step.sweep == kGradient ? 1 : carries ? 4 : 3); ++i)
      tiles[i] = load(*images[i], job.shape, at, buffers[i]);
    if (p.key) draw(job, at, buffers[0]);
    else if (!p.grad.data) tiles[0] = tiles[1];  // not used
    Tile<T> tile = {tiles[1], tiles[0], tiles[2],
                    {at_row<T>(p.clip_min, at.channel), at_row<T>(p.clip_max, at.channel)}, at.size};
    NormStep<T> rest = step;
    if (carries || (step.largest && step.sweep > kSelect)) {
      if (carries) carry(buffers[1], tile, tiles[3], step);
      else if (step.norm == kSignL1) move<kSignL1>(buffers[1], tile, step);
      else move<kSparseL1>(buffers[1], tile, step);
      tile.adv = buffers[1], rest.moves = false;
    }
    if (step.sweep == kWrite) return finish(job, at, tile, rest, buffers[1]);
    if (p.norm == kL2) add<kL2>(sums, tile, rest);
    else if (step.norm == kSignL1 && step.sweep == kSelect) add<kSelect, kSignL1>(sums, tile, rest);
    else add<kL1>(sums, tile, rest);
  }

  static ATLAS_HD void draw(const Job& job, const Place& at, T* to) {
    alignas(64) uint32_t words[kTile];
    const int64_t groups = groups_per_plane(at.size);
    const int64_t first = at.channel * groups_per_plane(job.shape.pixels) + at.first / 4;
    job.fill(words, counter(job, at.sample, 0), uint32_t(first), groups);
    random_direction(to, words, Norm(job.p.norm), 4 * groups);
  }

  static ATLAS_HD void finish(const Job& job, const Place& at, const Tile<T>& tile, const NormStep<T>& step, T* buffer) {
    const AtlasPerturbNorms& p = job.p;
    const T* done = tile.adv;
    if (!p.active || p.active[at.sample]) {
      T* to = in_place_of(p.out, job.shape, at, buffer, false);
      if (p.norm == kLinf) write<kLinf>(to, tile, step);
      else if (p.norm == kL2) write<kL2>(to, tile, step);
      else write<kL1>(to, tile, step);
      done = to;
    }
    const AtlasImages* results[2] = {&p.out, &p.cast};
    for (int i = 0; i < 2; ++i)
      if (results[i]->data) store(*results[i], job.shape, at, done, false);
  }
};

template <class T> Job plan(const AtlasPerturbNorms& p) {
  Job job = {};
  job.p = p;
  AtlasImages* images[] = {&job.p.adv, &job.p.old, &job.p.grad, &job.p.x, &job.p.out, &job.p.cast};
  bool same_order = true, direct = true;
  for (const AtlasImages* i : images) {
    if (!i->data) continue;
    same_order = same_order && i->channels_last == p.adv.channels_last;
    direct = direct && i->dtype == dtype_of<T>::value;
  }
  job.shape = {p.channels, p.pixels};
  if (same_order && !p.key && !p.clip_min.per_row && !p.clip_max.per_row) {
    for (AtlasImages* i : images) i->channels_last = 0;
    job.shape = {1, p.channels * p.pixels};
  }
  // A tile may be longer than a buffer when nothing passes through one.
  const bool unbuffered = direct && same_order && !job.p.adv.channels_last && !p.key && !p.largest && !p.old.data;
  job.tile = unbuffered ? 16 * kTile : kTile;
  if (p.key) job.seed = p.key[0], job.base = p.key[1];
  job.fill = fill_words();
  return job;
}

template <class T> int run(const AtlasPerturbNorms& p, int threads) {
  if (const int status = status_of(p)) return status;
  const int64_t dimensions = p.channels * p.pixels;
  if (p.batch * dimensions == 0) return ATLAS_OK;
  constexpr int64_t kGrain = 16384;  // about what a thread must do to be worth waking
  parallel_ranges<Body<T>>(plan<T>(p), p.batch, (kGrain + dimensions - 1) / dimensions, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_perturb_norms(const AtlasPerturbNorms* params, const AtlasWhere* where) {
  if (params->adv.dtype < atlas::kFloat32 || params->adv.dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->adv.dtype == atlas::kFloat64 ? atlas::cpu::run<double>(atlas::with_centre(*params), where->threads)
                                              : atlas::cpu::run<float>(atlas::with_centre(*params), where->threads);
}
