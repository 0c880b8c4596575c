// What every CUDA launcher needs: the device of the call, and a launch whose error is returned.
#pragma once
#include <cuda_runtime.h>

#include "../api.h"

namespace atlas::cuda {

// Makes `device` current for its lifetime, then the caller's device again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && device != before_) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Also clears an error that is reported here, so that it does not turn up in a later call.
inline int reported(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return int(status);
}

// One thread per unit of work, `units_per_thread` if it takes several; on the device and the stream of the call.
template <class... Parameters, class... Arguments>
int launch(const AtlasWhere& where, int64_t units, int units_per_thread, int threads, void (*kernel)(Parameters...),
           const Arguments&... arguments) {
  const int64_t per_block = int64_t(threads) * units_per_thread, blocks = (units + per_block - 1) / per_block;
  if (blocks > INT32_MAX) return ATLAS_BAD_SIZE;
  const DeviceGuard guard(where.device);
  if (guard.status() != cudaSuccess) return reported(guard.status());
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(where.stream);
  return reported(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace atlas::cuda
