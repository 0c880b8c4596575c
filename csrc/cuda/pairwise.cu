#include "../core/pairwise.h"

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

// A block: 32 columns, one a lane, of some anchors, kRows a warp; the others come by in tiles of shared memory.
constexpr int kColumns = 32, kWarps = 4, kRows = 4, kAnchors = kWarps * kRows, kOthers = 64;
constexpr int kRun = 16;  // pairs that are summed one after another
constexpr int kThreads = kColumns * kWarps, kSumThreads = 256;
static_assert(kColumns % kPairColumns == 0 && kOthers < 1 << 15, "");

struct Job {
  AtlasPairwise p;
  int64_t anchor_blocks, column_blocks;
};

template <class T> __device__ __forceinline__ T load(const AtlasPairwise& p, const void* h, int64_t row, int64_t column) {
  T value = T(0);  // beyond the edge: equal on both sides, these add nothing
  if (row >= p.batch || column >= p.features) return value;
  with_dtype(p.dtype, [&](auto stored) {
    value = convert<T>(static_cast<const decltype(stored)*>(h)[row * p.features + column]);
  });
  return value;
}

// Anchors are the adversaries, whose rows have the values; once more with the sides exchanged where the clean features
// need a gradient.
template <class T, template <class, class> class Sum>
__global__ void __launch_bounds__(kThreads, 1) pairwise_kernel(const __grid_constant__ Job job) {
  __shared__ T others[kOthers][kColumns];
  __shared__ PairWeight<T> weights[kAnchors][kOthers];
  const AtlasPairwise& p = job.p;
  const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int64_t outer = blockIdx.x / job.anchor_blocks, column_block = outer % job.column_blocks;
  const int64_t column = column_block * kColumns + lane, first = blockIdx.x % job.anchor_blocks * kAnchors;
  const bool clean = outer >= job.column_blocks;
  const void *const own = clean ? p.h : p.h_adv, *const far = clean ? p.h_adv : p.h;

  T anchor[kRows];
  double value[kRows] = {}, slope[kRows] = {};
  for (int r = 0; r < kRows; ++r) anchor[r] = load<T>(p, own, first + warp * kRows + r, column);
  for (int64_t tile = 0; tile < p.batch; tile += kOthers) {
    const int count = p.batch - tile < kOthers ? int(p.batch - tile) : kOthers;
    __syncthreads();
#pragma unroll 4
    for (int j = warp; j < count; j += kWarps) others[j][lane] = load<T>(p, far, tile + j, column);
#pragma unroll 2
    for (int pair = threadIdx.x; pair < kAnchors * kOthers; pair += kThreads) {
      const int i = pair / kOthers, j = pair % kOthers;
      const bool inside = j < count && first + i < p.batch;
      weights[i][j] = pair_weight<T>(inside && p.labels[first + i] == p.labels[tile + j], T(p.other));
    }
    __syncthreads();
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kRun) {
      const int end = count - begin < kRun ? count : begin + kRun;
      Sum<T, Count<T>> sum[kRows] = {};
#pragma unroll 4
      for (int j = begin; j < end; ++j) {
        const T b = others[j][lane];
        for (int r = 0; r < kRows; ++r) sum[r].add(anchor[r], b, weights[warp * kRows + r][j]);
      }
      for (int r = 0; r < kRows; ++r) {
        value[r] += double(sum[r].value);
        slope[r] += sum[r].weigh(sum[r].slope, p.other);
      }
    }
  }

  T* const grad = static_cast<T*>(clean ? p.grad : p.adv_grad);
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + warp * kRows + r;
    const double over_columns = warp_sum(value[r]);
    if (row >= p.batch) continue;
    if (grad && column < p.features) grad[row * p.features + column] = T(p.factor * slope[r]);
    if (!clean && lane == 0) p.partial[column_block * p.batch + row] = over_columns;
  }
}

template <class T> __global__ void __launch_bounds__(kSumThreads) total_kernel(const __grid_constant__ Job job) {
  const AtlasPairwise& p = job.p;
  double total = 0;
  for (int64_t row = threadIdx.x; row < p.batch; row += kSumThreads) {
    double value = 0;
    for (int64_t block = 0; block < job.column_blocks; ++block) value += p.partial[block * p.batch + row];
    if (p.value) static_cast<T*>(p.value)[row] = T(p.factor * value);
    total += value;
  }
  total = block_sum<kSumThreads>(total);
  if (p.total && threadIdx.x == 0) *static_cast<T*>(p.total) = T(p.factor * total);
}

template <class T> int run(const AtlasPairwise& p, const AtlasWhere& where) {
  if (const int status = status_of(p)) return status;
  const Job job = {p, (p.batch + kAnchors - 1) / kAnchors, (p.features + kColumns - 1) / kColumns};
  const int64_t threads = job.anchor_blocks * job.column_blocks * (p.grad ? 2 : 1) * kThreads;
  const auto kernel = p.squared ? pairwise_kernel<T, SquaredSum> : pairwise_kernel<T, L1Sum>;
  const int status = threads ? launch(where, threads, 1, kThreads, kernel, job) : ATLAS_OK;
  return status ? status : launch(where, kSumThreads, 1, kSumThreads, total_kernel<T>, job);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_pairwise(const AtlasPairwise* params, const AtlasWhere* where) {
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cuda::run<double>(atlas::with_other(*params), *where)
                                          : atlas::cuda::run<float>(atlas::with_other(*params), *where);
}
