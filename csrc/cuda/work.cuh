// Which example a block works on, and which of its keys are there for anybody to see.
#pragma once

#include <cstdint>

#include "attention.h"
#include "score.h"

namespace pk::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// An example's place, and what there is of it.
struct Example {
  int batch, kv_head;
  int64_t first_query, first_key;  // in a packed tensor
  int queries, keys, q_offset;
  int seen_by_any;  // keys that some query sees
};

// `head`: of all key heads of all examples.
template <class Arguments>
__device__ __forceinline__ Example find_example(const Arguments& arguments, int head) {
  Example example;
  example.batch = head / arguments.kv_heads;
  example.kv_head = head % arguments.kv_heads;
  example.first_query = example.first_key = 0;
  example.queries = arguments.queries;
  example.keys = arguments.keys;
  if (arguments.cu_seqlens_q != nullptr) {
    const int64_t *queries = arguments.cu_seqlens_q + example.batch,
                  *keys = arguments.cu_seqlens_k + example.batch;
    example.first_query = queries[0];
    example.first_key = keys[0];
    example.queries = static_cast<int>(queries[1] - queries[0]);
    example.keys = static_cast<int>(keys[1] - keys[0]);
  }
  // Beyond [-queries, keys] an offset makes no difference.
  int64_t q_offset = arguments.q_offsets != nullptr ? arguments.q_offsets[example.batch] : arguments.q_offset;
  q_offset = q_offset < -example.queries ? -example.queries : q_offset;
  example.q_offset = static_cast<int>(q_offset < example.keys ? q_offset : example.keys);
  example.seen_by_any = static_cast<int>(visible_keys(example.q_offset, example.queries - 1, example.keys));
  return example;
}

// The key mask of an example, null where there is none.
template <class Arguments>
__device__ __forceinline__ const uint8_t* find_key_mask(const Arguments& arguments, const Example& example) {
  return arguments.key_mask == nullptr
             ? nullptr
             : arguments.key_mask + example.batch * arguments.key_mask_batch_stride + example.first_key;
}

// A row of an example.
template <class Number>
__device__ __forceinline__ Number* at(const View& view, int batch, int head, int64_t row) {
  return static_cast<Number*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

// What isn't there may hold anything.
template <class Arguments>
__device__ __forceinline__ bool is_there(const Arguments& arguments, const Example& example, int key) {
  const uint8_t* key_mask = find_key_mask(arguments, example);
  return key < example.seen_by_any && (key_mask == nullptr || key_mask[key] != 0);
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
