// FAB's step of ONE sample: its pixels are swept a few times, each sweep but the last folds up to four numbers, and these
// say what the next one is. See atlas_kernels/hyperplane.py for the operator.
#pragma once
#include <cmath>

#include "perturb_norms.h"

namespace atlas {

inline int status_of(const AtlasHyperplane& p) {
  if (p.adv.dtype < kFloat32 || p.adv.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0) return ATLAS_BAD_SIZE;
  return p.norm >= kLinf && p.norm <= kL1 ? ATLAS_OK : ATLAS_REFUSED;
}

// The size of the gradient, and where x lies from the iterate; the searches for both ways to the plane; how long they are.
enum PlaneSweep : int32_t { kMeasure, kSeek, kLengths, kMove };

struct Folded { double v[4]; };

constexpr double kFar = 0x1p60;        // a pixel goes no further: in an infinite range its gain is a number all the same
constexpr double kShortestWay = 1e-8;  // so that two ways of length 0 have a ratio

// The way from one of two points, the iterate or x, to the plane.
template <class T> struct Way {
  using Bits = typename bits_of_type<T>::type;

  double target = 0.0;  // what the pixels are to gain in all
  bool moves = false, seeks = false;
  bool along = false;  // the gradient, else against it
  double root = 0.0;   // l_inf and l2: what a pixel that is not used up goes, l2: for each unit of its gradient
  // l1: the bits of the threshold lie in [least, most), and what pixels gain from either on. Pixels above go as far as
  // they can, those at the threshold `part` of that.
  Bits least = 0, most = 1, tried = 0;
  double from_least = 0.0, from_most = 0.0;
  T part = T(0);

  ATLAS_HD void aim(double gap, double size, Norm norm) {
    target = magnitude(gap), along = gap < 0.0;
    moves = seeks = target < kInfinite && size < kInfinite;
    if (!moves || norm != kL1) return;
    most = bit_cast<Bits>(T(size)) + 1;  // no entry is larger
    seeks = most > 1, tried = most / 2;
  }

  ATLAS_HD T room(T point, T grad, const PixelBounds<T>& r) const {
    T c = (grad > T(0)) == along ? r.hi - point : point - r.lo;
    c = c > T(0) ? c : T(0);  // selects alone, which compilers make vectors of; none for NaN
    return c < T(kFar) ? c : T(kFar);
  }

  // l_inf and l2: what the pixels that are not used up gain for each unit of the root; what the others gain in all. l1:
  // what those from the tried threshold on gain.
  template <Norm kNorm> ATLAS_HD Sums gains(T point, T grad, const PixelBounds<T>& r) const {
    const T size = magnitude(grad);
    const double m = size, c = room(point, grad, r), gain = m * c;
    if (kNorm == kL1) return {bit_cast<Bits>(size) >= tried ? gain : 0.0, 0.0};
    const double unit = kNorm == kL2 ? m : 1.0, slope = m * unit;
    const bool free = root * unit < c;
    return {free ? slope : 0.0, free ? 0.0 : gain};
  }

  // After a sweep of gains. Newton's step on a concave function never passes the root from below, but for rounding.
  ATLAS_HD void narrow(double first, double second, Norm norm) {
    if (!seeks) return;
    if (norm != kL1) {
      const double next = first > 0.0 ? (target - second) / first : kInfinite;
      seeks = next > root && next < kInfinite;
      root = next > root ? next : root;
      return;
    }
    if (first >= target) least = tried, from_least = first;
    else most = tried, from_most = first;
    tried = least + (most - least) / 2;
    seeks = most - least > 1;
    const double tied = from_least - from_most;
    part = T(tied > 0.0 ? (target - from_most) / tied : 0.0);
  }

  template <Norm kNorm> ATLAS_HD T distance(T point, T grad, const PixelBounds<T>& r) const {
    const T c = room(point, grad, r), size = magnitude(grad);
    T d;
    if (kNorm == kL1) {
      const Bits bits = bit_cast<Bits>(size);
      const T shared = c * part, tied = bits >= least ? shared : T(0);
      d = bits >= most ? c : tied;
    } else {
      d = kNorm == kL2 ? T(root * double(size)) : T(root);
      d = d < c ? d : c;
    }
    return moves && grad != T(0) ? d : T(0);
  }

  // As a vector, times how far beyond the plane.
  template <Norm kNorm> ATLAS_HD T overshot(T point, T grad, T overshoot, const PixelBounds<T>& r) const {
    const T d = distance<kNorm>(point, grad, r) * overshoot;
    return (grad > T(0)) == along ? d : -d;
  }
};

template <class T> struct PlaneStep {
  Norm norm;
  double gap, alpha_max;
  T overshoot;
  PlaneSweep sweep = kMeasure;
  Way<T> here = {}, there = {};  // from the iterate, and from x
  T alpha = T(0);

  template <PlaneSweep kSweep, Norm kNorm>
  ATLAS_HD Folded terms(T adv, T grad, T x, const PixelBounds<T>& r) const {
    if (kSweep == kMeasure) return {double(grad) * (double(x) - double(adv)), double(magnitude(grad)), 0.0, 0.0};
    if (kSweep == kSeek) {
      const Sums a = here.template gains<kNorm>(adv, grad, r), b = there.template gains<kNorm>(x, grad, r);
      return {a.a, b.a, a.b, b.b};
    }
    const double a = here.template distance<kNorm>(adv, grad, r), b = there.template distance<kNorm>(x, grad, r);
    return {kNorm == kL2 ? a * a : a, kNorm == kL2 ? b * b : b, 0.0, 0.0};
  }

  template <Norm kNorm> ATLAS_HD T moved(T adv, T grad, T x, const PixelBounds<T>& r) const {
    const T from_adv = adv + here.template overshot<kNorm>(adv, grad, overshoot, r);
    const T from_x = x + there.template overshot<kNorm>(x, grad, overshoot, r);
    return clip(from_adv * (T(1) - alpha) + from_x * alpha, r.lo, r.hi);
  }

  // After a sweep: what it found out, and what comes next.
  ATLAS_HD void advance(const Folded& f) {
    if (sweep == kLengths) return mix(f.v[0], f.v[1]);
    if (sweep == kMeasure) {
      here.aim(gap, f.v[1], norm);
      there.aim(gap + f.v[0], f.v[1], norm);
    } else {
      here.narrow(f.v[0], f.v[2], norm);
      there.narrow(f.v[1], f.v[3], norm);
    }
    sweep = here.seeks || there.seeks ? kSeek : kLengths;
  }

  ATLAS_HD void mix(double a, double b) {
    if (norm == kL2) a = std::sqrt(a), b = std::sqrt(b);
    a = a > kShortestWay ? a : kShortestWay, b = b > kShortestWay ? b : kShortestWay;
    const double share = a / (a + b);
    alpha = T(share < alpha_max ? share : alpha_max);
    sweep = kMove;
  }
};

}  // namespace atlas
