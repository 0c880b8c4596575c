#include "../core/batch_norm.h"

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 128, kFoldThreads = 256;
constexpr int kRun = 32;          // terms that are summed one after another
constexpr int kFoldChannels = 8;  // of a block that folds
constexpr int64_t kShare = 2048;  // elements of a plane's channel that are worth a block

template <class S> struct compute_type { using T = float; };
template <> struct compute_type<double> { using T = double; };

// A block of threads takes `wide` neighbouring vectors of channels and a share of the pixels; or, where the pixels of a
// channel are neighbours, one channel and a share of the samples.
struct Job {
  AtlasBatchNorm p;
  int64_t blocks, tiles;   // shares of the batch; of the channels
  int64_t vectors;         // of a row of channels, or of a plane
  int wide;                // threads side by side
  Divisor by_tiles, by_vectors;
};

// V elements, in one access.
template <class S, int V> struct Elements {
  using T = typename compute_type<S>::T;
  T of[V];

  static __device__ __forceinline__ Elements load(const AtlasImages& from, int64_t first) {
    const S* s = static_cast<const S*>(from.data) + first;
    Elements e;
    if constexpr (V == 1) {
      e.of[0] = convert<T>(*s);
    } else {
      S stored[V];
      uint32_t words[sizeof(stored) / 4];
      load_words<sizeof(stored)>(words, s);
      memcpy(stored, words, sizeof(stored));
      for (int i = 0; i < V; ++i) e.of[i] = convert<T>(stored[i]);
    }
    return e;
  }

  __device__ __forceinline__ void store(const AtlasImages& to, int64_t first) const {
    S* s = static_cast<S*>(to.data) + first;
    if constexpr (V == 1) {
      *s = convert<S>(of[0]);
    } else {
      S stored[V];
      uint32_t words[sizeof(stored) / 4];
      for (int i = 0; i < V; ++i) stored[i] = convert<S>(of[i]);
      memcpy(words, stored, sizeof(stored));
      store_words<sizeof(stored)>(s, words);
    }
  }
};

// Which channel a thread begins with, and which vectors are its own: every `step`th of [first, last).
template <int V, bool Rows> struct Share {
  int64_t block, channel, first, last, step;
  bool inside;

  static __device__ __forceinline__ Share of(const Job& job) {
    const AtlasBatchNorm& p = job.p;
    const Quotient at = divide(blockIdx.x, job.by_tiles);
    if (Rows) {
      const int64_t vector = at.rest * job.wide + threadIdx.x % job.wide, all = p.batch * p.pixels;
      return {at.whole, vector * V, all * at.whole / job.blocks + threadIdx.x / job.wide,
              all * (at.whole + 1) / job.blocks, kThreads / job.wide, vector < job.vectors};
    }
    return {at.whole, at.rest, p.batch * at.whole / job.blocks * job.vectors + threadIdx.x,
            p.batch * (at.whole + 1) / job.blocks * job.vectors, kThreads, true};
  }

  // The first element of a vector.
  __device__ __forceinline__ int64_t element(const Job& job, int64_t vector) const {
    const AtlasBatchNorm& p = job.p;
    if (Rows) return vector * p.channels + channel;
    const Quotient at = divide(vector, job.by_vectors);
    return (at.whole * p.channels + channel) * p.pixels + at.rest * V;
  }

  // Of what belongs to the channels.
  template <class T, class N> __device__ __forceinline__ void spread(T (&to)[V], const N* per_channel) const {
    for (int i = 0; i < V; ++i) to[i] = inside ? T(per_channel[Rows ? channel + i : channel]) : T(0);
  }
};

