// Tiles: what one thread computes of a batch of images, some consecutive pixels of one channel or of all. A kernel is
// written once over two ways of access: Vectors of up to 128 bits for the usual shapes, and Singles for any. A tensor's
// dtype and order of memory are known at run time only, but are the same for all threads.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "../api.h"
#include "../core/platform.h"

namespace atlas::cuda {

// Division without a division instruction, exact for 0 <= n < `bound`; in 32 bits where the bound fits into 31.
struct Divisor {
  int64_t value;
  uint64_t magic;  // 2^63 / value, or 2^31 / value, rounded up: the estimate is right or one too large. 0: always 0
  bool narrow;
};

inline Divisor divisor(int64_t value, int64_t bound) {
  const bool narrow = bound <= int64_t(1) << 31;
  const uint64_t one = uint64_t(1) << (narrow ? 31 : 63);
  return {value, bound <= value ? 0 : (one - 1) / uint64_t(value) + 1, narrow};
}

struct Quotient { int64_t whole, rest; };

__device__ __forceinline__ Quotient divide_narrow(uint32_t n, const Divisor& by) {
  const int32_t whole = int32_t(__umulhi(n << 1, uint32_t(by.magic)));
  const int32_t rest = int32_t(n) - whole * int32_t(by.value);
  return rest < 0 ? Quotient{whole - 1, rest + int32_t(by.value)} : Quotient{whole, rest};
}

__device__ __forceinline__ Quotient divide(int64_t n, const Divisor& by) {
  if (by.magic == 0) return {0, n};
  if (by.narrow) return divide_narrow(uint32_t(n), by);
  const int64_t whole = int64_t(__umul64hi(uint64_t(n) << 1, by.magic)), rest = n - whole * by.value;
  return rest < 0 ? Quotient{whole - 1, rest + by.value} : Quotient{whole, rest};
}

// An AtlasScalar in the compute type.
template <class T> struct Scalar {
  T value;
  const T* per_row;

  __device__ __forceinline__ T at(int64_t row) const { return per_row ? per_row[row] : value; }
};

template <class T> Scalar<T> scalar(const AtlasScalar& s) { return {T(s.value), static_cast<const T*>(s.per_row)}; }

// Calls function(S()) for the dtype's type S, which has at most MaxBytes.
template <int MaxBytes = 8, class Function>
__device__ __forceinline__ void with_dtype(int32_t dtype, Function&& function) {
  if constexpr (MaxBytes >= 8)
    if (dtype == kFloat64) return function(double());
  if constexpr (MaxBytes >= 4)
    if (dtype == kFloat32) return function(float());
  if (dtype == kFloat16) return function(half_t());
  function(bfloat16_t());
}

// How threads walk through the images: each takes a unit, a group of pixels of one channel or of all.
struct Walk {
  int64_t channels, pixels;
  bool plane_major;  // neighbouring units: along one plane, or across the channels of the same pixels
  bool per_channel;  // which channel it is matters

  int64_t groups = 0, units = 0;                                // of pixels in a plane; in all
  Divisor by_sample = {}, by_groups = {}, by_channels = {};  // by_sample: the units of one

  template <class Access> void begin(int64_t batch) {
    groups = (pixels + Access::kPixels - 1) / Access::kPixels;
    const int64_t per_sample = groups * (channels / Access::kChannels);
    units = batch * per_sample;
    by_sample = divisor(per_sample, units);
    by_groups = divisor(groups, per_sample);
    by_channels = divisor(channels, per_sample);
  }
};

// Where a unit lies.
struct Place {
  int64_t sample, channel, size;
  int64_t in_planes, channels_last;  // its first element in either order of memory
  uint32_t group;                    // which group of pixels of its sample, plane by plane

