// The attention problem as one struct, and the calls that solve it. No torch here.
#pragma once

#include <cstdint>

namespace pk {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A (batch, head, row, channel) tensor: strides in elements, channels contiguous.
// In the packed form (cu_seqlens) the batch stride is 0 and rows count through all sequences.
struct View {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// q_offset of a problem without causal mask: every key is visible to every query.
constexpr int64_t kNoCausality = int64_t{1} << 60;

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;

  View query, key, value,
      out;   // rows: queries, keys, keys, queries; channels: dim, dim, value_dim, value_dim
  View lse;  // (batch, head, row), one number each, float (double for kFloat64)

  // Key j is visible to query i iff key_mask[j] (where given) and j <= q_offset + i.
  int64_t q_offset;
  const int64_t* q_offsets = nullptr;  // (batch,), replaces q_offset
  const bool* key_mask = nullptr;
  int64_t key_mask_batch_stride = 0;
  int64_t key_mask_stride = 1;

  const int64_t* cu_seqlens_q = nullptr;  // (batch + 1,), the packed form: queries and keys count all rows
  const int64_t* cu_seqlens_k = nullptr;
  int64_t longest_queries = 0, longest_keys = 0;  // of one sequence, packed; only GPUs need to be told

  double scale;
  double softcap;    // 0: none
  double dropout_p;  // 0: none
  uint64_t dropout_seed = 0;
  int64_t dropout_first_key = 0;             // what key 0 is called in the dropout counter
  const int64_t* dropout_seed_at = nullptr;  // the two in the device's memory, for GPUs
};

struct AttentionGradient {
  View dout;  // like out
  View dlse;  // like lse; data may be null
  View dquery, dkey, dvalue;
};

// Runs body(context, thread) for every thread in [0, threads), on as many threads as the caller owns.
struct ThreadPool {
  int threads;
  void (*run)(int threads, void* context, void (*body)(void* context, int thread));
};

namespace cpu {

// Both throw std::bad_alloc when there is no room for the workspace, before any output is written.
void attention_forward(const Attention& problem, const ThreadPool& pool);
void attention_backward(const Attention& problem, const AttentionGradient& gradient, const ThreadPool& pool);

}  // namespace cpu
}  // namespace pk
