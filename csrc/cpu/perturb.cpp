#include "../core/perturb.h"

#include "noise.h"
#include "tile.h"

namespace atlas::cpu {
namespace {

struct Job {
  Pass p;
  PlaneShape shape;
  int64_t tile;       // pixels a unit of work
  int64_t per_plane;  // units a plane
  bool plane_major;   // neighbouring units: along one plane, or across the channels of the same pixels
  bool streaming;
  int64_t seed, base;
  LabelNoise labels;
  FillWords fill;
  DrawNeighbour draw, step_and_draw;  // of fp32; the second where nothing passes through a buffer; null: not to be used
  struct { AtlasImages to; bool of_x; } copy[3];  // results beside the neighbours
  int64_t copies;

  explicit Job(const Pass& pass)
      : p(pass), seed(p.key ? p.key[0] : 0), base(p.key ? p.key[1] : 0), labels(p, seed), draw(nullptr),
        step_and_draw(nullptr), copies(0) {}
};

// The direction is all that matters of a gradient: taken before any conversion, so that a tiny fp64 one keeps it.
template <class T> struct SignOf {
  template <class S> static ATLAS_HD T from(S g) { return from_number(g); }
  static ATLAS_HD T from(half_t g) { return from_number(to_float(g)); }
  static ATLAS_HD T from(bfloat16_t g) { return from_number(to_float(g)); }
  template <class S> static ATLAS_HD T from_number(S g) { return sign<T>(g); }
};

template <class T> ATLAS_HD T at_row(const AtlasScalar& s, int64_t row) {
  return s.per_row ? static_cast<const T*>(s.per_row)[row] : T(s.value);
}

ATLAS_HD Place locate(const Job& job, int64_t unit) {
  Place at;
  int64_t tile;
  if (job.plane_major) {
    tile = unit % job.per_plane;
    at.channel = unit / job.per_plane % job.shape.channels;
  } else {
    at.channel = unit % job.shape.channels;
    tile = unit / job.shape.channels % job.per_plane;
  }
  at.sample = unit / (job.per_plane * job.shape.channels);
  at.first = tile * job.tile;
  at.size = job.shape.pixels - at.first < job.tile ? job.shape.pixels - at.first : job.tile;
  return at;
}

template <bool Project, class T>
ATLAS_HD void neighbours(T* z, const T* adv, const uint32_t* words, const T* x, const PerturbRow<T>& row,
                         int64_t size) {
  ATLAS_IVDEP for (int64_t i = 0; i < size; ++i)
    z[i] = neighbour<Project>(adv[i], uniform<T>(words[i]), Project ? x[i] : T(0), row);
}

template <class T> struct Body {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) run_tile(job, locate(job, unit));
    if (job.streaming) finish_streaming();
  }

  // Few calls of load and store: they are long once inlined for every dtype and order.
  static ATLAS_HD void run_tile(const Job& job, const Place& at) {
    const Pass& p = job.p;
    const T step = at_row<T>(p.step_size, at.sample);
    PerturbRow<T> row = {at_row<T>(p.eps, at.sample), p.descend ? -step : step, at_row<T>(p.momentum, at.sample),
                         at_row<T>(p.radius, at.sample), at_row<T>(p.clip_min, at.channel),
                         at_row<T>(p.clip_max, at.channel), 0, T(0)};
    Place places[3] = {at, at, at};
    if (p.labels) {
      const int64_t label = p.labels[at.sample];
      places[1].sample = is_class(label, p.classes) ? label : 0;
      job.labels.put(row, label, p.classes);
    }
    alignas(64) T buffers[3][kTile], z[kTile];
    const AtlasImages* images[3] = {&p.adv, &p.x, &p.old};
    const T* tiles[3] = {nullptr, nullptr, nullptr};
    for (int i = 0; i < 3; ++i)
      if (images[i]->data) tiles[i] = load(*images[i], job.shape, places[i], buffers[i]);
    const T *adv = tiles[0], *const x = tiles[1];
    const bool steps = p.grad.data && (!p.active || p.active[at.sample]), at_once = steps && job.step_and_draw;
    if (steps && !at_once) adv = step_tile(job, at, row, adv, tiles[2], x, buffers[0]);

    for (int64_t i = at_once ? job.copies : 0; i < job.copies + p.count; ++i) {
      if (i < job.copies) {
        store(job.copy[i].to, job.shape, at, job.copy[i].of_x ? x : adv, job.streaming);
        continue;
      }
      const int64_t k = i - job.copies;
      Place to = at;
      to.sample += k * p.batch;
      T* tile = in_place_of(p.out_z, job.shape, to, z, job.streaming);
      if (at_once && k == 0) adv = first_neighbour_tile(job, at, row, tile, adv, x);
      else neighbour_tile(job, at, row, k, tile, adv, x);
      store(p.out_z, job.shape, to, tile, job.streaming);
    }
  }

