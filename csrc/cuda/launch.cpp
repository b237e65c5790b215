#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda/forward.h"
#include "score.h"

namespace pk::cuda {
namespace {

constexpr float kLog2E = 1.442695041f;
constexpr int kCombineThreads = 128, kCombineRows = 4;  // of a block

template <class... Values>
Failure failure(const char* format, Values... values) {
  static thread_local char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

// This thread's device, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status = cudaGetDevice(&previous_);
    has_moved_ = status == cudaSuccess && previous_ != device;
    if (has_moved_) status = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (has_moved_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status;

 private:
  int previous_ = 0;
  bool has_moved_ = false;
};

struct Grid {
  int64_t x, y;
};

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), Grid grid, int threads, int shared_bytes, Arguments arguments,
                   const Target& target) {
  constexpr int64_t kMaxX = std::numeric_limits<int32_t>::max(), kMaxY = 65535;
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (grid.x > kMaxX || grid.y > kMaxY) return cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  void* pointers[] = {&arguments};
  if (status == cudaSuccess) {
    status =
        cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)),
                         dim3(threads), pointers, shared_bytes, static_cast<cudaStream_t>(target.stream));
  }
  cudaGetLastError();  // returned above; not left for the next one to find
  return status;
}

const char* name_of(DType dtype) { return dtype == DType::kFloat16 ? "float16" : "bfloat16"; }

Failure failed_launch(const char* kernel, const Attention& p, Grid grid, int threads, int shared_bytes,
                      const Target& target, cudaError_t status) {
  return failure(
      "%s of %s B %lld, H %lld, Hkv %lld, M %lld, N %lld, D %lld, Dv %lld on device %d failed: %s "
      "(grid %lld x %lld, %d threads, %d of %d bytes of shared memory)",
      kernel, name_of(p.dtype), static_cast<long long>(p.batch), static_cast<long long>(p.heads),
      static_cast<long long>(p.kv_heads), static_cast<long long>(p.queries), static_cast<long long>(p.keys),
      static_cast<long long>(p.dim), static_cast<long long>(p.value_dim), target.device,
      cudaGetErrorString(status), static_cast<long long>(grid.x), static_cast<long long>(grid.y), threads,
      shared_bytes, target.shared_limit);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t longest_queries(const Attention& p) { return p.cu_seqlens_q ? p.longest_queries : p.queries; }

const ForwardKernel* kernel_of(const Attention& p, int shared_limit) {
  return forward_kernel(p.dtype, static_cast<int>(std::max(p.dim, p.value_dim)),
                        longest_queries(p) * (p.heads / p.kv_heads), p.softcap > 0 || p.dropout_p > 0,
                        shared_limit);
}

ForwardArguments arguments_of(const Attention& p, const Parts& parts) {
  const bool packed = p.cu_seqlens_q != nullptr;
  ForwardArguments a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.out = p.out;
  a.lse = p.lse;
  if (parts.splits > 1) {
    const int64_t rows = p.lse.head_stride, batch_rows = packed ? 0 : p.heads * rows;
    const int64_t all_rows = packed ? p.heads * rows : p.batch * batch_rows;
    a.out = {parts.outs, batch_rows * p.value_dim, rows * p.value_dim, p.value_dim};
    a.lse = {parts.lses, batch_rows, rows, 1};
    a.out_split_stride = all_rows * p.value_dim;
    a.lse_split_stride = all_rows;
  }
  a.kv_heads = static_cast<int32_t>(p.kv_heads);
  a.group = static_cast<int32_t>(p.heads / p.kv_heads);
  a.queries = static_cast<int32_t>(longest_queries(p));
  a.keys = static_cast<int32_t>(packed ? p.longest_keys : p.keys);
  a.dim = static_cast<int32_t>(p.dim);
  a.value_dim = static_cast<int32_t>(p.value_dim);
  a.q_offset = p.q_offset;
  a.q_offsets = p.q_offsets;
  a.key_mask = reinterpret_cast<const uint8_t*>(p.key_mask);
  a.key_mask_batch_stride = p.key_mask_batch_stride;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  // The soft cap is applied to the natural score; otherwise the scale joins the exponent's own factor, and
  // its sign the query. A scale of 0 becomes the smallest normal number: -inf * 0 is NaN.
  const bool is_capped = p.softcap > 0;
  const double scale = is_capped ? 1.0 : std::fabs(p.scale);
  a.exponent = std::max(static_cast<float>(scale), std::numeric_limits<float>::min()) * kLog2E;
  a.query_sign = p.scale < 0 && !is_capped ? 0x80008000u : 0;
  a.softcap = static_cast<float>(p.softcap);
  constexpr double kLargest = std::numeric_limits<float>::max();
  a.capped_scale =
      is_capped ? static_cast<float>(std::clamp(p.scale / p.softcap, -kLargest, kLargest)) : 0.0f;
  a.dropout_seed = p.dropout_p > 0 ? p.dropout_seed_at : nullptr;
  a.dropout_threshold = dropout_threshold(p.dropout_p);
  a.keep_factor = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  return a;
}

}  // namespace

