#include "../core/stored.h"

#include <cmath>

#include "tile.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasStored p;
  PlaneShape shape;
  int64_t per_plane;  // units a plane
  bool streaming;
  double norm;  // of the gradient
};

template <class T> ATLAS_HD T at_row(const AtlasScalar& s, int64_t row) {
  return s.per_row ? static_cast<const T*>(s.per_row)[row] : T(s.value);
}

// Where a tile of `unit` lies. Neighbouring units are along one plane: rows of the store are far from each other.
ATLAS_HD Place locate(const Job& job, int64_t unit) {
  const int64_t first = unit % job.per_plane * kTile, rest = job.shape.pixels - first, plane = unit / job.per_plane;
  return {plane / job.shape.channels, plane % job.shape.channels, first, rest < kTile ? rest : kTile};
}

// The same place of another row.
ATLAS_HD Place moved_to(Place at, int64_t row) {
  at.sample = row;
  return at;
}

// The sum of |grad| over each share of it, in an order that no instruction set and no thread changes.
template <class T> struct Sums {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    const AtlasStored& p = job.p;
    const AtlasImages grad = {p.grad.data, p.grad.dtype, 0};
    const int64_t numel = p.batch * p.channels * p.pixels;
    for (int64_t block = begin; block < end; ++block)
      p.partial[block] = sum(grad, {1, numel}, numel * block / p.blocks, numel * (block + 1) / p.blocks);
  }

  static ATLAS_HD double sum(const AtlasImages& grad, PlaneShape flat, int64_t first, int64_t last) {
    constexpr int64_t kLanes = 16;
    alignas(64) double lanes[kLanes] = {};
    for (; first < last; first += kTile) {
      alignas(64) T buffer[kTile];
      const Place at = {0, 0, first, last - first < kTile ? last - first : kTile};
      const T* g = load(grad, flat, at, buffer);
      int64_t i = 0;
      for (; i + kLanes <= at.size; i += kLanes)
        ATLAS_UNROLL for (int64_t l = 0; l < kLanes; ++l) lanes[l] += std::fabs(double(g[i + l]));
      for (int64_t l = 0; i < at.size; ++i, ++l) lanes[l] += std::fabs(double(g[i]));
    }
    double total = 0;
    for (double lane : lanes) total += lane;
    return total;
  }
};

template <class T> struct Body {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) run_tile(job, locate(job, unit));
    if (job.streaming) finish_streaming();
  }

  static ATLAS_HD void run_tile(const Job& job, const Place& at) {
    const AtlasStored& p = job.p;
    const StoredRow<T> row = {at_row<T>(p.eps, at.sample), at_row<T>(p.step_size, at.sample),
                              at_row<T>(p.clip_min, at.channel), at_row<T>(p.clip_max, at.channel), T(p.decay)};
    alignas(64) T buffers[2][kTile], written[kTile];
    T* const out = in_place_of(p.out, job.shape, at, written, job.streaming);
    const int64_t number = p.index[at.sample];
    if (is_row(p, number)) {
      const T* x = load(p.x, job.shape, at, buffers[0]);
      const Place there = moved_to(at, number);
      if (p.grad.data) {
        step(job, at, there, row, x, load(p.grad, job.shape, at, buffers[1]), out);
      } else {
        const T* d = load(p.stored, job.shape, there, buffers[1]);
        ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i) out[i] = to_range(x[i] + d[i], row);
      }
    } else {
      for (int64_t i = 0; i < at.size; ++i) out[i] = no_row<T>();
    }
    store(p.out, job.shape, at, out, job.streaming);
  }

  static ATLAS_HD void step(const Job& job, const Place& at, const Place& there, const StoredRow<T>& of, const T* x,
                            const T* grad, T* out) {
    const AtlasStored& p = job.p;
    const StoredRow<T> row = of;  // a copy, of which the compiler knows that no store changes it
    const T norm = T(job.norm);
    alignas(64) T buffers[2][kTile], kept[2][kTile];
    const T *d = load(p.stored, job.shape, there, buffers[0]), *m = load(p.momentum, job.shape, there, buffers[1]);
    if (!is_usable(norm)) {
      ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i) out[i] = adversary(x[i], d[i], grad[i], row);
      return;
    }
    T* const next_d = in_place_of(p.stored, job.shape, there, kept[0], false);
    T* const next_m = in_place_of(p.momentum, job.shape, there, kept[1], false);
    ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i) {
      const T centre = x[i], from = d[i], g = grad[i], momentum = next_momentum(m[i], g, norm, row);
      out[i] = adversary(centre, from, g, row);
      next_m[i] = momentum;
      next_d[i] = next_perturbation(from, momentum, centre, row);
    }
    store(p.stored, job.shape, there, next_d, false);
    store(p.momentum, job.shape, there, next_m, false);
  }
};

template <class T> int run(const AtlasStored& p, int threads) {
  const int64_t numel = p.batch * p.channels * p.pixels;
  if (numel == 0) return ATLAS_OK;
  Job job = {p, {p.channels, p.pixels}, 0, false, 0};
  AtlasImages* const images[] = {&job.p.x, &job.p.grad, &job.p.stored, &job.p.momentum, &job.p.out};
  bool same_order = true;
  for (const AtlasImages* i : images) same_order = same_order && (!i->data || i->channels_last == p.x.channels_last);
  if (same_order && !p.clip_min.per_row && !p.clip_max.per_row) {
    // A pixel's place within its sample means nothing: run through memory as it lies.
    for (AtlasImages* i : images) i->channels_last = 0;
    job.shape = {1, p.channels * p.pixels};
  }
  job.per_plane = (job.shape.pixels + kTile - 1) / kTile;
  job.streaming = outgrows_cache(numel * int64_t(sizeof(T)));
  constexpr int64_t kGrain = 32768;  // about what a thread must do to be worth waking
  if (p.grad.data) {
    const int64_t share = numel / p.blocks + 1;
    parallel_ranges<Sums<T>>(job, p.blocks, (kGrain + share - 1) / share, threads);
    for (int64_t block = 0; block < p.blocks; ++block) job.norm += p.partial[block];
  }
  const int64_t unit_cost = job.shape.pixels < kTile ? job.shape.pixels : kTile;
  const int64_t units = numel / job.shape.pixels * job.per_plane;
  parallel_ranges<Body<T>>(job, units, (kGrain + unit_cost - 1) / unit_cost, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_stored(const AtlasStored* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  return params->x.dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params, where->threads)
                                            : atlas::cpu::run<float>(*params, where->threads);
}
