#include "plan.h"

#include <algorithm>

#include "../score.h"

namespace pk::cpu {
namespace {

constexpr int64_t kRowBlock = 1024;        // query rows whose accumulators stay near the core
constexpr int64_t kItemsPerSequence = 32;  // enough to fill a socket and to even out the last wave
constexpr int64_t kKeysPerItem = 1024;     // fewer would not pay for a partial result
constexpr int64_t kKeyAlignment = 256;     // a multiple of every kernel's key block
constexpr int64_t kSplitBytes = 16 << 20;  // partial results of one key head

int64_t accumulator_bytes(const Attention& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Sequence sequence_at(const Attention& p, int64_t b) {
  // Beyond these bounds an offset says the same, and would overflow.
  const int64_t offset = std::clamp(p.q_offsets ? p.q_offsets[b] : p.q_offset, -kNoCausality, kNoCausality);
  Sequence s{b, p.queries, p.keys, 0, 0, offset};
  if (p.cu_seqlens_q) {
    s.first_query_row = p.cu_seqlens_q[b];
    s.first_key_row = p.cu_seqlens_k[b];
    s.queries = p.cu_seqlens_q[b + 1] - s.first_query_row;
    s.keys = p.cu_seqlens_k[b + 1] - s.first_key_row;
  }
  return s;
}

void split(Plan::Block* block, int64_t keys, int64_t blocks_of_sequence, int64_t bytes_per_split) {
  const int64_t wanted = ceil_div(kItemsPerSequence, blocks_of_sequence);
  const int64_t affordable = std::max<int64_t>(1, kSplitBytes / std::max<int64_t>(1, bytes_per_split));
  const int64_t splits = std::min({wanted, affordable, ceil_div(keys, kKeysPerItem), int64_t{kMaxSplits}});
  block->keys = keys;
  block->keys_per_split =
      ceil_div(ceil_div(keys, std::max<int64_t>(1, splits)), kKeyAlignment) * kKeyAlignment;
  // A block without keys still has an output to write.
  block->splits =
      static_cast<int>(std::max<int64_t>(1, ceil_div(keys, std::max<int64_t>(1, block->keys_per_split))));
}

}  // namespace

Plan plan_forward(const Attention& p) {
  Plan plan;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = sequence_at(p, b);
    const int64_t rows = sequence.queries * group, row_blocks = ceil_div(rows, kRowBlock);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (int64_t first = 0; first < rows; first += kRowBlock) {
        Plan::Block block{{sequence, h, first, std::min(kRowBlock, rows - first)}, 0, 0, 0};
        const int64_t last_query = (first + block.rows.rows - 1) / group;
        split(&block, visible_keys(sequence.q_offset, last_query, sequence.keys), p.kv_heads * row_blocks,
              block.rows.rows * p.value_dim * accumulator_bytes(p));
        plan.blocks.push_back(block);
      }
  }
  return plan;
}

Plan plan_backward(const Attention& p) {
  Plan plan;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = sequence_at(p, b);
    const int64_t rows = sequence.queries * group;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      Plan::Block block{{sequence, h, 0, rows}, 0, 0, 0};
      split(&block, sequence.keys, p.kv_heads, rows * p.dim * accumulator_bytes(p));
      plan.blocks.push_back(block);
    }
  }
  return plan;
}

}  // namespace pk::cpu
