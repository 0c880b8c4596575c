// l2 and l1 geometry of ONE sample: its pixels are swept a few times, each sweep but the last adds up two sums, and
// these say what the next one is. See atlas_kernels/perturb_norms.py for the operators.
#pragma once
#include <cmath>

#include "../api.h"
#include "platform.h"

namespace atlas {

enum Norm : int32_t { kLinf = 0, kL2 = 1, kL1 = 2 };
// What a step may be besides: in l1 sparse (of templates alone), or along the signs of the largest entries; in l2 with
// momentum. The last two are APGD's.
constexpr Norm kSparseL1 = Norm(3), kSignL1 = Norm(4), kMomentumL2 = Norm(5);
ATLAS_HD constexpr bool is_l1(Norm norm) { return norm == kL1 || norm == kSparseL1 || norm == kSignL1; }
ATLAS_HD constexpr bool is_l2(Norm norm) { return norm == kL2 || norm == kMomentumL2; }

ATLAS_HD Norm step_of(const AtlasPerturbNorms& p) {
  return !p.old.data ? Norm(p.norm) : p.norm == kL1 ? kSignL1 : kMomentumL2;
}

// How many of the largest entries an l1 step of a sample moves; 0: all, along the gradient.
ATLAS_HD int64_t largest_of(const AtlasPerturbNorms& p, int64_t sample) {
  if (p.norm != kL1) return 0;
  if (!p.old.data) return p.largest;
  const int64_t asked = p.largest_rows[sample], most = p.channels * p.pixels;
  return asked < 1 ? 1 : asked > most ? most : asked;
}

// A start is around its own images.
inline AtlasPerturbNorms with_centre(AtlasPerturbNorms p) {
  if (!p.x.data) p.x = p.adv;
  return p;
}

inline int status_of(const AtlasPerturbNorms& p) {
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0) return ATLAS_BAD_SIZE;
  const bool moves = p.grad.data || p.key;  // which has no linear form here
  if (p.old.data && (!p.grad.data || p.key || (p.norm == kL1 && !p.largest_rows))) return ATLAS_REFUSED;
  const bool known = p.norm >= (moves ? kL2 : kLinf) && p.norm <= kL1;
  return known && p.largest >= 0 && p.largest <= p.channels * p.pixels ? ATLAS_OK : ATLAS_REFUSED;
}

enum Sweep : int32_t { kGradient, kSelect, kDistance, kSearch, kCarry, kWrite };

// In fp64, where squares of fp32 are exact and neither over- nor underflow, so that no sweep for a maximum is needed and
// the order of the additions hardly ever shows in a result that is rounded to fp32.
struct Sums { double a, b; };

template <class T> struct PixelBounds { T lo, hi; };

constexpr double kInfinite = __builtin_huge_val();
constexpr int kNewtonSweeps = 16, kSearchSweeps = 80;

template <class T> ATLAS_HD T magnitude(T v) { return v < T(0) ? -v : v; }

template <class T> struct bits_of_type { using type = uint32_t; };
template <> struct bits_of_type<double> { using type = uint64_t; };