template <class S, int V, bool Rows>
__global__ void __launch_bounds__(kThreads, 1) sums_kernel(const __grid_constant__ Job job) {
  using T = typename compute_type<S>::T;
  const AtlasBatchNorm& p = job.p;
  const bool with_x = needs_x(p);
  const auto at = Share<V, Rows>::of(job);
  T mean[V] = {};
  if (with_x) at.spread(mean, static_cast<const T*>(p.mean));
  BatchNormTerms<T> sum[V] = {}, part[V] = {};
  for (int64_t vector = at.inside ? at.first : at.last; vector < at.last;) {
    const int64_t end = vector + kRun * at.step < at.last ? vector + kRun * at.step : at.last;
#pragma unroll 2
    for (; vector < end; vector += at.step) {
      const int64_t first = at.element(job, vector);
      const auto v = Elements<S, V>::load(p.x_cotangent, first), g = Elements<S, V>::load(p.cotangent, first);
      Elements<S, V> c = {};
      if (with_x) {
        c = Elements<S, V>::load(p.x, first);
        for (int i = 0; i < V; ++i) c.of[i] -= mean[i];
      }
      for (int i = 0; i < V; ++i) part[i].add(v.of[i], g.of[i], c.of[i]);
    }
    for (int i = 0; i < V; ++i) sum[i].add(part[i]), part[i] = {};
  }

  double* const to = p.partial + at.block * kBatchNormSlots * p.channels;
  if constexpr (Rows) {
    // [term][channel of a vector][thread], which threads of one column add up.
    __shared__ T folded[kBatchNormSums * V][kThreads];
#pragma unroll
    for (int i = 0; i < V; ++i)
      for (int k = 0; k < kBatchNormSums; ++k) folded[k * V + i][threadIdx.x] = sum[i].at(k);
    __syncthreads();
    const int64_t begin = at.channel - int(threadIdx.x) % job.wide * V;
    for (int n = threadIdx.x; n < kBatchNormSums * V * job.wide; n += kThreads) {
      const int channel = n % (V * job.wide), k = n / (V * job.wide);
      if (begin + channel >= p.channels) continue;
      double total = 0;
      for (int from = channel / V; from < kThreads; from += job.wide) total += double(folded[k * V + channel % V][from]);
      to[k * p.channels + begin + channel] = total;
    }
  } else {
    for (int k = 0; k < kBatchNormSums; ++k) {
      double total = 0;
      for (int i = 0; i < V; ++i) total += double(sum[i].at(k));
      total = block_sum<kThreads>(total);
      if (threadIdx.x == 0) to[k * p.channels + at.channel] = total;
    }
  }
}

template <class T> __device__ __forceinline__ double number(const void* per_channel, int64_t channel, double absent) {
  return per_channel ? double(static_cast<const T*>(per_channel)[channel]) : absent;
}

// The sums of all blocks, then the coefficients in the place of the first.
template <class T> __global__ void __launch_bounds__(kFoldThreads) fold_kernel(const __grid_constant__ Job job) {
  const AtlasBatchNorm& p = job.p;
  constexpr int kRows = kFoldThreads / kFoldChannels;
  __shared__ double folded[kBatchNormSums][kRows][kFoldChannels];
  const int lane = threadIdx.x % kFoldChannels, row = threadIdx.x / kFoldChannels;
  const int64_t channel = int64_t(blockIdx.x) * kFoldChannels + lane;
  double sums[kBatchNormSums] = {};
  if (needs_sums(p) && channel < p.channels)
#pragma unroll 4
    for (int64_t block = row; block < job.blocks; block += kRows)
      for (int k = 0; k < kBatchNormSums; ++k) sums[k] += p.partial[(block * kBatchNormSlots + k) * p.channels + channel];
  for (int k = 0; k < kBatchNormSums; ++k) folded[k][row][lane] = sums[k];
  __syncthreads();
  if (row > 0 || channel >= p.channels) return;
  for (int k = 0; k < kBatchNormSums; ++k)
    for (int other = 1; other < kRows; ++other) sums[k] += folded[k][other][lane];
  const BatchNormCoefficients of = coefficients(
      {sums[0], sums[1], sums[2], sums[3], sums[4]}, double(p.batch * p.pixels), number<T>(p.weight, channel, 1),
      number<T>(p.invstd, channel, 0), number<T>(p.weight_cotangent, channel, 0), number<T>(p.bias_cotangent, channel, 0),
      p.training);
  const double each[] = {of.g_v, of.g_c, of.g_1, of.x_v, of.x_g, of.x_c, of.x_1};
  for (int k = 0; k < kBatchNormSlots - 1; ++k) p.partial[k * p.channels + channel] = each[k];
  if (p.weight_grad) static_cast<T*>(p.weight_grad)[channel] = T(of.weight);
}

