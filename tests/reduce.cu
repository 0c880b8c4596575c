// csrc/cuda/reduce.h in a kernel, for tests/cuda_on_host/operators.py.
#include "../csrc/cuda/reduce.h"

#include "../csrc/cuda/launch.h"

namespace atlas::cuda {
namespace {

constexpr int kThreads = 96;

template <class T> __global__ void reduce_kernel(const T* in, T* out) {
  __shared__ T mirror[kThreads];
  const int t = int(threadIdx.x);
  const T v = in[blockIdx.x * kThreads + t];
  T* const results = out + (blockIdx.x * kThreads + t) * 11;
  mirror[kThreads - 1 - t] = v;
  __syncthreads();
  results[0] = mirror[t];
  results[1] = warp_sum(v, 8), results[2] = warp_max(v, 8);
  results[3] = warp_sum(v), results[4] = warp_max(v);
  results[5] = block_sum<kThreads>(v), results[10] = block_sum<kThreads>(T(t));
  results[6] = block_max<kThreads>(v);
  results[9] = T(block_fold<Min, kThreads>(v == results[6] ? t : kThreads));
  results[7] = __shfl_sync(0xffffffff, v, 3), results[8] = __shfl_down_sync(0xffffffff, v, 2, 8);
}

template <class T> int run(const void* in, void* out, int64_t blocks) {
  return launch({}, blocks * kThreads, 1, kThreads, reduce_kernel<T>, static_cast<const T*>(in), static_cast<T*>(out));
}

}  // namespace
}  // namespace atlas::cuda

extern "C" ATLAS_EXPORT int test_reduce(const void* in, void* out, int64_t blocks, bool fp64) {
  return fp64 ? atlas::cuda::run<double>(in, out, blocks) : atlas::cuda::run<float>(in, out, blocks);
}
