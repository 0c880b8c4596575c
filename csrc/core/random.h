// Normal and Laplace numbers out of Philox words: as math.h, fp32 without branches and libm, fp64 with libm.
#pragma once
#include "math.h"
#include "philox.h"

namespace atlas {

// (0, 1] on a grid of 2^-24, exact: the logarithm is finite, and no normal number exceeds sqrt(48 log 2) = 5.77.
template <class T> ATLAS_HD T positive_uniform(uint32_t word) { return T(int32_t(word >> 8) + 1) * T(0x1p-24); }

template <class T> struct SinCos { T sin, cos; };

// Of pi u, for u in [-1, 1): the nearest quarter turn is taken off exactly, the rest is a Taylor series.
ATLAS_HD SinCos<float> sin_cos_pi(float u) {
  const int32_t quarter = int32_t(u * 2.0f + (u < 0.0f ? -0.5f : 0.5f));
  const float r = u - float(quarter) * 0.5f, r2 = r * r;
  float s = 8.21458866e-2f;
  s = s * r2 - 5.99264529e-1f;
  s = s * r2 + 2.55016404f;
  s = s * r2 - 5.16771278f;
  s = r * 3.14159265f + r * r2 * s;
  float c = -2.58068913e-2f;
  c = c * r2 + 2.35330630e-1f;
  c = c * r2 - 1.33526277f;
  c = c * r2 + 4.05871213f;
  c = c * r2 - 4.93480220f;
  c = 1.0f + r2 * c;
  const float sine = quarter & 1 ? c : s, cosine = quarter & 1 ? s : c;
  return {quarter & 2 ? -sine : sine, (quarter + 1) & 2 ? -cosine : cosine};
}

ATLAS_HD SinCos<double> sin_cos_pi(double u) {
#if defined(__CUDA_ARCH__)
  SinCos<double> found;
  sincospi(u, &found.sin, &found.cos);
  return found;
#else
  constexpr double kPi = 3.14159265358979323846;
  return {std::sin(kPi * u), std::cos(kPi * u)};
#endif
}

// Two standard normal numbers (Box & Muller 1958).
template <class T> ATLAS_HD void normal_pair(uint32_t w0, uint32_t w1, T& z0, T& z1) {
  const T radius = std::sqrt(T(-2) * log(positive_uniform<T>(w0)));
  const SinCos<T> at = sin_cos_pi(uniform<T>(w1));
  z0 = radius * at.cos;
  z1 = radius * at.sin;
}

// A standard exponential number, with the word's last bit, which its uniform does not use, as its sign.
template <class T> ATLAS_HD T laplace(uint32_t word) {
  const T e = log(positive_uniform<T>(word));
  return word & 1 ? e : -e;
}

// U^(1 / dimensions), U in (0, 1): how far from the centre a uniform point of a ball lies, as a share of the radius.
ATLAS_HD double ball_radius(uint32_t word, int64_t dimensions) {
  return exp(log((double(word) + 0.5) * 0x1p-32) / double(dimensions));
}

}  // namespace atlas
