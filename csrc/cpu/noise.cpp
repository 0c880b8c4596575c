#include "noise.h"

#include "isa.h"

#if ATLAS_X86
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header
#endif
#endif

namespace atlas::cpu {
namespace {

// One 32-bit counter word in each 64-bit lane; what collects above it is never read.
#if ATLAS_X86
#define ATLAS_TARGET
struct LanesBaseline {
  using V = __m128i;
  static constexpr int kCount = 2;
  static inline V set1(uint64_t a) { return _mm_set1_epi64x(int64_t(a)); }
  static inline V iota() { return _mm_set_epi64x(1, 0); }
  static inline V add(V a, V b) { return _mm_add_epi64(a, b); }
  static inline V mul(V a, V b) { return _mm_mul_epu32(a, b); }
  static inline V mix(V high, V b, V key) { return _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(high, 32), b), key); }
  static inline V pair(V a, V b) {  // a in the low, b in the high half of each lane
    return _mm_or_si128(_mm_and_si128(a, _mm_set1_epi64x(0xffffffff)), _mm_slli_epi64(b, 32));
  }
  static inline void store(uint32_t* to, V ab, V cd) {
    _mm_storeu_si128(reinterpret_cast<V*>(to), _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128(reinterpret_cast<V*>(to + 4), _mm_unpackhi_epi64(ab, cd));
  }
};
#define ATLAS_LANES LanesBaseline
#define ATLAS_FILL fill_baseline
#include "noise_lanes.inc"

#define ATLAS_TARGET ATLAS_TARGET_V3
struct LanesV3 {
  using V = __m256i;
  static constexpr int kCount = 4;
  static ATLAS_TARGET inline V set1(uint64_t a) { return _mm256_set1_epi64x(int64_t(a)); }
  static ATLAS_TARGET inline V iota() { return _mm256_set_epi64x(3, 2, 1, 0); }
  static ATLAS_TARGET inline V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static ATLAS_TARGET inline V mul(V a, V b) { return _mm256_mul_epu32(a, b); }
  static ATLAS_TARGET inline V mix(V high, V b, V key) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(high, 32), b), key);
  }
  static ATLAS_TARGET inline V pair(V a, V b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA); }
  static ATLAS_TARGET inline void store(uint32_t* to, V ab, V cd) {
    const V low = _mm256_unpacklo_epi64(ab, cd), high = _mm256_unpackhi_epi64(ab, cd);
    _mm256_storeu_si256(reinterpret_cast<V*>(to), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<V*>(to + 8), _mm256_permute2x128_si256(low, high, 0x31));
  }
};
#define ATLAS_LANES LanesV3
#define ATLAS_FILL fill_v3
#include "noise_lanes.inc"

#define ATLAS_TARGET ATLAS_TARGET_V4
struct LanesV4 {
  using V = __m512i;
  static constexpr int kCount = 8;
  static ATLAS_TARGET inline V set1(uint64_t a) { return _mm512_set1_epi64(int64_t(a)); }
  static ATLAS_TARGET inline V iota() { return _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0); }
  static ATLAS_TARGET inline V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static ATLAS_TARGET inline V mul(V a, V b) { return _mm512_mul_epu32(a, b); }
  static ATLAS_TARGET inline V mix(V high, V b, V key) {
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(high, 32), b, key, 0x96);  // a ^ b ^ c
  }
  static ATLAS_TARGET inline V pair(V a, V b) { return _mm512_mask_blend_epi32(0xAAAA, a, _mm512_slli_epi64(b, 32)); }
  static ATLAS_TARGET inline void store(uint32_t* to, V ab, V cd) {
    const V low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(ab, low, cd));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(ab, high, cd));
  }
};
#define ATLAS_LANES LanesV4
#define ATLAS_FILL fill_v4
#include "noise_lanes.inc"
#else
void fill_baseline(uint32_t* words, const NoiseCounter& counter, uint32_t first, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    const Words4 four = counter.group(first + uint32_t(g));
    for (int j = 0; j < 4; ++j) words[4 * g + j] = four.w[j];
  }
}
#endif

}  // namespace

FillWords fill_words() {
#if ATLAS_X86
  static constexpr FillWords table[] = {fill_baseline, fill_v3, fill_v4};
  return table[current_isa()];
#else
  return fill_baseline;
#endif
}

}  // namespace atlas::cpu