  static ATLAS_HD const T* step_tile(const Job& job, const Place& at, const PerturbRow<T>& of, const T* adv,
                                     const T* old, const T* x, T* buffer) {
    const PerturbRow<T> row = of;  // a copy, of which the compiler knows that no store changes it
    alignas(64) T sign_tile[kTile];
    const T* grad = load<T, SignOf<T>>(job.p.grad, job.shape, at, sign_tile);
    // Always in place when tiles are longer than a buffer (see plan()).
    T* to = in_place_of(job.p.out_adv, job.shape, at, buffer, job.streaming);
    if (old)
      ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i)
        to[i] = apgd_step(adv[i], old[i], sign<T>(grad[i]), x[i], row);
    else
      ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i) to[i] = pgd_step(adv[i], sign<T>(grad[i]), x[i], row);
    return to;
  }

  static ATLAS_HD NoiseCounter counter(const Job& job, const Place& at, int64_t k) {
    const Pass& p = job.p;
    const int64_t sample = p.ids ? p.ids[at.sample] : wrapping_sum(job.base, at.sample);
    return {job.seed, sample, p.draw, p.stream, uint32_t(k)};
  }

  static ATLAS_HD uint32_t first_group(const Job& job, const Place& at) {
    return uint32_t(at.channel * groups_per_plane(job.shape.pixels) + at.first / 4);
  }

  static ATLAS_HD void neighbour_tile(const Job& job, const Place& at, const PerturbRow<T>& row, int64_t k, T* z,
                                      const T* adv, const T* x) {
    int64_t done = 0;
    if constexpr (sizeof(T) == 4)
      if (job.draw)
        done = job.draw({z, adv, x, at.size, {}, {}, {}}, row, counter(job, at, k), first_group(job, at));
    last_neighbours(job, at, row, k, done, z, adv, x);
  }

  // With the step before it, and a copy of x: the result of the step.
  static ATLAS_HD const T* first_neighbour_tile(const Job& job, const Place& at, const PerturbRow<T>& row, T* z,
                                                const T* adv, const T* x) {
    const Pass& p = job.p;
    const int64_t offset = job.shape.offset(at, false);
    const T* grad = static_cast<const T*>(p.grad.data) + offset;
    T* moved = static_cast<T*>(p.out_adv.data) + offset;
    T* copy = p.out_x.data ? static_cast<T*>(p.out_x.data) + offset : moved;
    int64_t done = 0;
    if constexpr (sizeof(T) == 4)
      done = job.step_and_draw({z, adv, x, at.size, grad, moved, copy}, row, counter(job, at, 0),
                               first_group(job, at));
    for (int64_t i = done; i < at.size; ++i) {
      const T centre = x[i], to = pgd_step(adv[i], sign<T>(grad[i]), centre, row);
      copy[i] = centre;
      moved[i] = to;
    }
    last_neighbours(job, at, row, 0, done, z, moved, x);
    return moved;
  }

  // Those from number `done` on.
  static ATLAS_HD void last_neighbours(const Job& job, const Place& at, const PerturbRow<T>& of, int64_t k,
                                       int64_t done, T* z, const T* adv, const T* x) {
    const PerturbRow<T> row = of;  // a copy, of which the compiler knows that no store changes it
    static_assert(kTile % (4 * kGroupsAtOnce) == 0, "the last words of a tile must fit its buffer");
    alignas(64) uint32_t words[kTile];
    for (; done < at.size; done += kTile) {
      const int64_t size = at.size - done < kTile ? at.size - done : kTile;
      job.fill(words, counter(job, at, k), first_group(job, at) + uint32_t(done / 4), groups_per_plane(size));
      if (job.p.labels)
        ATLAS_IVDEP for (int64_t i = 0; i < size; ++i)
          z[done + i] = label_start(adv[done + i], words[i], x[done + i], row);
      else if (job.p.project)
        neighbours<true>(z + done, adv + done, words, x + done, row, size);
      else
        neighbours<false>(z + done, adv + done, words, x, row, size);
    }
  }
};

