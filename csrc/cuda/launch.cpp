#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "score.h"

namespace pk::cuda {
namespace {

constexpr float kLog2E = 1.442695041f;

template <class... Values>
Failure failure(const char* format, Values... values) {
  static thread_local char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t group_of(const Attention& p) { return p.heads / p.kv_heads; }

int64_t longest_queries(const Attention& p) { return p.cu_seqlens_q ? p.longest_queries : p.queries; }

int head_dim(const Attention& p) { return static_cast<int>(std::max(p.dim, p.value_dim)); }

bool has_score(const Attention& p) { return p.softcap > 0 || p.dropout_p > 0; }

// Blocks of each tile of rows of the longest sequence.
int64_t row_blocks(const Attention& p, int block_m) {
  return divide_up(longest_queries(p) * group_of(p), block_m) * p.batch * p.kv_heads;
}

struct Shape {
  int64_t x, y;
  int threads, shared_bytes;
};

template <class Arguments>
Failure launch(const char* name, void (*kernel)(Arguments), const Shape& shape, Arguments arguments,
               const Attention& p, const Target& target) {
  constexpr int64_t kMaxX = std::numeric_limits<int32_t>::max(), kMaxY = 65535;
  if (shape.x == 0 || shape.y == 0) return nullptr;
  cudaError_t status = cudaSuccess;
  if (shape.x > kMaxX || shape.y > kMaxY) status = cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  }
  if (status == cudaSuccess) {
    void* pointers[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y));
    status = cudaLaunchKernel(function, grid, dim3(shape.threads), pointers, shape.shared_bytes,
                              static_cast<cudaStream_t>(target.stream));
  }
  cudaGetLastError();  // told here; not left for the next one to find
  if (status == cudaSuccess) return nullptr;
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  return failure(
      "%s of %s B %lld, H %lld, Hkv %lld, M %lld, N %lld, D %lld, Dv %lld on device %d failed: %s "
      "(grid %lld x %lld, %d threads, %d of %d bytes of shared memory)",
      name, p.dtype == DType::kFloat16 ? "float16" : "bfloat16", number(p.batch), number(p.heads),
      number(p.kv_heads), number(p.queries), number(p.keys), number(p.dim), number(p.value_dim),
      target.device, cudaGetErrorString(status), number(shape.x), number(shape.y), shape.threads,
      shape.shared_bytes, target.kind.shared_limit);
}

Failure no_kernel(const char* direction, int64_t dim, const Kind& kind) {
  return failure("no %s kernel for head dim %lld with %d bytes of shared memory", direction,
                 static_cast<long long>(dim), kind.shared_limit);
}

// What forward and backward are told alike.
template <class Arguments>
Arguments common_arguments(const Attention& p) {
  Arguments a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.out = p.out;
  a.lse = p.lse;
  a.kv_heads = static_cast<int32_t>(p.kv_heads);
  a.group = static_cast<int32_t>(group_of(p));
  a.queries = static_cast<int32_t>(longest_queries(p));
  a.keys = static_cast<int32_t>(p.cu_seqlens_k ? p.longest_keys : p.keys);
  a.dim = static_cast<int32_t>(p.dim);
  a.value_dim = static_cast<int32_t>(p.value_dim);
  a.q_offset = p.q_offset;
  a.q_offsets = p.q_offsets;
  a.key_mask = reinterpret_cast<const uint8_t*>(p.key_mask);
  a.key_mask_batch_stride = p.key_mask_batch_stride;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  // The soft cap applies to the natural score; otherwise the scale joins the exponent's own factor.
  const bool is_capped = p.softcap > 0;
  constexpr double kLargest = std::numeric_limits<float>::max();
  a.exponent = static_cast<float>(is_capped ? 1.0 : p.scale) * kLog2E;
  a.softcap = static_cast<float>(p.softcap);
  a.capped_scale =
      is_capped ? static_cast<float>(std::clamp(p.scale / p.softcap, -kLargest, kLargest)) : 0.0f;
  a.dropout_seed = p.dropout_p > 0 ? p.dropout_seed_at : nullptr;
  a.dropout_threshold = dropout_threshold(p.dropout_p);
  a.keep_factor = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  return a;
}

#ifdef PK_HAS_HOPPER  // whose own kernels are compiled for it alone
bool takes_hopper(const Kind& kind, int64_t dim) { return kind.arch == 90 && dim > 32 && dim <= 128; }
#endif

const ForwardKernel* forward_kernel_of(DType dtype, int64_t dim, int64_t rows, bool has_score,
                                       const Kind& kind) {
#ifdef PK_HAS_HOPPER
  if (takes_hopper(kind, dim) && rows > kFewRows) {
    return hopper::forward_kernel(dtype, static_cast<int>(dim), has_score);
  }
#endif
  return forward_kernel(dtype, static_cast<int>(dim), rows, has_score, kind.shared_limit);
}

const BackwardKernel* backward_kernel_of(DType dtype, int64_t dim, bool has_score, const Kind& kind) {
#ifdef PK_HAS_HOPPER
  if (takes_hopper(kind, dim)) return hopper::backward_kernel(dtype, static_cast<int>(dim), has_score);
#endif
  const BackwardKernel* kernel = backward_kernel(dtype, static_cast<int>(dim), has_score);
  return kernel && kernel->shared_bytes <= kind.shared_limit ? kernel : nullptr;
}

}  // namespace

Failure count_devices(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : failure("%s", cudaGetErrorString(status));
}

