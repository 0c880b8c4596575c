// The l_inf perturbation of ONE pixel: ascent step, projection, neighbour. See atlas_kernels/perturb.py for the ops.
#pragma once
#include "platform.h"

namespace atlas {

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
