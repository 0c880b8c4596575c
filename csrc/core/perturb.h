// The l_inf perturbation of ONE pixel: ascent step, projection, neighbour. See atlas_kernels/perturb.py for the ops.
#pragma once
#include <cmath>

#include "../api.h"
#include "philox.h"

namespace atlas {

// The operators as one pass: `out` part by part; out_z: `count` batches one after another.
struct Pass : AtlasPerturb { AtlasImages out_x, out_adv, out_z; };

inline Pass pass_of(const AtlasPerturb& p) {
  Pass pass = {p, {}, {}, {}};
  pass.project = p.project || (p.x.data && !p.grad.data && !p.labels);
  const int64_t bytes = p.batch * p.channels * p.pixels * size_of(p.out.dtype);
  AtlasImages next = p.out;
  const auto take = [&](bool wanted, int64_t batches, AtlasImages& to) {
    if (!wanted || !batches) return;
    to = next;
    next.data = static_cast<char*>(next.data) + batches * bytes;
  };
  take(p.include_x, 1, pass.out_x);
  take(p.grad.data, 1, pass.out_adv);
  take(true, p.count, pass.out_z);
  return pass;
}

constexpr int64_t kWhole = 1 << 12;  // shares of pixels are counted in 4096ths

inline int status_of(const AtlasPerturb& p) {
  if (p.adv.dtype < kFloat32 || p.adv.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0) return ATLAS_BAD_SIZE;
  if (p.count < 0 || p.count >= 1 << 24) return ATLAS_REFUSED;
  if (p.old.data && (!p.grad.data || p.count || p.include_x)) return ATLAS_REFUSED;
  if (p.labels && (p.grad.data || p.project || p.include_x)) return ATLAS_REFUSED;
  if (p.labels && (p.share_low < 0 || p.share_low > p.share_high || p.share_high > kWhole)) return ATLAS_REFUSED;
  if (p.labels && p.batch > 0 && p.classes < 1) return ATLAS_REFUSED;
  if (p.channels == 0 || p.pixels == 0) return ATLAS_OK;  // a gradient without entries has no address either
  return p.rows == ((p.include_x != 0) + (p.grad.data != nullptr) + p.count) * p.batch ? ATLAS_OK : ATLAS_REFUSED;
}

// As torch.sign: 0 for zeros and for NaN, so a pixel without a gradient does not move.
template <class T, class G> ATLAS_HD T sign(G g) { return T(g > G(0)) - T(g < G(0)); }

// What one row (a sample's channel plane) is perturbed with.
template <class T> struct PerturbRow {
  T eps, step, momentum, radius, clip_min, clip_max;  // step < 0 descends
  uint32_t share;                           // of the pixels, for label_start
  T sign;
};

template <class T> ATLAS_HD T project(T v, T x, const PerturbRow<T>& r) { return clip(v, x - r.eps, x + r.eps); }

template <class T> ATLAS_HD T to_range(T v, const PerturbRow<T>& r) { return clip(v, r.clip_min, r.clip_max); }

template <class T> ATLAS_HD T pgd_step(T adv, T direction, T x, const PerturbRow<T>& r) {
  return to_range(project(adv + r.step * direction, x, r), r);
}

// That step, and a share of the way from `old` to adv, in APGD's order of operations.
template <class T> ATLAS_HD T apgd_step(T adv, T old, T direction, T x, const PerturbRow<T>& r) {
  const T step = pgd_step(adv, direction, x, r) - adv, before = adv - old;
  return to_range(project(adv + step * r.momentum + before * (T(1) - r.momentum), x, r), r);
}

// noise in [-1, 1); Project: also inside the eps-ball of x.
template <bool Project, class T> ATLAS_HD T neighbour(T adv, T noise, T x, const PerturbRow<T>& r) {
  T v = adv + r.radius * noise;
  if (Project) v = project(v, x, r);
  return to_range(v, r);
}

ATLAS_HD bool is_class(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

// What one call of label_noise_start draws: from its key and draw, whatever its samples are.
struct LabelNoise {
  uint32_t share;
  bool turned;

  ATLAS_HD LabelNoise(const AtlasPerturb& p, int64_t seed) {
    const Words4 words = NoiseCounter(seed, 0, p.draw, p.stream, 1).group(0);
    share = uint32_t(p.share_low) + below(words.w[0], uint32_t(p.share_high - p.share_low) + 1);
    turned = int32_t(words.w[1]) < 0;
  }

  // For a sample; where its label is no class, the start is NaN.
  template <class T> ATLAS_HD void put(PerturbRow<T>& row, int64_t label, int64_t classes) const {
    row.share = share;
    row.sign = is_class(label, classes) ? T(turned ? -1 : 1) : T(NAN);
  }
};

// Both draws of a pixel are of one word: its 12 high bits say whether uniform noise takes the place of the label's, its
// 20 low bits are that noise. Its grid, 2^-19 of eps, is finer than an fp32 pixel in [0.5, 1] up to eps = 32/255.
template <class T> ATLAS_HD T label_start(T x, uint32_t word, T of_label, const PerturbRow<T>& r) {
  const T u = T(int32_t(word << 12) >> 12) * T(0x1p-19);
  return to_range(x + r.sign * (word >> 20 < r.share ? r.radius * u : of_label), r);
}

}  // namespace atlas
