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
  template <> struct atlas::lanes_of<atlas::cpu::IntName> { using Scalar = Int_; };
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
  static ATLAS_HD V log(V x) {
    for (int l = 0; l < kCount; ++l) x[l] = ::log(x[l]);
    return x;
  }
};

namespace cpu {

// Folds a vector over its lanes; all lanes of the result are the same. The order does not depend on anything.
template <class V, class Combine> ATLAS_HD V fold(V v, Combine&& combine) {
  constexpr int kCount = sizeof(V) / sizeof(scalar_of<V>);
  for (int step = kCount / 2; step > 0; step /= 2) {
    V other;
    for (int l = 0; l < kCount; ++l) other[l] = v[l ^ step];
    v = combine(v, other);
  }
  return v;
}

}  // namespace cpu
}  // namespace atlas
