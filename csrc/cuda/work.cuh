// Which rows and keys a block has, and which of the keys are there for anybody to see.
#pragma once

#include <cstdint>

#include "cuda/forward.h"
#include "score.h"

namespace pk::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The example's place and what of it this block has to do.
struct Work {
  int batch, kv_head, split, first_row;
  int64_t first_query, first_key;  // of the example, in a packed tensor
  int queries, keys, q_offset;
  int seen_by_any;  // keys that some query of the example sees
};

__device__ __forceinline__ Work find_work(const ForwardArguments& arguments, int block_rows) {
  Work work;
  int rows = arguments.queries * arguments.group;
  int row_blocks = (rows + block_rows - 1) / block_rows;
  int head = blockIdx.x / row_blocks;
  work.first_row = blockIdx.x % row_blocks * block_rows;
  work.batch = head / arguments.kv_heads;
  work.kv_head = head % arguments.kv_heads;
  work.split = blockIdx.y;
  work.first_query = work.first_key = 0;
  work.queries = arguments.queries;
  work.keys = arguments.keys;
  if (arguments.cu_seqlens_q != nullptr) {
    work.first_query = arguments.cu_seqlens_q[work.batch];
    work.first_key = arguments.cu_seqlens_k[work.batch];
    work.queries = static_cast<int>(arguments.cu_seqlens_q[work.batch + 1] - work.first_query);
    work.keys = static_cast<int>(arguments.cu_seqlens_k[work.batch + 1] - work.first_key);
  }
  // Beyond [-queries, keys] an offset makes no difference.
  int64_t q_offset = arguments.q_offsets != nullptr ? arguments.q_offsets[work.batch] : arguments.q_offset;
  q_offset = q_offset < -work.queries ? -work.queries : q_offset;
  work.q_offset = static_cast<int>(q_offset < work.keys ? q_offset : work.keys);
  work.seen_by_any = static_cast<int>(visible_keys(work.q_offset, work.queries - 1, work.keys));
  return work;
}

// Bit j: whether key first + j is there for anybody to see. What isn't may hold anything.
template <int kKeys>
__device__ __forceinline__ uint64_t find_keys(const uint8_t* key_mask, int first, int limit) {
  uint64_t found = 0;
#pragma unroll
  for (int start = 0; start < kKeys; start += 32) {
    int j = first + start + threadIdx.x % 32;
    bool is_there = j < limit && (key_mask == nullptr || key_mask[j] != 0);
    found |= static_cast<uint64_t>(__ballot_sync(kAllLanes, is_there)) << start;
  }
  return found;
}

}  // namespace pk::cuda