template <class S, int V, bool Rows>
__global__ void __launch_bounds__(kThreads) results_kernel(const __grid_constant__ Job job) {
  using T = typename compute_type<S>::T;
  const AtlasBatchNorm& p = job.p;
  const bool with_x = needs_x(p);
  const auto at = Share<V, Rows>::of(job);
  T mean[V] = {}, of[kBatchNormSlots - 1][V];
  if (with_x) at.spread(mean, static_cast<const T*>(p.mean));
#pragma unroll
  for (int k = 0; k < kBatchNormSlots - 1; ++k) at.spread(of[k], p.partial + k * p.channels);
  constexpr int kAtOnce = 2;  // all of them loaded before the first is stored
  for (int64_t vector = at.inside ? at.first : at.last; vector < at.last; vector += kAtOnce * at.step) {
    Elements<S, V> v[kAtOnce], c[kAtOnce] = {}, g[kAtOnce] = {}, out;
    int64_t first[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t own = vector + n * at.step;
      first[n] = at.element(job, own < at.last ? own : vector);
      v[n] = Elements<S, V>::load(p.x_cotangent, first[n]);
      if (with_x) c[n] = Elements<S, V>::load(p.x, first[n]);
      if (p.x_grad.data) g[n] = Elements<S, V>::load(p.cotangent, first[n]);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (vector + n * at.step >= at.last) break;
      if (with_x)
        for (int i = 0; i < V; ++i) c[n].of[i] -= mean[i];
      if (p.cotangent_grad.data) {
        for (int i = 0; i < V; ++i) out.of[i] = of[0][i] * v[n].of[i] + of[1][i] * c[n].of[i] + of[2][i];
        out.store(p.cotangent_grad, first[n]);
      }
      if (p.x_grad.data) {
        for (int i = 0; i < V; ++i) {
          out.of[i] = of[4][i] * g[n].of[i];
          if (p.training) out.of[i] = (out.of[i] + of[3][i] * v[n].of[i]) + (of[5][i] * c[n].of[i] + of[6][i]);
        }
        out.store(p.x_grad, first[n]);
      }
    }
  }
}

template <class S, int V, bool Rows> int passes(Job job, const AtlasWhere& where) {
  using T = typename compute_type<S>::T;
  const AtlasBatchNorm& p = job.p;
  job.vectors = (Rows ? p.channels : p.pixels) / V;
  job.blocks = p.blocks;
  job.wide = 1;
  if (Rows) {
    while (job.wide < 32 && job.wide < job.vectors) job.wide *= 2;
  } else {
    const int64_t worth = p.batch * p.pixels / kShare, most = p.batch < p.blocks ? p.batch : p.blocks;
    job.blocks = worth < 1 ? 1 : worth < most ? worth : most;
  }
  job.tiles = Rows ? (job.vectors + job.wide - 1) / job.wide : p.channels;
  job.by_tiles = divisor(job.tiles, job.blocks * job.tiles);
  job.by_vectors = divisor(job.vectors, p.batch * job.vectors);
  const int64_t threads = job.blocks * job.tiles * kThreads;
  int status = ATLAS_OK;
  if (needs_sums(p)) status = launch(where, threads, 1, kThreads, sums_kernel<S, V, Rows>, job);
  if (!status) status = launch(where, p.channels * (kFoldThreads / kFoldChannels), 1, kFoldThreads, fold_kernel<T>, job);
  if (!status && (p.cotangent_grad.data || p.x_grad.data))
    status = launch(where, threads, 1, kThreads, results_kernel<S, V, Rows>, job);
  return status;
}

template <class S> int run(const AtlasBatchNorm& p, const AtlasWhere& where) {
  if (const int status = status_of(p)) return status;
  if (p.channels == 0) return ATLAS_OK;
  constexpr int V = sizeof(S) == 8 ? 2 : 4;  // more of 16 bits take too many registers
  const bool rows = has_channel_rows(p);
  bool whole = (rows ? p.channels : p.pixels) % V == 0;
  for (const AtlasImages* t : {&p.x, &p.cotangent, &p.x_cotangent, &p.cotangent_grad, &p.x_grad})
    whole = whole && reinterpret_cast<uintptr_t>(t->data) % (V * sizeof(S)) == 0;
  const Job job = {p, 0, 0, 0, 0, {}, {}};
  if (rows) return whole ? passes<S, V, true>(job, where) : passes<S, 1, true>(job, where);
  return whole ? passes<S, V, false>(job, where) : passes<S, 1, false>(job, where);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_batch_norm(const AtlasBatchNorm* params, const AtlasWhere* where) {
  switch (params->x.dtype) {
    case atlas::kFloat32: return atlas::cuda::run<float>(*params, *where);
    case atlas::kFloat64: return atlas::cuda::run<double>(*params, *where);
    case atlas::kFloat16: return atlas::cuda::run<atlas::half_t>(*params, *where);
    case atlas::kBFloat16: return atlas::cuda::run<atlas::bfloat16_t>(*params, *where);
    default: return ATLAS_BAD_DTYPE;
  }
}
