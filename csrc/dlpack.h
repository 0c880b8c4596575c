// The part of DLPack 1 that the door needs (github.com/dmlc/dlpack, include/dlpack/dlpack.h): how a tensor of Python is
// read in C, without PyTorch's headers. PyTorch has the functions as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once
#include <stdint.h>

extern "C" {

enum { kDLCPU = 1, kDLCUDA = 2, kDLROCM = 10 };
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLDevice { int32_t device_type, device_id; };
struct DLDataType { uint8_t code, bits; uint16_t lanes; };

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct { uint32_t major, minor; } version;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // valid as long as the object is
  int (*current_work_stream)(int device_type, int32_t device_id, void** out);
};

}  // extern "C"
