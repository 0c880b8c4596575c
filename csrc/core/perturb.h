// The l_inf perturbation of ONE pixel: ascent step, projection, neighbour. See atlas_kernels/perturb.py for the ops.
#pragma once
#include "../api.h"
#include "platform.h"

namespace atlas {

// The operators as one pass: `out` part by part; out_z: `count` batches one after another.
struct Pass : AtlasPerturb { AtlasImages out_x, out_adv, out_z; };

inline Pass pass_of(const AtlasPerturb& p) {
  Pass pass = {p, {}, {}, {}};
  pass.project = p.project || (p.x.data && !p.grad.data);
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

inline int status_of(const AtlasPerturb& p) {
  if (p.adv.dtype < kFloat32 || p.adv.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0) return ATLAS_BAD_SIZE;
  if (p.count < 0 || p.count >= 1 << 24) return ATLAS_REFUSED;
  if (p.channels == 0 || p.pixels == 0) return ATLAS_OK;  // a gradient without entries has no address either
  return p.rows == ((p.include_x != 0) + (p.grad.data != nullptr) + p.count) * p.batch ? ATLAS_OK : ATLAS_REFUSED;
}

// As torch.sign: 0 for zeros and for NaN, so a pixel without a gradient does not move.
template <class T, class G> ATLAS_HD T sign(G g) { return T(g > G(0)) - T(g < G(0)); }

// What one row (a sample's channel plane) is perturbed with.
template <class T> struct PerturbRow {
  T eps, step, radius, clip_min, clip_max;  // step < 0 descends
};

template <class T> ATLAS_HD T project(T v, T x, const PerturbRow<T>& r) { return clip(v, x - r.eps, x + r.eps); }

template <class T> ATLAS_HD T to_range(T v, const PerturbRow<T>& r) { return clip(v, r.clip_min, r.clip_max); }

template <class T> ATLAS_HD T pgd_step(T adv, T direction, T x, const PerturbRow<T>& r) {
  return to_range(project(adv + r.step * direction, x, r), r);
}

// noise in [-1, 1); Project: also inside the eps-ball of x.
template <bool Project, class T> ATLAS_HD T neighbour(T adv, T noise, T x, const PerturbRow<T>& r) {
  T v = adv + r.radius * noise;
  if (Project) v = project(v, x, r);
  return to_range(v, r);
}

}  // namespace atlas