bool per_channel(const Pass& p) { return p.clip_min.per_row || p.clip_max.per_row; }

bool per_sample(const Pass& p) {
  return p.active || p.eps.per_row || p.step_size.per_row || p.momentum.per_row || p.radius.per_row;
}

template <class T> Job plan(const Pass& p) {
  Job job(p);
  AtlasImages* images[] = {&job.p.adv, &job.p.old, &job.p.grad, &job.p.x,
                           &job.p.out_x, &job.p.out_adv, &job.p.cast, &job.p.out_z};
  bool same_order = true, direct = true;
  int64_t written = 0;
  for (const AtlasImages* i : images) {
    if (!i->data) continue;
    same_order = same_order && i->channels_last == p.adv.channels_last;
    direct = direct && i->dtype == dtype_of<T>::value;
    if (i >= &job.p.out_x) written += (i == &job.p.out_z ? p.count : 1) * int64_t(sizeof(T));
  }
  const int64_t numel = p.batch * p.channels * p.pixels;
  job.shape = {p.channels, p.pixels};
  // Without noise and per-channel bounds a pixel's place means nothing: run through memory as it lies.
  if (same_order && !p.count && !per_channel(p)) {
    for (AtlasImages* i : images) i->channels_last = 0;
    job.shape = {1, per_sample(p) ? p.channels * p.pixels : numel};
  } else if (same_order && !p.adv.channels_last && !per_channel(p) && p.pixels % 4 == 0) {
    job.shape = {1, p.channels * p.pixels};  // the groups of one plane follow those of the plane before
  }
  if (p.out_x.data) job.copy[job.copies++] = {job.p.out_x, true};
  if (p.out_adv.data) job.copy[job.copies++] = {job.p.out_adv, false};
  if (p.cast.data) job.copy[job.copies++] = {job.p.cast, false};
  job.streaming = outgrows_cache(written * numel);
  job.plane_major = same_order && !job.p.adv.channels_last;
  // A tile may be longer than a buffer when nothing passes through one; with noise it is to stay in the first cache.
  const bool unbuffered = direct && job.plane_major && !job.streaming && (p.count || p.out_adv.data);
  job.tile = !unbuffered ? kTile : p.count ? 6 * kTile : 16 * kTile;
  job.per_plane = (job.shape.pixels + job.tile - 1) / job.tile;
  job.fill = fill_words();
  if (sizeof(T) == 4) {
    job.draw = p.labels ? draw_label_start() : draw_neighbour(false, p.project);
    if (unbuffered && p.count && p.grad.data) job.step_and_draw = draw_neighbour(true, p.project);
  }
  return job;
}

template <class T> int run(const Pass& p, int threads) {
  const int64_t numel = p.batch * p.channels * p.pixels;
  if (numel == 0) return ATLAS_OK;
  const Job job = plan<T>(p);
  const int64_t units = numel / job.shape.pixels * job.per_plane;
  const int64_t unit_cost = (job.shape.pixels < job.tile ? job.shape.pixels : job.tile) * (1 + 4 * p.count);
  constexpr int64_t kGrain = 32768;  // about what a thread must do to be worth waking
  parallel_ranges<Body<T>>(job, units, (kGrain + unit_cost - 1) / unit_cost, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_perturb(const AtlasPerturb* params, const AtlasWhere* where) {
  if (const int status = atlas::status_of(*params)) return status;
  const atlas::Pass pass = atlas::pass_of(*params);
  return pass.adv.dtype == atlas::kFloat64 ? atlas::cpu::run<double>(pass, where->threads)
                                           : atlas::cpu::run<float>(pass, where->threads);
}
