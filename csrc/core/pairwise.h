// The weighted distance of ONE pair of features and its gradient. V is a number on the GPU and a vector of numbers on
// the CPU; I is what counts in the same width. See atlas_kernels/pairwise.py for the operator.
#pragma once
#include "../api.h"
#include "platform.h"

namespace atlas {

constexpr int64_t kPairColumns = 32;  // the fewest columns that one partial sum of the workspace covers

// With the weight of pairs of different classes, which is that of the scale.
inline AtlasPairwise with_other(AtlasPairwise p) {
  p.other = 1.0 - 1.0 / p.scale;
  return p;
}

inline int status_of(const AtlasPairwise& p) {
  if (p.batch < 0 || p.features < 0) return ATLAS_BAD_SIZE;
  return p.scale != 0 && p.blocks * kPairColumns >= p.features ? ATLAS_OK : ATLAS_REFUSED;
}

template <class T> struct count_of;
template <> struct count_of<float> { using type = int32_t; };
template <> struct count_of<double> { using type = int64_t; };
template <class T> using Count = typename count_of<T>::type;

// What a pair weighs: as a number, and as a count with pairs of one class in the upper half and the others in the lower.
template <class T> struct PairWeight {
  T value;
  Count<T> count;
};

template <class T> ATLAS_HD PairWeight<T> pair_weight(bool same_class, T other) {
  return {same_class ? T(1) : other, same_class ? Count<T>(1) << 4 * sizeof(T) : Count<T>(1)};
}

template <class T, class I, class V> ATLAS_HD void clear_sign(V& v) {
  I bits;
  memcpy(&bits, &v, sizeof(V));
  bits &= ~(Count<T>(1) << (8 * sizeof(T) - 1));
  memcpy(&v, &bits, sizeof(V));
}

// Sums over the pairs of one feature `a`: of the distance, and of its derivative by `a`. The signs are counted, so their
// sum is exact in any order; fewer than 2^15 pairs fit. Ties and NaN have sign 0, as in torch.
template <class V, class I> struct L1Sum {
  V value;
  I slope;

  template <class T> ATLAS_HD void add(const V& a, const V& b, const PairWeight<T>& weight) {
    V distance = a - b;
    clear_sign<T, I>(distance);
    value += weight.value * distance;
    const I count = I{} + weight.count;
    slope = a > b ? slope + count : slope;
    slope = a < b ? slope - count : slope;
  }

  template <class C> static ATLAS_HD double weigh(C counts, double other) {
    const C others = sizeof(C) == 4 ? C(int16_t(counts)) : C(int32_t(counts));
    return double((counts - others) >> 4 * sizeof(C)) + other * double(others);
  }
};

template <class V, class I> struct SquaredSum {
  V value, slope;

  template <class T> ATLAS_HD void add(const V& a, const V& b, const PairWeight<T>& weight) {
    const V distance = a - b, weighted = weight.value * distance;
    value += weighted * distance;
    slope += weighted;
  }

  template <class C> static ATLAS_HD double weigh(C slope, double) { return 2.0 * double(slope); }
};

}  // namespace atlas
