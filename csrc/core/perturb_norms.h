// l2 and l1 geometry of ONE sample: its pixels are swept a few times, each sweep but the last adds up two sums, and
// these say what the next one is. See atlas_kernels/perturb_norms.py for the operators.
#pragma once
#include <cmath>

#include "platform.h"

namespace atlas {

enum Norm : int32_t { kLinf = 0, kL2 = 1, kL1 = 2 };

enum Sweep : int32_t { kGradient, kDistance, kSearch, kWrite };

// In fp64, where squares of fp32 are exact and neither over- nor underflow, so that no sweep for a maximum is needed and
// the order of the additions hardly ever shows in a result that is rounded to fp32.
struct Sums { double a, b; };

template <class T> struct PixelBounds { T lo, hi; };

constexpr double kInfinite = __builtin_huge_val();
constexpr int kNewtonSweeps = 16, kSearchSweeps = 64;

template <class T> ATLAS_HD T magnitude(T v) { return v < T(0) ? -v : v; }

template <class T> struct NormStep {
  Norm norm;
  Sweep sweep;
  int64_t dimensions;
  T eps, step;  // step < 0 descends
  // Known after the gradient: the pixel moves by (grad scale) factor. The scale is a power of two, exact.
  T scale = T(1), factor = T(0);
  bool moves = false;
  // Known after the distance: what it is multiplied with (l2), or what each pixel's loses (l1).
  T shrink = T(1);
  bool projects = false;
  // The root of the l1 search lies in [low, high].
  T low = T(0), high = T(0);
  int searched = 0;

  ATLAS_HD T moved(T adv, T grad) const {
    const T v = adv + grad * scale * factor;
    return moves ? v : adv;
  }

  // How far the pixel may go from x, in the direction in which it lies from there.
  static ATLAS_HD T room(T distance, T x, const PixelBounds<T>& r) {
    const T c = distance > T(0) ? r.hi - x : x - r.lo;
    return c < T(0) ? T(0) : c;
  }

  template <Sweep kSweep, Norm kNorm>
  ATLAS_HD Sums terms(T adv, T grad, T x, const PixelBounds<T>& r) const {
    if (kSweep == kGradient) {
      const double g = grad;
      return {kNorm == kL2 ? g * g : magnitude(g), 0.0};
    }
    const T d = moved(adv, grad) - x, m = magnitude(d);
    if (kNorm == kL2) return {double(d) * double(d), 0.0};
    const T c = room(d, x, r);
    if (kSweep == kDistance) return {m > c ? c : m, m};
    // What the pixel keeps of its distance: nothing, all but lambda, or as much as there is room.
    const T kept = m - shrink;
    const bool full = kept > c, some = kept > T(0);
    return {some ? full ? c : m : T(0), some && !full ? 1.0 : 0.0};
  }

  template <Norm kNorm> ATLAS_HD T written(T adv, T grad, T x, const PixelBounds<T>& r) const {
    const T v = moved(adv, grad);
    if (kNorm == kLinf) return clip(clip(v, x - eps, x + eps), r.lo, r.hi);
    const T d = v - x;
    T kept = d * shrink;
    if (kNorm == kL1) {
      const T m = clip(magnitude(d) - shrink, T(0), room(d, x, r));
      kept = d < T(0) ? -m : m;
    }
    return clip(projects ? x + kept : v, r.lo, r.hi);
  }

  // After a sweep: what it found out, and what comes next.
  ATLAS_HD void advance(const Sums& sums) {
    if (sweep == kGradient) {
      aim(norm == kL2 ? std::sqrt(sums.a) : sums.a);
      sweep = double(eps) < kInfinite ? kDistance : kWrite;
      return;
    }
    if (sweep == kSearch) return search(sums);
    const double distance = norm == kL2 ? std::sqrt(sums.a) : sums.a, unclipped = norm == kL2 ? distance : sums.b;
    projects = distance > double(eps) && unclipped < kInfinite;
    sweep = kWrite;
    if (norm == kL2) {
      shrink = T(double(eps) / distance);
    } else if (projects) {
      high = T(sums.b);  // all of it, where nothing is left
      // As if every pixel lost lambda: too little, since some are used up and some have no room.
      shrink = low = T((distance - double(eps)) / double(dimensions));
      if (eps > T(0)) sweep = kSearch;
      else shrink = high;
    }
  }

  // A gradient of zero, or not finite, moves nothing.
  ATLAS_HD void aim(double length) {
    moves = length > 0.0 && length < kInfinite;
    const int found = int(bit_cast<uint64_t>(length) >> 52) - 1023;
    const int exponent = found < -126 ? -126 : found > 126 ? 126 : found;
    const double power = bit_cast<double>(uint64_t(1023 - exponent) << 52);
    scale = T(power);
    factor = T(double(step) / (length * power));
  }

  // What is kept falls piecewise linearly with lambda. Newton's method inside the bracket, then bisection, until the root
  // of the piece at lambda is lambda, or nothing is left between the ends.
  ATLAS_HD void search(const Sums& sums) {
    const T root = T((sums.a - double(eps)) / sums.b);
    (sums.a - sums.b * double(shrink) > double(eps) ? low : high) = shrink;
    const T middle = low + (high - low) * T(0.5);
    const bool inside = root > low && root < high;
    if (root == shrink || middle == low || middle == high || ++searched == kSearchSweeps) {
      shrink = root >= low && root <= high ? root : high;
      sweep = kWrite;
    } else {
      shrink = inside && searched <= kNewtonSweeps ? root : middle;
    }
  }
};

}  // namespace atlas
