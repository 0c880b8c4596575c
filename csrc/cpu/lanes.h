// Vectors of numbers, for code that computes in lanes: what a compiler lowers to the registers of each instruction set.
#pragma once
#include "../core/math.h"
#include "isa.h"

namespace atlas::cpu {

template <class T, int Lanes> struct vector;
// As many lanes as a register of the instruction set holds.
template <class T, Isa isa> constexpr int kLanes = (isa == kV4 ? 64 : isa == kV3 ? 32 : 16) / int(sizeof(T));

}  // namespace atlas::cpu

#define ATLAS_VECTOR(Name, IntName, Scalar_, Int_, Count)                                                        \
  namespace atlas::cpu {                                                                                         \
  typedef Scalar_ Name __attribute__((vector_size(Count * sizeof(Scalar_))));                                    \
  typedef Int_ IntName __attribute__((vector_size(Count * sizeof(Scalar_))));                                    \
  template <> struct vector<Scalar_, Count> { using type = Name; };                                              \
  }                                                                                                              \
  template <> struct atlas::lanes_of<atlas::cpu::Name> { using Scalar = Scalar_; using Int = cpu::IntName; };    \
  template <> struct atlas::lanes_of<atlas::cpu::IntName> { using Scalar = Int_; using Int = cpu::IntName; };
ATLAS_VECTOR(float4, int4, float, int32_t, 4)
ATLAS_VECTOR(float8, int8, float, int32_t, 8)
ATLAS_VECTOR(float16, int16, float, int32_t, 16)
ATLAS_VECTOR(double2, long2, double, int64_t, 2)
ATLAS_VECTOR(double4, long4, double, int64_t, 4)
ATLAS_VECTOR(double8, long8, double, int64_t, 8)
#undef ATLAS_VECTOR

namespace atlas {

// libm, lane after lane.
template <class V> struct math<V, double> {
  static constexpr int kCount = sizeof(V) / sizeof(double);
  static ATLAS_HD V exp(V x) {
    for (int l = 0; l < kCount; ++l) x[l] = ::exp(x[l]);
    return x;
  }
  static ATLAS_HD V exp_of_negative(V x) { return exp(x); }
  static ATLAS_HD V log(V x) {
    for (int l = 0; l < kCount; ++l) x[l] = ::log(x[l]);
    return x;
  }
};

namespace cpu {

// v with its lanes exchanged: lane l has what lane l ^ Step had.
template <int Step, class V> ATLAS_HD V exchanged(V v) {
  constexpr int kCount = sizeof(V) / sizeof(scalar_of<V>);
#if defined(__clang__)
  V other;
  for (int l = 0; l < kCount; ++l) other[l] = v[l ^ Step];
  return other;
#else
  int_of<V> from;
  for (int l = 0; l < kCount; ++l) from[l] = l ^ Step;
  return __builtin_shuffle(v, from);
#endif
}

// Lane l of a where `from` says l, of b where it says kCount + l.
template <class V> ATLAS_HD V merged(V a, V b, int_of<V> from) {
#if defined(__clang__)
  constexpr int kCount = sizeof(V) / sizeof(scalar_of<V>);
  V both;
  for (int l = 0; l < kCount; ++l) both[l] = from[l] < kCount ? a[from[l]] : b[from[l] - kCount];
  return both;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// A square of vectors, rows for columns: squares of Step are exchanged across the diagonal, then smaller ones.
template <int Step, int N, class V> ATLAS_HD void transpose(V (&v)[N]) {
  int_of<V> low = {}, high = {};
  for (int l = 0; l < N; ++l) {
    low[l] = l & Step ? N + l - Step : l;
    high[l] = l & Step ? N + l : l + Step;
  }
  ATLAS_UNROLL for (int i = 0; i < N; ++i)
    if (!(i & Step)) {
      const V a = v[i], b = v[i + Step];
      v[i] = merged(a, b, low), v[i + Step] = merged(a, b, high);
    }
  if constexpr (Step > 1) transpose<Step / 2>(v);
}

// Folds a vector over its lanes; all lanes of the result are the same. The order does not depend on anything.
template <class Combine, int Step, class V> ATLAS_HD V fold(V v) {
  v = Combine::of(v, exchanged<Step>(v));
  if constexpr (Step > 1) return fold<Combine, Step / 2>(v);
  else return v;
}
template <class Combine, class V> ATLAS_HD V fold(V v) {
  return fold<Combine, int(sizeof(V) / sizeof(scalar_of<V>)) / 2>(v);
}

struct Sum {
  template <class V> static ATLAS_HD V of(V a, V b) { return a + b; }
};
struct Max {
  template <class V> static ATLAS_HD V of(V a, V b) { return a > b ? a : b; }
};
struct Min {
  template <class V> static ATLAS_HD V of(V a, V b) { return a < b ? a : b; }
};

}  // namespace cpu
}  // namespace atlas
