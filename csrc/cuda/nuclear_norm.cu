#include "../core/nuclear_norm.h"

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace atlas::cuda {
namespace {

// One block: a pair of vectors a warp, a lane every 32nd entry. The pairs of a round touch no vector twice.
constexpr int kWarps = 16, kThreads = 32 * kWarps;

__device__ __forceinline__ double entry(const AtlasNuclearNorm& p, int64_t at) {
  double value = 0;
  with_dtype(p.dtype, [&](auto stored) {
    value = convert<double>(static_cast<const decltype(stored)*>(p.d)[at]);
  });
  return value;
}

__device__ __forceinline__ bool meet(double* u, double* v, const NuclearLayout& at, double cosine, double nothing) {
  const int lane = threadIdx.x % 32;
  double uu = 0, vv = 0, uv = 0;
  for (int64_t k = lane; k < at.length; k += 32) {
    const double a = u[k], b = v[k];
    uu += a * a;
    vv += b * b;
    uv += a * b;
  }
  uu = warp_sum(uu), vv = warp_sum(vv), uv = warp_sum(uv);
  const NuclearRotation turn = NuclearRotation::of(uu, vv, uv, cosine, nothing);
  if (!turn.needed) return false;
  for (int64_t k = lane; k < at.stride; k += 32) {
    const double a = u[k], b = v[k];
    u[k] = turn.c * a - turn.s * b;
    v[k] = turn.s * a + turn.c * b;
  }
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) nuclear_norm_kernel(const __grid_constant__ AtlasNuclearNorm p) {
  const NuclearLayout at = NuclearLayout::of(p);
  double* const work = p.work;
  double* const lengths = work + at.count * at.stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t size = at.count * at.length;

  double top = 0, rest = 0;
  for (int64_t k = threadIdx.x; k < size; k += kThreads) {
    const double v = entry(p, k);
    top = v > top ? v : -v > top ? -v : top;
    rest += v - v;  // NaN, if v is not finite
  }
  top = block_max<kThreads>(top);
  rest = block_sum<kThreads>(rest);
  if (!(rest == 0) || top == 0) {  // numbers that are none, or zeros
    if (threadIdx.x == 0) *static_cast<T*>(p.value) = T(rest);
    for (int64_t k = threadIdx.x; p.grad && k < size; k += kThreads) static_cast<T*>(p.grad)[k] = T(rest);
    return;
  }

  const double scale = nuclear_scale(top);
  double squares = 0;
  for (int64_t k = threadIdx.x; k < at.count * at.stride; k += kThreads) {
    const int64_t i = k / at.stride, j = k % at.stride;
    const double v = j < at.length ? scale * entry(p, at.at(i, j)) : j == at.reach + i ? 1 : 0;
    squares += j < at.length ? v * v : 0;
    work[k] = v;
  }
  squares = block_sum<kThreads>(squares);  // and no thread goes on before the vectors are there

  const double cosine = nuclear_cosine<T>(at), nothing = nuclear_nothing(squares);
  const int64_t players = at.count + at.count % 2;
  bool moved = true;
  for (int sweep = 0; moved && sweep < kNuclearSweeps; ++sweep) {
    moved = false;
    for (int64_t round = 0; round + 1 < players; ++round) {
      for (int64_t pair = warp; pair < players / 2; pair += kWarps) {
        const NuclearPair who = NuclearPair::of(round, pair, players);
        if (who.second == at.count) continue;
        moved |= meet(work + who.first * at.stride, work + who.second * at.stride, at, cosine, nothing);
      }
      __syncthreads();
    }
    moved = block_max<kThreads>(double(moved)) > 0;
  }

  for (int64_t i = warp; i < at.count; i += kWarps) {
    double square = 0;
    for (int64_t k = lane; k < at.length; k += 32) square += work[i * at.stride + k] * work[i * at.stride + k];
    square = warp_sum(square);
    if (lane == 0) lengths[i] = sqrt(square);
  }
  __syncthreads();
  double longest = 0, sum = 0;
  for (int64_t i = threadIdx.x; i < at.count; i += kThreads) longest = lengths[i] > longest ? lengths[i] : longest;
  const double least = nuclear_least<T>(at) * block_max<kThreads>(longest);
  for (int64_t i = threadIdx.x; i < at.count; i += kThreads) {
    const bool counts = lengths[i] > least;
    sum += counts ? lengths[i] : 0;
    lengths[i] = counts ? 1 / lengths[i] : 0;  // what is left to divide by
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *static_cast<T*>(p.value) = T(sum / scale);
  for (int64_t k = threadIdx.x; p.grad && k < size; k += kThreads) {
    const int64_t row = k / p.classes, column = k % p.classes;
    const int64_t vector = at.rows ? row : column, along = at.rows ? column : row;
    double slope = 0;
    for (int64_t i = 0; i < at.count; ++i) {
      const double* const turned = work + i * at.stride;
      slope += lengths[i] * turned[at.reach + vector] * turned[along];
    }
    static_cast<T*>(p.grad)[k] = T(slope);
  }
}

template <class T> int run(const AtlasNuclearNorm& p, const AtlasWhere& where) {
  if (const int status = status_of(p)) return status;
  return launch(where, kThreads, 1, kThreads, nuclear_norm_kernel<T>, p);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_nuclear_norm(const AtlasNuclearNorm* params, const AtlasWhere* where) {
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cuda::run<double>(*params, *where)
                                          : atlas::cuda::run<float>(*params, *where);
}
