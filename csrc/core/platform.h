// What every other header stands on: the host/device macro, dtype tags, 16-bit conversions and the select-style clip.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(ATLAS_HD)
// Told by the build: always_inline under sanitizers takes minutes.
#elif defined(__CUDACC__)
#define ATLAS_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, so that a range body compiled for one instruction set pulls all of its callees along (cpu/isa.h).
#define ATLAS_HD inline __attribute__((always_inline))
#else
#define ATLAS_HD inline
#endif

namespace atlas {

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

struct half_t { uint16_t bits; };
struct bfloat16_t { uint16_t bits; };

ATLAS_HD int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : 2; }

template <class T> struct dtype_of;
template <> struct dtype_of<float> { static constexpr Dtype value = kFloat32; };
template <> struct dtype_of<double> { static constexpr Dtype value = kFloat64; };
template <> struct dtype_of<half_t> { static constexpr Dtype value = kFloat16; };
template <> struct dtype_of<bfloat16_t> { static constexpr Dtype value = kBFloat16; };

template <class To, class From> ATLAS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// To 16 bits: nearest, ties to even. Branch-free (selects only), so that loops over them vectorise; a GPU has
// instructions that do the same.
ATLAS_HD float to_float(bfloat16_t v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

ATLAS_HD bfloat16_t to_bfloat16(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded_by_hardware;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded_by_hardware) : "f"(v));
  return {rounded_by_hardware};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

ATLAS_HD float to_float(half_t v) {
#if defined(__CUDA_ARCH__)
  float exact;
  asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(v.bits));
  return exact;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;  // exponent bias 15 -> 127
  const uint32_t special = normal + 0x38000000u;            // inf and NaN keep an all-ones exponent
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

ATLAS_HD half_t to_half(float v) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded_by_hardware;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded_by_hardware) : "f"(v));
  return {rounded_by_hardware};
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lines the last bit up with 2^-24, the spacing of half's subnormals: the addition itself rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (magnitude >= 0x47800000u ? large : finite))};
#endif
}

template <class To, class From> struct convert_to;
template <class From> struct convert_to<float, From> {
  static ATLAS_HD float from(From v) { return to_float(v); }
};
template <> struct convert_to<float, float> { static ATLAS_HD float from(float v) { return v; } };
template <> struct convert_to<float, double> { static ATLAS_HD float from(double v) { return float(v); } };
template <class From> struct convert_to<double, From> {
  static ATLAS_HD double from(From v) { return double(convert_to<float, From>::from(v)); }
};
template <> struct convert_to<double, double> { static ATLAS_HD double from(double v) { return v; } };
template <class From> struct convert_to<half_t, From> {
  static ATLAS_HD half_t from(From v) { return to_half(float(v)); }
};
template <class From> struct convert_to<bfloat16_t, From> {
  static ATLAS_HD bfloat16_t from(From v) { return to_bfloat16(float(v)); }
};

template <class To, class From> ATLAS_HD To convert(From v) { return convert_to<To, From>::from(v); }

// Two's complement: a sample's number is an offset from any base, and only its low bits count.
ATLAS_HD int64_t wrapping_sum(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }

// Two selects on every backend: a NaN value passes, and a NaN bound does not clip.
template <class T> ATLAS_HD T clip(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

}  // namespace atlas
