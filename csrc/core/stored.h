// FGSM-PGI's memory of ONE pixel: a perturbation that is kept from epoch to epoch, and the momentum it moves by. See
// atlas_kernels/stored.py for the ops.
#pragma once
#include "perturb.h"

namespace atlas {

inline int status_of(const AtlasStored& p) {
  if (p.x.dtype < kFloat32 || p.x.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0 || p.count < 0) return ATLAS_BAD_SIZE;
  return !p.grad.data || p.blocks > 0 || p.batch * p.channels * p.pixels == 0 ? ATLAS_OK : ATLAS_REFUSED;
}

// What one row (a sample's channel plane) is moved by.
template <class T> struct StoredRow {
  T eps, step, clip_min, clip_max, decay;
};

template <class T> ATLAS_HD T to_range(T v, const StoredRow<T>& r) { return clip(v, r.clip_min, r.clip_max); }

// A step of the perturbation, inside its ball.
template <class T> ATLAS_HD T moved(T perturbation, T direction, const StoredRow<T>& r) {
  return clip(perturbation + r.step * sign<T>(direction), r.eps * T(-1), r.eps);
}

template <class T> ATLAS_HD T adversary(T x, T perturbation, T grad, const StoredRow<T>& r) {
  return to_range(x + moved(perturbation, grad, r), r);
}

template <class T> ATLAS_HD T next_momentum(T momentum, T grad, T norm, const StoredRow<T>& r) {
  return grad / norm + r.decay * momentum;
}

// What is kept takes x no further than the image range.
template <class T> ATLAS_HD T next_perturbation(T perturbation, T momentum, T x, const StoredRow<T>& r) {
  return clip(moved(perturbation, momentum, r), r.clip_min - x, r.clip_max - x);
}

// Of the gradient of the whole batch: 0, NaN or infinite, nothing is learned from it.
template <class T> ATLAS_HD bool is_usable(T norm) { return norm > T(0) && norm - norm == T(0); }

ATLAS_HD bool is_row(const AtlasStored& p, int64_t row) { return row >= 0 && row < p.count; }

// What is written where the store has no such row: kernels never read or write beyond it, whatever the index says.
template <class T> ATLAS_HD T no_row() { return T(bit_cast<float>(0x7fc00000u)); }

}  // namespace atlas
