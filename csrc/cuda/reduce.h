// Sums, maxima and minima over a warp or a block. All of its threads call, and all get the same bits: the terms are
// folded in a fixed order, whatever the timing. NaN is not a maximum: it is passed over, and -inf is left where there
// is nothing else. A caller sees NaN in its sums.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

namespace atlas::cuda {

struct Sum {
  template <class T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};
struct Max {
  template <class T> static __device__ __forceinline__ T of(T a, T b) { return a > b ? a : b; }
};
struct Min {
  template <class T> static __device__ __forceinline__ T of(T a, T b) { return a < b ? a : b; }
};

// Over each group of `lanes` neighbours in the warp, a power of two. Max and Min need values that have an order: call
// in_order first where there may be NaN or signed zeros.
template <class Fold, class T> __device__ __forceinline__ T warp_fold(T v, int lanes = 32) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2)
    if (by < lanes) v = Fold::of(v, __shfl_xor_sync(0xffffffff, v, by));
  return v;
}

template <class Fold, int Threads, class T> __device__ __forceinline__ T block_fold(T v) {
  static_assert(Threads % 32 == 0 && Threads <= 1024, "a block of whole warps");
  __shared__ T folded[Threads / 32];
  v = warp_fold<Fold>(v);
  if (threadIdx.x % 32 == 0) folded[threadIdx.x / 32] = v;
  __syncthreads();
  v = folded[0];
  for (int warp = 1; warp < Threads / 32; ++warp) v = Fold::of(v, folded[warp]);
  __syncthreads();  // before the next call writes
  return v;
}

// So that any two are in order: no NaN, and one zero.
template <class T> __device__ __forceinline__ T in_order(T v) { return v == v ? v + T(0) : T(-HUGE_VAL); }

template <class T> __device__ __forceinline__ T warp_sum(T v, int lanes = 32) { return warp_fold<Sum>(v, lanes); }
template <class T> __device__ __forceinline__ T warp_max(T v, int lanes = 32) {
  return warp_fold<Max>(in_order(v), lanes);
}
template <int Threads, class T> __device__ __forceinline__ T block_sum(T v) { return block_fold<Sum, Threads>(v); }
template <int Threads, class T> __device__ __forceinline__ T block_max(T v) {
  return block_fold<Max, Threads>(in_order(v));
}

}  // namespace atlas::cuda
