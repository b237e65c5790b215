// What the forward kernels are given. No torch and no CUDA here.
#pragma once

#include <cstdint>

#include "attention.h"

namespace pk::cuda {

// One call, as every block sees it. Rows of query, key and value begin at multiples of 16 bytes, dim and
// value_dim are multiples of 8, keys + queries and group * queries are less than 2^31. Packed (cu_seqlens),
// queries and keys are those of the longest sequences.
struct ForwardArguments {
  View query, key, value;
  View out;  // the inputs' type; float where there are several splits, one part for each
  View lse;  // float
  int64_t out_split_stride, lse_split_stride;
  int32_t kv_heads, group;  // group: query heads of a key head
  int32_t queries, keys, dim, value_dim;

  // Key j is visible to query i iff key_mask[j] (where given) and j <= q_offset + i.
  int64_t q_offset;
  const int64_t* q_offsets;  // (batch,), replaces q_offset
  const uint8_t* key_mask;   // (batch, keys), or (all keys,) packed
  int64_t key_mask_batch_stride;
  const int64_t* cu_seqlens_q;  // (batch + 1,)
  const int64_t* cu_seqlens_k;

  // exp(score) = 2^(exponent * x) with x = q . k, or softcap * tanh(q . k * capped_scale) where softcap > 0.
  float exponent;       // positive: a scale of 0 becomes the smallest normal number
  uint32_t query_sign;  // 0x80008000 where a negative scale's sign goes into the query, else 0
  float softcap, capped_scale;

  const int64_t* dropout_seed;  // the seed and what key 0 is called in the counter; null: no dropout
  uint32_t dropout_threshold;
  float keep_factor;  // 1 / (1 - dropout_p)
};

// Merges float parts (splits, batch, heads, queries, value_dim) and their lse (splits, batch, heads,
// queries).
struct CombineArguments {
  const float *parts, *part_lses;
  View out;
  float* lse;
  int64_t rows;  // batch * heads * queries
  int32_t heads, queries, value_dim, splits;
};

// A compiled forward kernel. Grid: row blocks x batch x kv_heads, splits.
struct ForwardKernel {
  int dim;  // the longest head dim that it serves, of queries or of values
  int block_m, block_n, threads, shared_bytes;
  void (*kernel)(ForwardArguments);
};

constexpr int kFewRows = 16;  // up to here memory binds

// The one for this many packed rows, queries * group; null beyond a head dim of 256, or where a block may not
// have the shared memory. has_score: softcap or dropout.
const ForwardKernel* forward_kernel(DType dtype, int dim, int64_t rows, bool has_score, int shared_limit);

// For Hopper, whose own instructions it needs, up to a head dim of 128. Worth it for many rows.
namespace hopper {
const ForwardKernel* forward_kernel(DType dtype, int dim, bool has_score);
}

constexpr int kCombineThreads = 128, kCombineRows = kCombineThreads / 32;  // of a block
using CombineKernel = void (*)(CombineArguments);  // grid: rows / kCombineRows, rounded up
CombineKernel combine_kernel(DType dtype);

}  // namespace pk::cuda
