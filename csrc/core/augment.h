// The augmentation of ONE sample: where its crop lies and whether it is mirrored; and of ONE pixel: its value. See
// atlas_kernels/augment.py for the op.
#pragma once
#include <initializer_list>

#include "../api.h"
#include "philox.h"

namespace atlas {

// u / 255, rounded once. In fp32 without a division: 0x1.01p-8 has 9 bits, so its product is exact, and the rest of
// 1/255 is so small that only the sum is left to round.
template <class T> ATLAS_HD T dequantise(uint8_t u);
template <> ATLAS_HD float dequantise<float>(uint8_t u) {
  const float v = float(u);
  return v * 0x1.01p-8f + v * 0x1.010102p-24f;
}
template <> ATLAS_HD double dequantise<double>(uint8_t u) { return double(u) / 255.0; }

template <class T> ATLAS_HD T normalised(T v, T mean, T std) { return (v - mean) / std; }

// Is there anything to subtract or to divide by?
inline bool normalises(const AtlasAugment& p) {
  return p.mean.per_row || p.std.per_row || p.mean.value != 0.0 || p.std.value != 1.0;
}

// The crop of one sample: pixel (0, 0) of the crop, not mirrored, is pixel (top, left) of the unpadded image.
struct Window {
  int64_t top, left;
  bool mirrored;

  // The row or column of the image, or one outside it.
  ATLAS_HD int64_t row(int64_t i) const { return top + i; }
  ATLAS_HD int64_t column(int64_t j, int64_t crop_width) const { return left + (mirrored ? crop_width - 1 - j : j); }
};

// Offsets that a crop may have along one side.
ATLAS_HD int64_t positions(int64_t size, int64_t padding, int64_t crop) { return size + 2 * padding - crop + 1; }

ATLAS_HD Window draw_window(const AtlasAugment& p, int64_t seed, int64_t sample) {
  Window at = {-p.padding, -p.padding, false};
  if (!p.key) return at;
  const Words4 words = NoiseCounter(seed, sample, p.draw, p.stream, 0).group(0);
  at.top += below(words.w[0], uint32_t(positions(p.height, p.padding, p.crop_height)));
  at.left += below(words.w[1], uint32_t(positions(p.width, p.padding, p.crop_width)));
  at.mirrored = p.flip && below(words.w[2], 2);
  return at;
}

// Sizes that fit each other and the counter's words; and a key, unless there is but one crop.
inline int status_of(const AtlasAugment& p) {
  for (int64_t size : {p.count, p.channels, p.height, p.width, p.batch, p.crop_height, p.crop_width, p.padding})
    if (size < 0) return ATLAS_BAD_SIZE;
  if (p.padding > INT32_MAX) return ATLAS_BAD_SIZE;
  const int64_t rows = positions(p.height, p.padding, p.crop_height);
  const int64_t columns = positions(p.width, p.padding, p.crop_width);
  if (rows < 1 || columns < 1 || rows > UINT32_MAX || columns > UINT32_MAX) return ATLAS_BAD_SIZE;
  return p.key || (!p.flip && rows == 1 && columns == 1) ? ATLAS_OK : ATLAS_REFUSED;
}

ATLAS_HD const uint8_t* bytes_of(const AtlasImages& images) { return static_cast<const uint8_t*>(images.data); }

// What is written where there is no such image: kernels never read beyond the set, whatever the index says.
template <class T> ATLAS_HD T no_image() { return T(bit_cast<float>(0x7fc00000u)); }

}  // namespace atlas