  __device__ __forceinline__ int64_t first(const AtlasImages& of) const {
    return of.channels_last ? channels_last : in_planes;
  }
};

// One access of Bytes, 16 at most.
template <int Bytes> struct alignas(Bytes) Block { uint32_t word[Bytes / 4]; };

template <int Bytes> __device__ __forceinline__ void load_words(uint32_t* to, const void* from) {
  const Block<Bytes> block = *static_cast<const Block<Bytes>*>(from);
  for (int i = 0; i < Bytes / 4; ++i) to[i] = block.word[i];
}

template <int Bytes> __device__ __forceinline__ void store_words(void* to, const uint32_t* from) {
  Block<Bytes> block;
  for (int i = 0; i < Bytes / 4; ++i) block.word[i] = from[i];
  *static_cast<Block<Bytes>*>(to) = block;
}

// Element m of an array of S packed into words. put() takes the elements in order.
template <class S> __device__ __forceinline__ S get(const uint32_t* words, int m) {
  if constexpr (sizeof(S) == 4) return bit_cast<S>(words[m]);
  else return {uint16_t(words[m / 2] >> 16 * (m % 2))};
}

template <class S> __device__ __forceinline__ void put(uint32_t* words, int m, S v) {
  if constexpr (sizeof(S) == 4) words[m] = bit_cast<uint32_t>(v);
  else words[m / 2] = m % 2 ? words[m / 2] | uint32_t(v.bits) << 16 : v.bits;
}

// Can `elements` of a tensor be one access: have they 16 bytes at most, and is the tensor aligned to that?
inline bool is_vector(const AtlasImages& images, int64_t elements) {
  const int64_t bytes = elements * (images.dtype == kFloat64 ? 8 : images.dtype == kFloat32 ? 4 : 2);
  return bytes <= 16 && reinterpret_cast<uintptr_t>(images.data) % uintptr_t(bytes) == 0;
}

// Access to 16- and 32-bit tensors in vectors of V elements, into which their planes can be cut. Either C is 1, and all
// tensors lie in planes; or C is the number of channels, and a unit is C vectors in either order. V = 8: 16 bits only.
// Plain, so that nothing is asked: all tensors are fp32 and lie in planes, all channels are alike, and there are at
// most 2^31 units, of V = 4 and C = 1.
template <int V, int C, bool Plain = false> struct Vectors {
  using T = float;
  using Unit = std::conditional_t<Plain, uint32_t, int64_t>;
  using Values = T[C][V];
  using Raw = uint32_t[C * V];
  static constexpr int kPixels = V, kChannels = C;

  static __device__ __forceinline__ Place locate(const Walk& walk, Unit unit) {
    if constexpr (Plain) {
      const Quotient sample = divide_narrow(unit, walk.by_sample);
      return {sample.whole, 0, V, int64_t(unit) * V, 0, uint32_t(sample.rest)};
    }
    const Quotient sample = divide(unit, walk.by_sample);
    const int64_t channel = C == 1 && walk.per_channel ? divide(sample.rest, walk.by_groups).whole : 0;
    return {sample.whole, channel, V, unit * V + sample.whole * (C - 1) * walk.pixels, unit * V * C,
            uint32_t(sample.rest)};
  }

  // The first element of vector c.
  static __device__ __forceinline__ int64_t vector(const AtlasImages& of, const Walk& walk, const Place& at, int c) {
    return Plain ? at.in_planes : at.first(of) + c * (of.channels_last ? V : walk.pixels);
  }

  // Leaves the elements as they are, so that nothing waits for them yet: all tensors are under way at once.
  template <class Narrow>
  static __device__ __forceinline__ void fetch(Raw& raw, const AtlasImages& from, const Walk& walk, const Place& at) {
    for (int c = 0; c < C; ++c) {
      const int64_t first = vector(from, walk, at, c);
      if constexpr (V == 4) {
        if (Plain || from.dtype == kFloat32) {
          load_words<4 * V>(raw + c * V, static_cast<const float*>(from.data) + first);
          continue;
        }
      }
      load_words<2 * V>(raw + c * V / 2, static_cast<const half_t*>(from.data) + first);  // of either 16-bit type
    }
  }

  static __device__ __forceinline__ void decode(Values& to, const Raw& raw, const AtlasImages& from) {
    with_dtype<16 / V>(Plain ? kFloat32 : from.dtype, [&](auto stored) {
      using S = decltype(stored);
      for (int c = 0; c < C; ++c)
        for (int j = 0; j < V; ++j)
          to[c][j] = convert<T>(C > 1 && from.channels_last ? get<S>(raw, j * C + c) : get<S>(raw, c * V + j));
    });
  }

  // `offset`: of the batch in the tensor.
  static __device__ __forceinline__ void store(const AtlasImages& to, int64_t offset, const Values& v, const Walk& walk,
                                               const Place& at) {
    with_dtype<16 / V>(Plain ? kFloat32 : to.dtype, [&](auto stored) {
      using S = decltype(stored);
      constexpr int kWords = V * sizeof(S) / 4;
      uint32_t words[C * kWords];
      for (int m = 0; m < C * V; ++m)
        put(words, m, convert<S>(C > 1 && to.channels_last ? v[m % C][m / C] : v[m / V][m % V]));
      for (int c = 0; c < C; ++c)
        store_words<4 * kWords>(static_cast<S*>(to.data) + offset + vector(to, walk, at, c), words + c * kWords);
    });
  }
};

struct Rounded {
  static __device__ __forceinline__ float from(double v) { return float(v); }
};

// Access to anything: four pixels of one channel, one by one. Narrow: how an fp64 element becomes fp32.
template <class Compute> struct Singles {
  using T = Compute;
  using Values = T[1][4];
  using Raw = Values;
  using Unit = int64_t;
  static constexpr int kPixels = 4, kChannels = 1;

  static __device__ __forceinline__ Place locate(const Walk& walk, int64_t unit) {
    const Quotient sample = divide(unit, walk.by_sample);
    const Quotient slow = divide(sample.rest, walk.plane_major ? walk.by_groups : walk.by_channels);
    const int64_t channel = walk.plane_major ? slow.whole : slow.rest;
    const int64_t group = walk.plane_major ? slow.rest : slow.whole, first = group * 4;
    return {sample.whole, channel, walk.pixels - first < 4 ? walk.pixels - first : 4,
            (sample.whole * walk.channels + channel) * walk.pixels + first,
            (sample.whole * walk.pixels + first) * walk.channels + channel, uint32_t(channel * walk.groups + group)};
  }

  static __device__ __forceinline__ int64_t stride(const AtlasImages& of, const Walk& walk) {
    return of.channels_last ? walk.channels : 1;
  }

  template <class Narrow>
  static __device__ __forceinline__ void fetch(Raw& raw, const AtlasImages& from, const Walk& walk, const Place& at) {
    with_dtype(from.dtype, [&](auto stored) {
      using S = decltype(stored);
      const S* data = static_cast<const S*>(from.data) + at.first(from);
      for (int j = 0; j < 4; ++j) {
        const S v = j < at.size ? data[j * stride(from, walk)] : S{};
        if constexpr (sizeof(S) > sizeof(T)) raw[0][j] = Narrow::from(v);
        else raw[0][j] = convert<T>(v);
      }
    });
  }

  static __device__ __forceinline__ void decode(Values& to, const Raw& raw, const AtlasImages&) {
    for (int j = 0; j < 4; ++j) to[0][j] = raw[0][j];
  }

  static __device__ __forceinline__ void store(const AtlasImages& to, int64_t offset, const Values& v, const Walk& walk,
                                               const Place& at) {
    with_dtype(to.dtype, [&](auto stored) {
      using S = decltype(stored);
      S* data = static_cast<S*>(to.data) + offset + at.first(to);
      for (int j = 0; j < 4; ++j)
        if (j < at.size) data[j * stride(to, walk)] = convert<S>(v[0][j]);
    });
  }
};

}  // namespace atlas::cuda
