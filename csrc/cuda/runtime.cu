#include "launch.h"

extern "C" int atlas_cuda_runtime(int* built, int* driver, int* devices) {
  *built = CUDART_VERSION;
  *driver = *devices = 0;
  cudaError_t status = cudaDriverGetVersion(driver);
  if (status == cudaSuccess) status = cudaGetDeviceCount(devices);
  if (status != cudaSuccess) *devices = 0;
  return atlas::cuda::reported(status);
}

extern "C" const char* atlas_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
