// exp and log without branches and without libm, so that loops over them vectorise and a CPU and a GPU get the same
// bits: fp32 within 1 ulp of the exact value. Written over V, one number or a vector of them; fp64 uses libm.
#pragma once
#include <cmath>

#include "platform.h"

namespace atlas {

// V's element type, and integers of its size (and as many).
template <class V> struct lanes_of;
template <> struct lanes_of<float> { using Scalar = float; using Int = int32_t; };
template <> struct lanes_of<double> { using Scalar = double; using Int = int64_t; };
template <> struct lanes_of<int32_t> { using Scalar = int32_t; using Int = int32_t; };
template <> struct lanes_of<int64_t> { using Scalar = int64_t; using Int = int64_t; };
template <class V> using scalar_of = typename lanes_of<V>::Scalar;
template <class V> using int_of = typename lanes_of<V>::Int;

// The same number in all lanes.
template <class V> ATLAS_HD V all(scalar_of<V> s) { return s - V{}; }

// Whole numbers up to 2^22 to fp32: 1.5 * 2^23 has them in its last bits.
template <class V> ATLAS_HD V whole(int_of<V> k) { return bit_cast<V>(k + 0x4b400000) - 12582912.0f; }

template <class V> ATLAS_HD V exp_fp32(V x) {
  x = x < all<V>(-104.0f) ? all<V>(-104.0f) : x;
  x = x > all<V>(89.0f) ? all<V>(89.0f) : x;
  const int_of<V> k = bit_cast<int_of<V>>(x * 1.44269504f + 12582912.0f) - 0x4b400000;
  const V n = whole<V>(k);
  // r = x - n ln 2, with what its rounding loses. The first product and difference are exact.
  const V high = x - n * 0.693359375f, low = n * -2.12194440e-4f;
  const V r = high - low, lost = (high - r) - low;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const V one_r = 1.0f + r;
  const V y = one_r + ((r - (one_r - 1.0f)) + (r * r * p + lost));
  // In two factors, for results that are subnormal or just finite.
  const int_of<V> half = k >> 1;
  return y * bit_cast<V>((half + 127) << 23) * bit_cast<V>((k - half + 127) << 23);
}

// For x <= 0, as a softmax has them: what would be subnormal is 0, and no more care is taken than 1 ulp needs.
template <class V> ATLAS_HD V exp_of_negative_fp32(V x) {
  const V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const V r = n * 2.12194440e-4f + (n * -0.693359375f + x);
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const V y = (r * r * p + r) + 1.0f;
  const V power = bit_cast<V>((bit_cast<int_of<V>>(shifted) - (0x4b400000 - 127)) << 23);
  return x < -87.33654f ? V{} : y * power;
}

template <class V> ATLAS_HD V log_fp32(V x) {
  const V tiny = all<V>(0x1p-126f), inf = all<V>(HUGE_VALF);
  const V scaled = x < tiny ? x * 0x1p23f : x;
  // x = 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2).
  const int_of<V> bits = bit_cast<int_of<V>>(scaled), above = bits - 0x3f3504f3, k = above >> 23;
  const V f = bit_cast<V>(bits - (above & -0x800000)) - 1.0f;
  const V n = whole<V>(k) - (x < tiny ? all<V>(23.0f) : all<V>(0.0f));
  V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const V ff = f * f, tail = (f * ff * p + n * -2.12194440e-4f) - ff * 0.5f;
  const V high = n * 0.693359375f, sum = high + f;
  V y = sum + ((f - (sum - high)) + tail);
  y = x < inf ? y : x;  // inf and NaN
  y = x > 0.0f ? y : (x == 0.0f ? -inf : x - x + all<V>(NAN));
  return x == x ? y : x;
}

template <class V, class S = scalar_of<V>> struct math {
  static ATLAS_HD V exp(V x) { return exp_fp32(x); }
  static ATLAS_HD V exp_of_negative(V x) { return exp_of_negative_fp32(x); }
  static ATLAS_HD V log(V x) { return log_fp32(x); }
};
template <> struct math<double, double> {
  static ATLAS_HD double exp(double x) { return ::exp(x); }
  static ATLAS_HD double exp_of_negative(double x) { return ::exp(x); }
  static ATLAS_HD double log(double x) { return ::log(x); }
};

template <class V> ATLAS_HD V exp(V x) { return math<V>::exp(x); }
template <class V> ATLAS_HD V exp_of_negative(V x) { return math<V>::exp_of_negative(x); }
template <class V> ATLAS_HD V log(V x) { return math<V>::log(x); }

// log(1 + x) for x > -1/2: the logarithm of the rounded sum, corrected for the rounding.
template <class V> ATLAS_HD V log1p(V x) {
  const V u = x + scalar_of<V>(1), lost = (x - (u - scalar_of<V>(1))) / u;
  return log(u) + (lost == lost ? lost : V{});
}

// exp(x) - 1 for x < 1/2. Between -1/2 and 1/2 by its series, which keeps the digits of a small x.
template <class V> ATLAS_HD V expm1(V x) {
  using T = scalar_of<V>;
  constexpr int kTerms = sizeof(T) == 8 ? 14 : 8;
  V series = all<V>(1);
  for (int k = kTerms; k > 1; --k) series = series * x * T(1.0 / k) + T(1);
  return (x > all<V>(-0.5)) & (x < all<V>(0.5)) ? x * series : exp_of_negative(x) - T(1);
}

}  // namespace atlas
