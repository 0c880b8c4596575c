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

#if ATLAS_X86
#define ATLAS_INLINE inline __attribute__((always_inline))

// Whether a radius times 2^-23 is exact: it is no denormal number.
inline bool scales_exactly(float radius) { return radius == 0 || !(radius < 0x1p-103f && radius > -0x1p-103f); }

// V: one 32-bit counter word in each 64-bit lane; what collects above it is never read. low() and high() of the words'
// pairs leave the groups in order because groups() numbers them so. F: floats.
#define ATLAS_TARGET
struct LanesBaseline {
  using V = __m128i;
  using F = __m128;
  static constexpr int kCount = 2, kChains = 4;
  static ATLAS_INLINE V set1(uint64_t a) { return _mm_set1_epi64x(int64_t(a)); }
  static ATLAS_INLINE V groups() { return _mm_set_epi64x(1, 0); }
  static ATLAS_INLINE V add(V a, V b) { return _mm_add_epi64(a, b); }
  static ATLAS_INLINE V mul(V a, V b) { return _mm_mul_epu32(a, b); }
  static ATLAS_INLINE V both(V a, V b) { return _mm_xor_si128(a, b); }
  static ATLAS_INLINE V mix(V p, V key) { return both(_mm_srli_epi64(p, 32), key); }
  static ATLAS_INLINE V mix(V p, V b, V key) { return both(mix(p, b), key); }
  static ATLAS_INLINE V last(V p, V b, V key) {  // mix() in the low, p's low half in the high half of each lane
    const V word = _mm_and_si128(both(b, key), _mm_set1_epi64x(0xffffffff));
    return both(_mm_shuffle_epi32(p, 0xB1), word);
  }
  static ATLAS_INLINE V low(V ab, V cd) { return _mm_unpacklo_epi64(ab, cd); }
  static ATLAS_INLINE V high(V ab, V cd) { return _mm_unpackhi_epi64(ab, cd); }
  static ATLAS_INLINE void store(uint32_t* to, V v) { _mm_storeu_si128(reinterpret_cast<V*>(to), v); }
  static ATLAS_INLINE F signed24(V words) { return _mm_cvtepi32_ps(_mm_srai_epi32(words, 8)); }
  static ATLAS_INLINE F signed20(V words) { return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_slli_epi32(words, 12), 12)); }
  static ATLAS_INLINE F high12(V words) { return _mm_cvtepi32_ps(_mm_srli_epi32(words, 20)); }
  static ATLAS_INLINE F all(float a) { return _mm_set1_ps(a); }
  static ATLAS_INLINE F load(const float* from) { return _mm_loadu_ps(from); }
  static ATLAS_INLINE void store(float* to, F v) { _mm_storeu_ps(to, v); }
  static ATLAS_INLINE F plus(F a, F b) { return _mm_add_ps(a, b); }
  static ATLAS_INLINE F minus(F a, F b) { return _mm_sub_ps(a, b); }
  static ATLAS_INLINE F times(F a, F b) { return _mm_mul_ps(a, b); }
  static ATLAS_INLINE F by_sign(F g, F positive, F negative, F other) {
    const F above = _mm_cmpgt_ps(g, _mm_setzero_ps()), below = _mm_cmplt_ps(g, _mm_setzero_ps());
    const F chosen = _mm_or_ps(_mm_and_ps(above, positive), _mm_and_ps(below, negative));
    return _mm_or_ps(chosen, _mm_andnot_ps(_mm_or_ps(above, below), other));
  }
  static ATLAS_INLINE F max(F a, F b) { return _mm_max_ps(a, b); }
  static ATLAS_INLINE F min(F a, F b) { return _mm_min_ps(a, b); }
};
#define ATLAS_LANES LanesBaseline
#define ATLAS_WORDS WordsBaseline
#define ATLAS_FILL fill_baseline
#define ATLAS_NEAR NearBaseline
#define ATLAS_LABELS LabelsBaseline
#define ATLAS_DRAW draw_baseline
#include "noise_lanes.inc"

