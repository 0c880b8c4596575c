// A CUDA runtime for g++, in place of the toolkit's header of this name: csrc/cuda/*.cu compile as plain C++, and their
// grids run on the CPU, thread after thread, so that sanitizers see every index, tail and branch of the kernels.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <set>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define CUDART_VERSION 0

struct dim3 { unsigned x, y, z; constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };

namespace on_host {
constexpr int kDevices = 2, kStack = 1 << 17;

// What the tests look at afterwards.
inline thread_local int device = 0, launched_on = -1;
inline thread_local cudaError_t last_error = cudaSuccess;
inline std::set<void*> ran;  // kernels
inline cudaError_t fail(cudaError_t status) { return last_error = status; }

// A block's threads take turns, each a fiber with its own stack, until they return or wait for each other.
struct Barrier { int size = 32, arrived = 0; unsigned generation = 0; alignas(16) char values[2][32 * 16]; };
struct Fiber { void* jump[5]; const Barrier* barrier; unsigned generation; bool returned; };
inline std::mutex one_launch;  // at a time
inline std::function<void()> kernel;
inline Barrier warps[32], block;
inline Fiber fibers[1024], launcher, *running = &launcher;
inline int current, left;  // the thread that runs; how many have not returned

[[noreturn]] inline void stop(const char* why) { std::fputs(why, stderr), std::abort(); }

// No kernel may lean on an order: the last thread comes first, and a warp runs ahead of the others as far as it can.
inline Fiber* choose() {
  for (int i = 1; left && i < 32 + block.size; ++i) {
    const int t = i < 32 ? (current & ~31) | ((current - i) & 31) : 31 + block.size - i;
    if (t >= block.size || fibers[t].returned) continue;
    if (fibers[t].barrier && fibers[t].barrier->generation == fibers[t].generation) continue;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    return &fibers[current = t];
  }
  if (left) stop("Threads wait for some that have returned, or that wait elsewhere.\n");
  return &launcher;
}

inline void next();
inline void work() {
  for (;; next()) kernel(), running->returned = true, --left;
}
// Of ucontext only the start: its switches cost system calls, and make ASan forget what it knows of the stacks.
__attribute__((noinline, no_sanitize_address)) inline void enter(Fiber* fiber) {
  if (fiber->jump[1]) __builtin_longjmp(fiber->jump, 1);
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack = {new char[kStack], 0, kStack};
  makecontext(&start, work, 0);
  setcontext(&start);
}
inline void next() {
  Fiber* const from = running;
  running = choose();
  if (running != from && !__builtin_setjmp(from->jump)) enter(running);
}
inline void wait(Barrier& barrier) {
  running->barrier = &barrier, running->generation = barrier.generation;
  if (++barrier.arrived < barrier.size) return next();
  barrier.arrived = 0, ++barrier.generation;
}
// Of lane `from` in the group of `width`, or a lane's own. Two places: lanes may be at the next shuffle already.
template <class T> T shuffle(unsigned mask, T v, int from, int width) {
  if (mask != ~0u) stop("Only whole warps shuffle here.\n");
  const int lane = current % 32;
  Barrier& warp = warps[current / 32];
  T* const values = reinterpret_cast<T*>(warp.values[warp.generation % 2]);
  values[lane] = v, wait(warp);
  return values[from < width ? lane - lane % width + from : lane];
}
template <class T> T __shfl_sync(unsigned m, T v, int i, int w = 32) { return shuffle(m, v, i % w, w); }
template <class T> T __shfl_xor_sync(unsigned m, T v, int i, int w = 32) { return shuffle(m, v, current % w ^ i, w); }
template <class T> T __shfl_down_sync(unsigned m, T v, int i, int w = 32) { return shuffle(m, v, current % w + i, w); }
}  // namespace on_host

using on_host::__shfl_sync, on_host::__shfl_xor_sync, on_host::__shfl_down_sync;
inline void __syncwarp(unsigned mask = ~0u) { __shfl_sync(mask, 0, 0); }
inline void __syncthreads() { on_host::wait(on_host::block); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64); }

inline cudaError_t cudaGetDevice(int* device) { return *device = on_host::device, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* devices) { return *devices = on_host::kDevices, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid device, or launch" : "no error"; }
inline cudaError_t cudaSetDevice(int to) {
  return to >= 0 && to < on_host::kDevices ? on_host::device = to, cudaSuccess : on_host::fail(cudaErrorInvalidDevice);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... values) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024)
    return on_host::fail(cudaErrorInvalidConfiguration);
  const std::lock_guard<std::mutex> guard(on_host::one_launch);
  on_host::launched_on = on_host::device;
  on_host::ran.insert(reinterpret_cast<void*>(kernel));
  on_host::kernel = [&] { kernel(values...); };
  gridDim = grid, blockDim = block;
  for (uint64_t i = blocks; i-- > 0;) {
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    on_host::current = on_host::left = on_host::block.size = int(threads);
    for (on_host::Fiber& fiber : on_host::fibers) fiber.returned = false, fiber.barrier = nullptr;
    on_host::next();
  }
  return cudaSuccess;
}
