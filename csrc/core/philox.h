// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011) and the exact
// uniform map. Counter-based: the noise of a pixel is a function of what the pixel IS (seed, sample, channel, place),
// never of the thread or the batch that computes it. The counter words are laid out in NoiseCounter.
#pragma once
#include "platform.h"

namespace atlas {

struct Words4 { uint32_t w[4]; };

ATLAS_HD uint64_t mul_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));  // of the plain form nvcc makes twice the code
  return product;
#else
  return uint64_t(a) * b;
#endif
}

ATLAS_HD Words4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = mul_wide(c0, kMul0), p1 = mul_wide(c2, kMul1);
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// [-1, 1) on a grid of 2^-23: shift, conversion and product are all exact, so no compiler is free to differ.
template <class T> ATLAS_HD T uniform(uint32_t word) { return T(int32_t(word) >> 8) * T(0x1p-23); }

// An integer in [0, bound), by multiply-high: no value is more than 2^-32 likelier than another.
ATLAS_HD uint32_t below(uint32_t word, uint32_t bound) { return uint32_t(mul_wide(word, bound) >> 32); }

// One sample's place in the counter space: word 0 is left for the group of four pixels. `stream` says who draws, so that
// two kinds of noise of one attack never share words (atlas_kernels/noise.py numbers them).
struct NoiseCounter {
  uint32_t k0, k1, c1, c2, c3;

  ATLAS_HD NoiseCounter(int64_t seed, int64_t sample, uint32_t draw, uint32_t stream, uint32_t neighbour)
      : k0(uint32_t(uint64_t(seed))), k1(uint32_t(uint64_t(seed) >> 32)), c1(uint32_t(uint64_t(sample))), c2(draw),
        c3(stream | neighbour << 8) {}

  ATLAS_HD Words4 group(uint32_t c0) const { return philox4x32_10(c0, c1, c2, c3, k0, k1); }
};

// Groups of four pixels in one channel plane: a plane's last group may be partly used.
ATLAS_HD int64_t groups_per_plane(int64_t pixels) { return (pixels + 3) / 4; }

}  // namespace atlas