#define ATLAS_TARGET ATLAS_TARGET_V3
struct LanesV3 {
  using V = __m256i;
  using F = __m256;
  static constexpr int kCount = 4, kChains = 6;
  static ATLAS_TARGET ATLAS_INLINE V set1(uint64_t a) { return _mm256_set1_epi64x(int64_t(a)); }
  static ATLAS_TARGET ATLAS_INLINE V groups() { return _mm256_set_epi64x(3, 1, 2, 0); }
  static ATLAS_TARGET ATLAS_INLINE V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V mul(V a, V b) { return _mm256_mul_epu32(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V both(V a, V b) { return _mm256_xor_si256(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V mix(V p, V key) { return both(_mm256_srli_epi64(p, 32), key); }
  static ATLAS_TARGET ATLAS_INLINE V mix(V p, V b, V key) { return both(mix(p, b), key); }
  static ATLAS_TARGET ATLAS_INLINE V last(V p, V b, V key) {
    const V word = _mm256_blend_epi32(both(b, key), _mm256_setzero_si256(), 0xAA);
    return both(_mm256_shuffle_epi32(p, 0xB1), word);
  }
  static ATLAS_TARGET ATLAS_INLINE V low(V ab, V cd) { return _mm256_unpacklo_epi64(ab, cd); }
  static ATLAS_TARGET ATLAS_INLINE V high(V ab, V cd) { return _mm256_unpackhi_epi64(ab, cd); }
  static ATLAS_TARGET ATLAS_INLINE void store(uint32_t* to, V v) {
    _mm256_storeu_si256(reinterpret_cast<V*>(to), v);
  }
  static ATLAS_TARGET ATLAS_INLINE F signed24(V words) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 8)); }
  static ATLAS_TARGET ATLAS_INLINE F signed20(V words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 12), 12));
  }
  static ATLAS_TARGET ATLAS_INLINE F high12(V words) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 20)); }
  static ATLAS_TARGET ATLAS_INLINE F all(float a) { return _mm256_set1_ps(a); }
  static ATLAS_TARGET ATLAS_INLINE F load(const float* from) { return _mm256_loadu_ps(from); }
  static ATLAS_TARGET ATLAS_INLINE void store(float* to, F v) { _mm256_storeu_ps(to, v); }
  static ATLAS_TARGET ATLAS_INLINE F plus(F a, F b) { return _mm256_add_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F minus(F a, F b) { return _mm256_sub_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F times(F a, F b) { return _mm256_mul_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F by_sign(F g, F positive, F negative, F other) {
    const F below = _mm256_blendv_ps(other, negative, _mm256_cmp_ps(g, _mm256_setzero_ps(), _CMP_LT_OQ));
    return _mm256_blendv_ps(below, positive, _mm256_cmp_ps(g, _mm256_setzero_ps(), _CMP_GT_OQ));
  }
  static ATLAS_TARGET ATLAS_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
};
#define ATLAS_LANES LanesV3
#define ATLAS_WORDS WordsV3
#define ATLAS_FILL fill_v3
#define ATLAS_NEAR NearV3
#define ATLAS_LABELS LabelsV3
#define ATLAS_DRAW draw_v3
#include "noise_lanes.inc"

#define ATLAS_TARGET ATLAS_TARGET_V4
struct LanesV4 {
  using V = __m512i;
  using F = __m512;
  static constexpr int kCount = 8, kChains = 6;
  static ATLAS_TARGET ATLAS_INLINE V set1(uint64_t a) { return _mm512_set1_epi64(int64_t(a)); }
  static ATLAS_TARGET ATLAS_INLINE V groups() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
  static ATLAS_TARGET ATLAS_INLINE V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V mul(V a, V b) { return _mm512_mul_epu32(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V both(V a, V b) { return _mm512_xor_si512(a, b); }
  static ATLAS_TARGET ATLAS_INLINE V mix(V p, V key) { return both(_mm512_srli_epi64(p, 32), key); }
  static ATLAS_TARGET ATLAS_INLINE V mix(V p, V b, V key) {
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), b, key, 0x96);  // a ^ b ^ c
  }
  static ATLAS_TARGET ATLAS_INLINE V last(V p, V b, V key) {
    return _mm512_mask_ternarylogic_epi32(_mm512_rol_epi64(p, 32), 0x5555, b, key, 0x96);
  }
  static ATLAS_TARGET ATLAS_INLINE V low(V ab, V cd) { return _mm512_unpacklo_epi64(ab, cd); }
  static ATLAS_TARGET ATLAS_INLINE V high(V ab, V cd) { return _mm512_unpackhi_epi64(ab, cd); }
  static ATLAS_TARGET ATLAS_INLINE void store(uint32_t* to, V v) { _mm512_storeu_si512(to, v); }
  static ATLAS_TARGET ATLAS_INLINE F signed24(V words) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 8)); }
  static ATLAS_TARGET ATLAS_INLINE F signed20(V words) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 12), 12));
  }
  static ATLAS_TARGET ATLAS_INLINE F high12(V words) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 20)); }
  static ATLAS_TARGET ATLAS_INLINE F all(float a) { return _mm512_set1_ps(a); }
  static ATLAS_TARGET ATLAS_INLINE F load(const float* from) { return _mm512_loadu_ps(from); }
  static ATLAS_TARGET ATLAS_INLINE void store(float* to, F v) { _mm512_storeu_ps(to, v); }
  static ATLAS_TARGET ATLAS_INLINE F plus(F a, F b) { return _mm512_add_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F minus(F a, F b) { return _mm512_sub_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F times(F a, F b) { return _mm512_mul_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F by_sign(F g, F positive, F negative, F other) {
    const F below = _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ), negative);
    return _mm512_mask_mov_ps(below, _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_GT_OQ), positive);
  }
  static ATLAS_TARGET ATLAS_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static ATLAS_TARGET ATLAS_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
};
#define ATLAS_LANES LanesV4
#define ATLAS_WORDS WordsV4
#define ATLAS_FILL fill_v4
#define ATLAS_NEAR NearV4
#define ATLAS_LABELS LabelsV4
#define ATLAS_DRAW draw_v4
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

#if ATLAS_X86
template <bool Step, bool Project> static DrawNeighbour of_isa() {
  static constexpr DrawNeighbour table[] = {draw_baseline<NearBaseline<Step, Project>>, draw_v3<NearV3<Step, Project>>,
                                            draw_v4<NearV4<Step, Project>>};
  return table[current_isa()];
}

DrawNeighbour draw_neighbour(bool step, bool project) {
  if (step) return project ? of_isa<true, true>() : of_isa<true, false>();
  return project ? of_isa<false, true>() : of_isa<false, false>();
}

DrawNeighbour draw_label_start() {
  static constexpr DrawNeighbour table[] = {draw_baseline<LabelsBaseline>, draw_v3<LabelsV3>, draw_v4<LabelsV4>};
  return table[current_isa()];
}
#else
DrawNeighbour draw_neighbour(bool, bool) { return nullptr; }
DrawNeighbour draw_label_start() { return nullptr; }
#endif

}  // namespace atlas::cpu