template <class T> struct NormStep {
  using Bits = typename bits_of_type<T>::type;
  // Sums of fp64 distances and of their squares may leave the range of fp64: the second sum is scaled by these.
  static constexpr double kDown = sizeof(T) == 4 ? 1.0 : 0x1p-64, kFarDown = sizeof(T) == 4 ? 1.0 : 0x1p-600;

  Norm norm;
  Sweep sweep;
  int64_t dimensions, largest;  // largest: see largest_of
  T eps, step, momentum;  // step < 0 descends
  // Known after the gradient: the pixel moves by (grad scale) factor. The scale is a power of two, exact.
  T scale = T(1), factor = T(0);
  bool moves = false;
  // A sparse step: entries from `whole` on go as far as they can, at most `share`; those from `from` on (ties) go by
  // `part` of that. The bits of the threshold lie in [least, most): from it on, entries can go the step or more in all.
  T share = T(0), from = T(0), whole = T(0), part = T(0);
  Bits least = 0, most = 0;
  // Known after the distance: what it is multiplied with (l2), or what each pixel's loses (l1), over `base`.
  T shrink = T(1), base = T(0);
  bool projects = false;
  // With momentum: the same of the step alone.
  T step_shrink = T(1);
  bool step_projects = false;
  // The root of the l1 search lies in [low, high].
  T low = T(0), high = T(0);
  int searched = 0;

  static ATLAS_HD T of_bits(Bits bits) { return bit_cast<T>(bits); }
  static ATLAS_HD Bits bits_of(T v) { return bit_cast<Bits>(v); }

  // How far a sparse step may take an entry: its share, or up to the end of the range.
  ATLAS_HD T reach(T adv, T grad, const PixelBounds<T>& r) const {
    T c = along(grad) > T(0) ? r.hi - adv : adv - r.lo;
    c = c < share ? c : share;
    c = c > T(0) ? c : T(0);
    return grad != T(0) ? c : T(0);  // selects alone, which compilers make vectors of
  }

  ATLAS_HD T along(T grad) const { return step < T(0) ? -grad : grad; }

  template <Norm kNorm> ATLAS_HD T moved(T adv, T grad, const PixelBounds<T>& r) const {
    T v = adv + grad * scale * factor;
    if (kNorm == kSignL1) {
      const T up = adv + share, down = adv - share, by_sign = along(grad) > T(0) ? up : down;
      v = magnitude(grad) >= from ? by_sign : adv;
    }
    if (kNorm == kSparseL1) {
      const T m = magnitude(grad), c = reach(adv, grad, r);
      const T shared = c * part, tied = m >= from ? shared : T(0), way = m >= whole ? c : tied;
      const T up = adv + way, down = adv - way, sparse = along(grad) > T(0) ? up : down;
      v = share > T(0) ? sparse : v;
    }
    return moves ? v : adv;
  }

  // Where the step and momentum take the pixel.
  ATLAS_HD T carried(T adv, T old, T grad, T x, const PixelBounds<T>& r) const {
    const T v = moved<kL2>(adv, grad, r), inside = x + (v - x) * step_shrink;
    const T way = clip(step_projects ? inside : v, r.lo, r.hi) - adv, before = adv - old;
    return adv + way * momentum + before * (T(1) - momentum);
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
      return {is_l2(kNorm) ? g * g : magnitude(g), 0.0};
    }
    if (kSweep == kSelect) {
      const T m = magnitude(grad), c = kNorm == kSignL1 ? T(1) : reach(adv, grad, r);
      return {m >= from ? c : T(0), m >= whole ? c : T(0)};
    }
    return away<kSweep, kNorm>(moved<kNorm>(adv, grad, r), x, r);
  }

  // The terms of a pixel at v.
  template <Sweep kSweep, Norm kNorm> ATLAS_HD Sums away(T v, T x, const PixelBounds<T>& r) const {
    const T d = v - x, m = magnitude(d);
    if (is_l2(kNorm)) return {double(d) * double(d), double(d) * kFarDown * (double(d) * kFarDown)};
    const T c = room(d, x, r);
    if (kSweep == kDistance) return {m > c ? c : m, double(m) * kDown};
    // What the pixel keeps of its distance: nothing, all but lambda, or as much as there is room.
    const double kept = (double(m) - double(base)) - double(shrink);
    const bool full = kept > double(c), some = kept > 0.0;
    return {some ? full ? double(c) : kept : 0.0, some && !full ? 1.0 : 0.0};
  }

  template <Norm kNorm> ATLAS_HD T written(T adv, T grad, T x, const PixelBounds<T>& r) const {
    return brought<kNorm>(moved<kNorm>(adv, grad, r), x, r);
  }

  // A pixel at v, projected.
  template <Norm kNorm> ATLAS_HD T brought(T v, T x, const PixelBounds<T>& r) const {
    if (kNorm == kLinf) return clip(clip(v, x - eps, x + eps), r.lo, r.hi);
    const T d = v - x;
    T kept = d * shrink;
    if (is_l1(kNorm)) {
      const T m = clip((magnitude(d) - base) - shrink, T(0), room(d, x, r));
      kept = d < T(0) ? -m : m;
    }
    return clip(projects ? x + kept : v, r.lo, r.hi);
  }

  // After a sweep: what it found out, and what comes next.
  ATLAS_HD void advance(const Sums& sums) {
    if (sweep == kSearch) return search(sums);
    if (sweep == kDistance || sweep == kCarry) return measure(sums);
    if (sweep == kGradient) aim(is_l2(norm) ? std::sqrt(sums.a) : sums.a);
    else narrow(sums);
    if (sweep != kSelect) sweep = double(eps) < kInfinite ? kDistance : kWrite;
  }

  // A gradient of zero, or not finite, moves nothing.
  ATLAS_HD void aim(double length) {
    moves = length > 0.0 && length < kInfinite;
    if (moves && largest > 0) return begin(length);
    const int found = int(bit_cast<uint64_t>(length) >> 52) - 1023;
    const int exponent = found < -126 ? -126 : found > 126 ? 126 : found;
    const double power = bit_cast<double>(uint64_t(1023 - exponent) << 52);
    scale = T(power);
    factor = T(double(step) / (length * power));
  }

  ATLAS_HD void begin(double length) {
    share = T(double(magnitude(step)) / double(largest));
    moves = share > T(0);
    least = norm == kSignL1;  // no entry of 0
    most = bits_of(T(length)) + 1;  // no entry is larger
    if (moves) try_between();
  }

  // A search over the bits of the threshold, two candidates a sweep; the last one is over its ends.
  ATLAS_HD void narrow(const Sums& sums) {
    // Not |step|: so many whole shares add up to it exactly. Of signs it is entries that are counted.
    const double budget = norm == kSignL1 ? double(largest) : double(share) * double(largest);
    sweep = kGradient;
    if (sums.a == budget || sums.b == budget) {
      from = whole = sums.b == budget ? whole : from;
    } else if (most - least == 1 && norm == kSignL1) {
      share = T(double(magnitude(step)) / sums.a);  // as many as tie, or as there are
    } else if (most - least == 1) {
      part = T(sums.a > sums.b ? (budget - sums.b) / (sums.a - sums.b) : 0.0);
    } else {
      if (sums.a >= budget) least = bits_of(sums.b >= budget ? whole : from);
      if (sums.b < budget) most = bits_of(sums.a >= budget ? whole : from);
      try_between();
    }
  }

  ATLAS_HD void try_between() {
    const Bits third = (most - least) / 3, ends = most - least == 1;
    from = of_bits(ends ? least : least + (third ? third : 1));
    whole = of_bits(ends ? most : most - third);
    sweep = kSelect;
  }

  ATLAS_HD void measure(const Sums& sums) {
    const bool finite = sums.b < kInfinite;
    double distance = sums.a;
    if (is_l2(norm)) distance = distance < kInfinite ? std::sqrt(distance) : std::sqrt(sums.b) / kFarDown;
    projects = distance > double(eps) && finite;
    const bool carries = norm == kMomentumL2 && sweep == kDistance;
    sweep = carries ? kCarry : kWrite;
    if (is_l2(norm)) {
      shrink = T(double(eps) / distance);
      if (carries) step_shrink = shrink, step_projects = projects;
    } else if (projects) {
      high = T(sums.b / kDown);  // all of it, where nothing is left
      // As if every pixel lost lambda: too little, since some are used up and some have no room.
      const T least = distance < kInfinite ? T((distance - double(eps)) / double(dimensions)) : T(0);
      shrink = low = least > T(0) ? of_bits(bits_of(least) - 1) : T(0);  // rounding may have taken it past the root
      if (eps > T(0)) sweep = kSearch;
      else shrink = high;
    }
  }

  // What is kept falls piecewise linearly with lambda. Newton's method inside the bracket, then bisection (of the bits),
  // until the root of the piece at lambda is lambda, or nothing is left between the ends. Where lambda is so large that
  // its rounding would show in what is kept, the search goes on below the upper end: there the distances are exact.
  ATLAS_HD void search(const Sums& sums) {
    const double excess = sums.a - double(eps);
    const T root = T(double(shrink) + excess / sums.b);
    (excess > 0.0 ? low : high) = shrink;
    const bool fine = base > T(0), coarse = !fine && double(shrink) * double(dimensions) > 256.0 * double(eps);
    const T size = of_bits((bits_of(magnitude(low)) + bits_of(magnitude(high))) / 2), middle = fine ? -size : size;
    const bool inside = root > low && root < high;
    if ((root == shrink && !coarse) || middle == low || middle == high || ++searched == kSearchSweeps) {
      if (coarse) {
        base = high, low = low - high, high = T(0), searched = 0;
        shrink = -of_bits(bits_of(magnitude(low)) / 2);
      } else {
        shrink = root >= low && root <= high ? root : high;
        sweep = kWrite;
      }
    } else if (root == shrink) {
      shrink = of_bits(bits_of(shrink) + (excess > 0.0 ? 1 : -1));
    } else {
      shrink = inside && searched <= kNewtonSweeps ? root : middle;
    }
  }
};

}  // namespace atlas
