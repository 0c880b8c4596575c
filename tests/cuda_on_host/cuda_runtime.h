// A CUDA runtime for g++, in place of the toolkit's header of this name: csrc/cuda/*.cu compile as plain C++, and their
// grids run on the CPU, thread after thread, so that sanitizers see every index, tail and branch of the kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_VERSION 0

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace on_host {

constexpr int kDevices = 2;

// What the tests look at afterwards.
inline thread_local int device = 0, launched_on = -1;
inline thread_local cudaError_t last_error = cudaSuccess;
inline std::mutex lock;
inline std::set<void*> ran;  // kernels

inline cudaError_t fail(cudaError_t status) { return last_error = status; }

// Last thread first: no kernel may lean on an order. Kernels that synchronise need their threads to take turns: fibers,
// started here.
template <class Thread> void run_block(dim3 block, Thread&& thread) {
  for (unsigned z = block.z; z-- > 0;)
    for (unsigned y = block.y; y-- > 0;)
      for (unsigned x = block.x; x-- > 0;) {
        threadIdx = dim3(x, y, z);
        thread();
      }
}

}  // namespace on_host

inline cudaError_t cudaGetDevice(int* device) {
  *device = on_host::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= on_host::kDevices) return on_host::fail(cudaErrorInvalidDevice);
  on_host::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = on_host::kDevices;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = on_host::last_error;
  on_host::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidDevice ? "invalid device" : "invalid launch";
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024)
    return on_host::fail(cudaErrorInvalidConfiguration);
  on_host::launched_on = on_host::device;
  {
    const std::lock_guard<std::mutex> guard(on_host::lock);
    on_host::ran.insert(reinterpret_cast<void*>(kernel));
  }
  gridDim = grid, blockDim = block;
  for (unsigned z = grid.z; z-- > 0;)
    for (unsigned y = grid.y; y-- > 0;)
      for (unsigned x = grid.x; x-- > 0;) {
        blockIdx = dim3(x, y, z);
        on_host::run_block(block, [&] { kernel(arguments...); });
      }
  return cudaSuccess;
}
