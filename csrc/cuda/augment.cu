#include "../core/augment.h"

#include "launch.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 128, kTiles = 2;  // two vectors a thread, to have more under way, and fewer draws

template <class S> struct compute_type { using T = float; };
template <> struct compute_type<double> { using T = double; };

template <class S> struct Job {
  using T = typename compute_type<S>::T;

  AtlasAugment p;
  Scalar<T> mean, std;
  int64_t vectors;  // of one sample
  Divisor by_blocks, by_outer, by_width;
  bool in_rows;  // a vector never leaves its row
};

template <class S, class T, int V> __device__ __forceinline__ void store(S* to, const T (&values)[V]) {
  if constexpr (V == 1) {
    *to = convert<S>(values[0]);
  } else {
    uint32_t words[4];
    for (int v = 0; v < V; ++v) {
      if constexpr (sizeof(S) == 8) memcpy(words + 2 * v, values + v, sizeof(S));
      else put(words, v, convert<S>(values[v]));
    }
    store_words<16>(to, words);
  }
}

// Where an element of one sample's result lies in its crop.
struct Cursor {
  int64_t row, column, channel;

  template <class S> static __device__ __forceinline__ Cursor at(const Job<S>& job, int64_t element) {
    const Quotient outer = divide(element, job.by_outer);
    const bool last = job.p.out.channels_last;
    const Quotient pixel = divide(last ? outer.whole : outer.rest, job.by_width);
    return {pixel.whole, pixel.rest, last ? outer.rest : outer.whole};
  }

  // To the next element in memory.
  __device__ __forceinline__ void advance(const AtlasAugment& p) {
    if (p.out.channels_last) {
      if (++channel < p.channels) return;
      channel = 0;
    }
    if (++column < p.crop_width) return;
    column = 0;
    if (++row < p.crop_height || p.out.channels_last) return;
    row = 0;
    ++channel;
  }
};

// V neighbouring elements of the result: first their bytes, all on their way at once, then their values.
template <class S, int V, bool Normalise> struct Tile {
  using T = typename Job<S>::T;
  Cursor first;
  uint32_t bytes[V];

  __device__ __forceinline__ void read(const Job<S>& job, const Window& window, const uint8_t* image, int64_t vector) {
    const AtlasAugment& p = job.p;
    Cursor at = first = Cursor::at(job, vector * V);
    const int64_t step = p.images.channels_last ? p.channels : 1, plane = p.images.channels_last ? 1 : p.height * p.width;
    int64_t row = window.row(at.row), line = row * p.width * step + at.channel * plane;
    for (int v = 0; v < V; ++v) {
      const int64_t column = window.column(at.column, p.crop_width);
      const bool inside = (row >= 0) & (row < p.height) & (column >= 0) & (column < p.width);
      const uint32_t byte = image[inside ? line + column * step : 0];  // no branch: no load waits for another
      bytes[v] = inside ? byte : 0;
      if (job.in_rows) {
        ++at.column;
      } else {
        at.advance(p);
        row = window.row(at.row);
        line = row * p.width * step + at.channel * plane;
      }
    }
  }

  __device__ __forceinline__ void write(const Job<S>& job, bool there, int64_t vector) const {
    const T absent = there ? T(0) : no_image<T>();
    T values[V];
    Cursor at = first;
    for (int v = 0; v < V; ++v) {
      values[v] = dequantise<T>(uint8_t(bytes[v])) + absent;
      if constexpr (Normalise) {
        values[v] = normalised(values[v], job.mean.at(at.channel), job.std.at(at.channel));
        if (!job.in_rows) at.advance(job.p);
      }
    }
    store(static_cast<S*>(job.p.out.data) + vector * V, values);
  }
};

// A block stays within one sample.
template <class S, int V, bool Normalise>
__global__ void __launch_bounds__(kThreads) augment_kernel(const __grid_constant__ Job<S> job) {
  const AtlasAugment& p = job.p;
  const Quotient block = divide(blockIdx.x, job.by_blocks);
  const int64_t sample = block.whole, number = p.index[sample], size = p.channels * p.height * p.width;
  const bool there = number >= 0 && number < p.count;
  Window window = draw_window(p, p.key ? p.key[0] : 0, p.ids ? p.ids[sample] : number);
  const uint8_t* image = bytes_of(p.images) + (there ? number : 0) * size;
  if (!there || size == 0) {  // nothing lies inside such a window; byte 0, which is read all the same, may be any
    window.top = p.height;
    image = reinterpret_cast<const uint8_t*>(p.index);
  }
  const int64_t first = block.rest * kThreads * kTiles + threadIdx.x;
  if (first >= job.vectors) return;
  Tile<S, V, Normalise> tiles[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if (i == 0 || first + i * kThreads < job.vectors) tiles[i].read(job, window, image, first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if (i == 0 || first + i * kThreads < job.vectors)
      tiles[i].write(job, there, sample * job.vectors + first + i * kThreads);
}

template <class S, int V> int walk(Job<S>& job, int64_t elements, const AtlasWhere& where) {
  const AtlasAugment& p = job.p;
  job.vectors = elements / V;
  job.in_rows = !p.out.channels_last && p.crop_width % V == 0;
  const int64_t per_sample = (job.vectors + kThreads * kTiles - 1) / (kThreads * kTiles), blocks = p.batch * per_sample;
  job.by_blocks = divisor(per_sample, blocks);
  const auto kernel = normalises(p) ? augment_kernel<S, V, true> : augment_kernel<S, V, false>;
  return launch(where, blocks * kThreads, 1, kThreads, kernel, job);
}

template <class S> int run(const AtlasAugment& p, const AtlasWhere& where) {
  using T = typename Job<S>::T;
  if (const int status = status_of(p)) return status;
  const int64_t plane = p.crop_height * p.crop_width, elements = p.channels * plane;
  if (p.batch * elements == 0) return ATLAS_OK;
  Job<S> job = {p, scalar<T>(p.mean), scalar<T>(p.std), 0, {},
                divisor(p.out.channels_last ? p.channels : plane, elements), divisor(p.crop_width, plane), false};
  constexpr int kVector = 16 / sizeof(S);
  const bool whole = elements % kVector == 0 && reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0;
  return whole ? walk<S, kVector>(job, elements, where) : walk<S, 1>(job, elements, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_augment(const AtlasAugment* params, const AtlasWhere* where) {
  switch (params->out.dtype) {
    case atlas::kFloat32: return atlas::cuda::run<float>(*params, *where);
    case atlas::kFloat64: return atlas::cuda::run<double>(*params, *where);
    case atlas::kFloat16: return atlas::cuda::run<atlas::half_t>(*params, *where);
    case atlas::kBFloat16: return atlas::cuda::run<atlas::bfloat16_t>(*params, *where);
    default: return ATLAS_BAD_DTYPE;
  }
}
