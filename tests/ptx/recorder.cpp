// The host part of the CUDA kernels, as operators on CPU tensors, over a CUDA runtime that hands every launch
// to a callback instead of a GPU.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <string>

#define CUDA CPU
#define perceiver_kernels recorded_kernels
#define PK_CUDA_ARCHS "none"
#include "cuda/launch.cpp"
#include "torch/cuda.cpp"

namespace {

// Returns a cudaError_t.
using Callback = int (*)(const char* kernel, unsigned x, unsigned y, unsigned threads, const void* arguments,
                         size_t shared_bytes);
Callback callback = nullptr;
int processors = 1, shared_per_block = 0, next_error = 0, arch = 80;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void record(Callback function) { callback = function; }

__attribute__((visibility("default"))) void pretend(int processor_count, int shared_limit, int error,
                                                    int architecture) {
  processors = processor_count;
  shared_per_block = shared_limit;
  next_error = error;
  arch = architecture;
}

// What the compiled kernels register themselves with.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  names()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  if (stream != reinterpret_cast<cudaStream_t>(0x57)) return cudaErrorInvalidResourceHandle;
  const char* name = names().at(stub).c_str();
  return static_cast<cudaError_t>(callback(name, grid.x, grid.y, block.x, arguments[0], shared_bytes));
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount                ? processors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? shared_per_block
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? shared_per_block + 1024
           : attribute == cudaDevAttrComputeCapabilityMajor           ? arch / 10
           : attribute == cudaDevAttrComputeCapabilityMinor           ? arch % 10
                                                                      : -1;
  return static_cast<cudaError_t>(next_error);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // as CPU tensors have it
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInsufficientDriver ? "the driver is too old" : "no reason";
}

}  // extern "C"