Failure find_device(Device* device) {
  int index = 0;
  cudaError_t status = cudaGetDevice(&index);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, index);
    return value;
  };
  *device = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
             10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor)};
  cudaFuncAttributes attributes;
  const void* kernel = reinterpret_cast<const void*>(combine_kernel(DType::kBFloat16));
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : failure("%s", cudaGetErrorString(status));
}

Failure find_forward_tile(DType dtype, int64_t dim, int64_t rows, bool has_score, const Kind& kind,
                          Tile* tile) {
  const ForwardKernel* kernel = forward_kernel_of(dtype, dim, rows, has_score, kind);
  if (!kernel) return no_kernel("forward", dim, kind);
  *tile = {kernel->block_m, kernel->block_n, kernel->threads, kernel->shared_bytes, 0, 0};
  return nullptr;
}

Failure find_backward_tile(DType dtype, int64_t dim, bool has_score, const Kind& kind, Tile* tile) {
  const BackwardKernel* kernel = backward_kernel_of(dtype, dim, has_score, kind);
  if (!kernel) return no_kernel("backward", dim, kind);
  *tile = {kernel->block_m,      kernel->block_n,    kernel->threads,
           kernel->shared_bytes, kernel->tile_bytes, kernel->slab_floats};
  return nullptr;
}

int64_t count_row_tiles(const Attention& p, int block_m) {
  // Of each example; packed, of all sequences, each of which may waste a part of one.
  if (p.cu_seqlens_q) return (group_of(p) * p.queries / block_m + p.batch) * p.kv_heads;
  return divide_up(group_of(p) * p.queries, block_m) * p.kv_heads * p.batch;
}

Failure attention_forward(const Attention& p, const Parts& parts, const Target& target) {
  const ForwardKernel* kernel =
      forward_kernel_of(p.dtype, head_dim(p), longest_queries(p) * group_of(p), has_score(p), target.kind);
  if (!kernel) return no_kernel("forward", head_dim(p), target.kind);
  auto arguments = common_arguments<ForwardArguments>(p);
  if (p.softcap == 0) {  // the sign goes into the query; a scale of 0 becomes tiny: -inf * 0 is NaN
    arguments.query_sign = p.scale < 0 ? 0x80008000u : 0;
    arguments.exponent =
        std::max(static_cast<float>(std::fabs(p.scale)), std::numeric_limits<float>::min()) * kLog2E;
  }
  const int64_t rows = p.queries;  // of a head, all sequences'
  const int64_t batch_rows = p.cu_seqlens_q ? 0 : p.heads * rows;
  const int64_t all_rows = p.cu_seqlens_q ? p.heads * rows : p.batch * batch_rows;
  if (parts.splits > 1) {
    arguments.out = {parts.outs, batch_rows * p.value_dim, rows * p.value_dim, p.value_dim};
    arguments.lse = {parts.lses, batch_rows, rows, 1};
    arguments.out_split_stride = all_rows * p.value_dim;
    arguments.lse_split_stride = all_rows;
  }
  const Shape shape{row_blocks(p, kernel->block_m), parts.splits, kernel->threads, kernel->shared_bytes};
  const Failure failed = launch("attention_forward", kernel->kernel, shape, arguments, p, target);
  if (failed || parts.splits == 1) return failed;

  CombineArguments merged{};
  merged.parts = parts.outs;
  merged.part_lses = parts.lses;
  merged.out = p.out;
  merged.lse = static_cast<float*>(p.lse.data);
  merged.rows = all_rows;
  merged.heads = static_cast<int32_t>(p.heads);
  merged.queries = static_cast<int32_t>(rows);
  merged.value_dim = arguments.value_dim;
  merged.splits = parts.splits;
  const Shape combine{divide_up(all_rows, kCombineRows), 1, kCombineThreads, 0};
  return launch("combine_splits", combine_kernel(p.dtype), combine, merged, p, target);
}

Failure attention_backward(const Attention& p, const AttentionGradient& gradient, const Workspace& workspace,
                           const Target& target) {
  const BackwardKernel* kernel = backward_kernel_of(p.dtype, head_dim(p), has_score(p), target.kind);
  if (!kernel) return no_kernel("backward", head_dim(p), target.kind);
  auto arguments = common_arguments<BackwardArguments>(p);
  arguments.dout = gradient.dout;
  arguments.dlse = gradient.dlse;
  arguments.dquery = gradient.dquery;
  arguments.dkey = gradient.dkey;
  arguments.dvalue = gradient.dvalue;
  arguments.scale = static_cast<float>(p.scale);
  const int64_t heads = p.kv_heads * (p.cu_seqlens_q ? 1 : p.batch);
  arguments.row_tiles = static_cast<int32_t>(heads > 0 ? count_row_tiles(p, kernel->block_m) / heads : 0);
  arguments.runs = workspace.runs;
  arguments.tiles = workspace.tiles;
  arguments.slabs = workspace.slabs;

  const Shape rows{row_blocks(p, kernel->block_m), 1, kernel->row_threads, 0};
  const Shape keys{workspace.runs * p.batch * p.kv_heads, 1, kernel->threads, kernel->shared_bytes};
  Failure failed = launch("pack_rows", kernel->pack, rows, arguments, p, target);
  if (!failed) failed = launch("attention_backward", kernel->attention, keys, arguments, p, target);
  if (!failed) failed = launch("reduce_slabs", kernel->reduce, rows, arguments, p, target);
  return failed;
}

}  // namespace pk::cuda