Failure find_device(int index, Device* device) {
  if (index < 0) cudaGetDevice(&index);
  DeviceGuard guard(index);
  cudaError_t status = guard.status;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, index);
    return value;
  };
  *device = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  cudaFuncAttributes attributes;
  const void* kernel = reinterpret_cast<const void*>(combine_kernel(DType::kBFloat16));
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : failure("%s", cudaGetErrorString(status));
}

Failure find_forward_tile(DType dtype, int64_t dim, int64_t rows, bool has_score, int64_t shared_limit,
                          Tile* tile) {
  const ForwardKernel* kernel =
      forward_kernel(dtype, static_cast<int>(dim), rows, has_score, static_cast<int>(shared_limit));
  if (!kernel) {
    return failure("no forward kernel for head dim %lld with %lld bytes of shared memory",
                   static_cast<long long>(dim), static_cast<long long>(shared_limit));
  }
  *tile = {kernel->block_m, kernel->block_n, kernel->threads, kernel->shared_bytes};
  return nullptr;
}

Failure attention_forward(const Attention& p, const Parts& parts, const Target& target) {
  const ForwardKernel* kernel = kernel_of(p, target.shared_limit);
  if (!kernel) {
    return failure("no forward kernel for head dims %lld and %lld with %d bytes of shared memory",
                   static_cast<long long>(p.dim), static_cast<long long>(p.value_dim), target.shared_limit);
  }
  const ForwardArguments arguments = arguments_of(p, parts);
  DeviceGuard guard(target.device);
  const int64_t rows = static_cast<int64_t>(arguments.queries) * arguments.group;
  Grid grid{divide_up(rows, kernel->block_m) * p.batch * p.kv_heads, parts.splits};
  cudaError_t status = guard.status;
  if (status == cudaSuccess)
    status = launch(kernel->kernel, grid, kernel->threads, kernel->shared_bytes, arguments, target);
  if (status != cudaSuccess) {
    return failed_launch("attention_forward", p, grid, kernel->threads, kernel->shared_bytes, target, status);
  }
  if (parts.splits == 1) return nullptr;

  CombineArguments merged{};
  merged.parts = parts.outs;
  merged.part_lses = parts.lses;
  merged.out = p.out;
  merged.lse = static_cast<float*>(p.lse.data);
  merged.rows = arguments.lse_split_stride;
  merged.heads = static_cast<int32_t>(p.heads);
  merged.queries = static_cast<int32_t>(p.lse.head_stride);
  merged.value_dim = arguments.value_dim;
  merged.splits = parts.splits;
  grid = {divide_up(merged.rows, kCombineRows), 1};
  status = launch(combine_kernel(p.dtype), grid, kCombineThreads, 0, merged, target);
  if (status == cudaSuccess) return nullptr;
  return failed_launch("combine_splits", p, grid, kCombineThreads, 0, target, status);
}

}  // namespace pk::cuda
