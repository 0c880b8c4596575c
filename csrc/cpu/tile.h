// Tiles: a few hundred pixels of one channel plane, in L1. A tensor of the compute type in plane order is used where it
// lies; any other dtype or order is converted into a tile first and back afterwards, so the arithmetic is written (and
// vectorised) once.
#pragma once
#include "../api.h"
#include "isa.h"

#if ATLAS_X86
#include <emmintrin.h>
#endif

namespace atlas::cpu {

constexpr int64_t kTile = 512;  // a multiple of 4 kGroupsAtOnce: noise comes in whole groups of four pixels

// Where a tile lies: pixels [first, first + size) of channel plane (sample, channel).
struct Place {
  int64_t sample, channel, first, size;
};

struct PlaneShape {
  int64_t channels, pixels;

  ATLAS_HD int64_t offset(const Place& at, bool channels_last) const {
    return channels_last ? (at.sample * pixels + at.first) * channels + at.channel
                         : (at.sample * channels + at.channel) * pixels + at.first;
  }
};

template <class T> ATLAS_HD bool is_direct(const AtlasImages& images) {
  return images.dtype == dtype_of<T>::value && !images.channels_last;
}

template <class T> struct Plain {
  template <class S> static ATLAS_HD T from(S v) { return convert<T>(v); }
};

template <class Map, class T, class S> ATLAS_HD void gather(T* to, const S* from, int64_t stride, int64_t size) {
  if (stride == 1) {
    ATLAS_IVDEP for (int64_t i = 0; i < size; ++i) to[i] = Map::from(from[i]);
  } else if (stride == 3) {
    ATLAS_IVDEP for (int64_t i = 0; i < size; ++i) to[i] = Map::from(from[3 * i]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = Map::from(from[stride * i]);
  }
}

// The tile at `at` as T: in place where it can be, else converted by Map into `buffer`.
template <class T, class Map = Plain<T>>
ATLAS_HD const T* load(const AtlasImages& images, PlaneShape shape, const Place& at, T* buffer) {
  const int64_t offset = shape.offset(at, images.channels_last), stride = images.channels_last ? shape.channels : 1;
  if (is_direct<T>(images)) return static_cast<const T*>(images.data) + offset;
  switch (images.dtype) {
    case kFloat32: gather<Map>(buffer, static_cast<const float*>(images.data) + offset, stride, at.size); break;
    case kFloat64: gather<Map>(buffer, static_cast<const double*>(images.data) + offset, stride, at.size); break;
    case kFloat16: gather<Map>(buffer, static_cast<const half_t*>(images.data) + offset, stride, at.size); break;
    default: gather<Map>(buffer, static_cast<const bfloat16_t*>(images.data) + offset, stride, at.size);
  }
  return buffer;
}

template <class D, class T> ATLAS_HD void scatter(D* to, const T* from, int64_t stride, int64_t size) {
  if (stride == 1) {
    ATLAS_IVDEP for (int64_t i = 0; i < size; ++i) to[i] = convert<D>(from[i]);
  } else if (stride == 3) {
    ATLAS_IVDEP for (int64_t i = 0; i < size; ++i) to[3 * i] = convert<D>(from[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[stride * i] = convert<D>(from[i]);
  }
}

// Past the caches: saves the read that an ordinary store makes of every line it is about to overwrite.
template <class T> ATLAS_HD void stream_out(T* to, const T* from, int64_t size) {
  int64_t i = 0;
#if ATLAS_X86
  constexpr int64_t kLane = 16 / sizeof(T);
  for (; i < size && (reinterpret_cast<uintptr_t>(to + i) & 15); ++i) to[i] = from[i];
  for (; i + kLane <= size; i += kLane)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  for (; i < size; ++i) to[i] = from[i];
}

// Writes a tile to where it belongs.
template <class T>
ATLAS_HD void store(const AtlasImages& images, PlaneShape shape, const Place& at, const T* tile, bool streaming) {
  const int64_t offset = shape.offset(at, images.channels_last), stride = images.channels_last ? shape.channels : 1;
  if (is_direct<T>(images)) {
    T* to = static_cast<T*>(images.data) + offset;
    if (to == tile) return;
    if (streaming) return stream_out(to, tile, at.size);
  }
  switch (images.dtype) {
    case kFloat32: scatter(static_cast<float*>(images.data) + offset, tile, stride, at.size); break;
    case kFloat64: scatter(static_cast<double*>(images.data) + offset, tile, stride, at.size); break;
    case kFloat16: scatter(static_cast<half_t*>(images.data) + offset, tile, stride, at.size); break;
    default: scatter(static_cast<bfloat16_t*>(images.data) + offset, tile, stride, at.size);
  }
}

// Where to compute a tile of a result: in the result itself where that is possible, else in `buffer`, for store().
template <class T>
ATLAS_HD T* in_place_of(const AtlasImages& images, PlaneShape shape, const Place& at, T* buffer, bool streaming) {
  if (!images.data || !is_direct<T>(images) || streaming) return buffer;
  return static_cast<T*>(images.data) + shape.offset(at, false);
}

// Results larger than the last-level cache are streamed: nobody finds them there anyway.
bool outgrows_cache(int64_t bytes);

ATLAS_HD void finish_streaming() {
#if ATLAS_X86
  _mm_sfence();
#endif
}

}  // namespace atlas::cpu
