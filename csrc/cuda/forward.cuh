// The forward kernel, split over keys, and the kernel that merges the splits.
//
// A block owns kBlockM packed rows of one key head (row r is query r / group of head r % group, so that all
// heads of a group share each load of keys and values) and one run of key blocks. Algorithm: Dao et al. 2022
// (arXiv 2205.14135).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/forward.h"
#include "cuda/mma.cuh"
#include "cuda/softmax.cuh"
#include "cuda/work.cuh"
#include "score.h"

namespace pk::cuda {

// How a block's work is shared out. kKeyWarps of the warps share the same rows and take each its part of the
// keys.
template <class ElementType, int kDimension, int kRows, int kKeys, int kRowWarps, int kKeyWarps_, int kSlots,
          bool kQueryRegisters>
struct ForwardTile {
  using Element = ElementType;
  static constexpr int kDim = kDimension, kBlockM = kRows, kBlockN = kKeys, kStages = kSlots;
  static constexpr int kKeyWarps = kKeyWarps_, kThreads = 32 * kRowWarps * kKeyWarps;
  static constexpr int kRowTiles = kBlockM / kRowWarps / 16;
  static constexpr int kKeyTiles = kBlockN / kKeyWarps / 8;
  static constexpr bool kQueryInRegisters = kQueryRegisters;
  static constexpr int kQueryBytes = 2 * kBlockM * kDim;
  static constexpr int kKeyBytes = 2 * kBlockN * kDim;  // of one slot, of keys or of values
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kKeyBytes;
  static_assert(kBlockM % (16 * kRowWarps) == 0 && kBlockN % (16 * kKeyWarps) == 0 && kBlockN <= 64,
                "whole tiles");
};

// kHasScore: softcap or dropout. Dynamic shared memory: Shape::kSharedBytes; grid: row blocks x batch x
// kv_heads, splits.
template <class Shape, bool kHasScore>
__global__ void __launch_bounds__(Shape::kThreads) attention_forward(const ForwardArguments arguments) {
  using Element = typename Shape::Element;
  constexpr int kDim = Shape::kDim, kBlockN = Shape::kBlockN, kStages = Shape::kStages;
  constexpr int kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kKeyTiles;
  extern __shared__ __align__(128) unsigned char shared[];

  const int group = arguments.group;
  const int row_blocks = (arguments.queries * group + Shape::kBlockM - 1) / Shape::kBlockM;
  const Example work = find_example(arguments, blockIdx.x / row_blocks);
  const int first_row = blockIdx.x % row_blocks * Shape::kBlockM, rows = work.queries * group;
  if (first_row >= rows) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Shape::kKeyWarps * kRowTiles * 16;  // within the block's rows
  const int warp_key = warp % Shape::kKeyWarps * kKeyTiles * 8;   // within each key block
  const int thread_key = warp_key + lane % 4 * 2;                 // this thread's first key and row
  const int row = first_row + warp_row + lane / 4;
  const uint32_t query_tile = shared_address(shared);
  const uint32_t key_tiles = query_tile + Shape::kQueryBytes;
  const uint32_t value_tiles = key_tiles + kStages * Shape::kKeyBytes;

  // Blocks of keys: this split's that some row of this block sees; those that all of its rows see whole.
  const int last_row = min(first_row + Shape::kBlockM, rows) - 1;
  const int seen = visible_keys(work.q_offset, last_row / group, work.keys);
  const int seen_by_all = visible_keys(work.q_offset, first_row / group, work.keys);
  const int split_blocks = ((work.keys + kBlockN - 1) / kBlockN + gridDim.y - 1) / gridDim.y;
  const int split = blockIdx.y, start = split * split_blocks;
  const int stop = min(start + split_blocks, (seen + kBlockN - 1) / kBlockN);
  // Whatever the loop without masks copies ahead is whole too.
  const bool has_mask = arguments.key_mask != nullptr;
  const int full =
      has_mask ? start : min(min(stop, work.seen_by_any / kBlockN) - kStages, seen_by_all / kBlockN);

  const Copier<kDim, Shape::kBlockM, Shape::kThreads> query_copier;
  const Copier<kDim, kBlockN, Shape::kThreads> copier;
  const int64_t copied_row = work.first_key + static_cast<int64_t>(start) * kBlockN + copier.row;
  const uint16_t* next_key =
      at<uint16_t>(arguments.key, work.batch, work.kv_head, copied_row) + copier.column;
  const uint16_t* next_value =
      at<uint16_t>(arguments.value, work.batch, work.kv_head, copied_row) + copier.column;
  const uint8_t* key_mask = find_key_mask(arguments, work);

  // Tiles are copied in order, each into the slot that its predecessor kStages blocks ago has left.
  auto copy_ahead = [&](int block, uint32_t tiles, const uint16_t*& next, const View& view, int dim,
                        auto is_masked) {
    constexpr bool kMasked = decltype(is_masked)::value;
    if (!kMasked || block < stop) {
      const uint64_t keys = kMasked ? find_keys<kBlockN>(key_mask, block * kBlockN, work.seen_by_any) : 0;
      const uint32_t tile = tiles + (block - start) % kStages * Shape::kKeyBytes;
      copier.template copy_tile<kMasked>(tile, next, view.row_stride, dim, keys);
    }
    commit_copies();
  };
  auto copy_keys = [&](int block, auto is_masked) {
    copy_ahead(block, key_tiles, next_key, arguments.key, arguments.dim, is_masked);
  };
  auto copy_values = [&](int block, auto is_masked) {
    copy_ahead(block, value_tiles, next_value, arguments.value, arguments.value_dim, is_masked);
  };

#pragma unroll
  for (int step = 0; step < query_copier.kSteps; ++step) {
    int r = first_row + query_copier.row + step * query_copier.kRowStep;
    query_copier.copy_row(query_tile, step,
                          at<uint16_t>(arguments.query, work.batch, work.kv_head * group + r % group,
                                       work.first_query + r / group) +
                              query_copier.column,
                          arguments.dim, r < rows);
  }
  commit_copies();
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    copy_keys(start + stage, std::true_type());
    if (stage < kStages - 1) copy_values(start + stage, std::true_type());
  }

  if (arguments.query_sign != 0) {
    wait_for_copies<2 * kStages - 1>();
    query_copier.flip_signs(query_tile, arguments.query_sign);
  }
  LeftOperand<kDim, kRowTiles, Shape::kQueryInRegisters> query;
  wait_for_copies<2 * kStages - 1>();
  query.load_all(query_tile + warp_row * Tile<kDim>::kRowBytes + lane_offset<kDim>(lane));

  const uint32_t my_keys = key_tiles + warp_key * Tile<kDim>::kRowBytes + lane_offset_of_columns<kDim>(lane);
  const uint32_t my_values = value_tiles + warp_key * Tile<kDim>::kRowBytes + lane_offset<kDim>(lane);
  OnlineSoftmax<kRowTiles> softmax;
  Accumulator sums[kRowTiles][kDim / 8] = {};
  int limits[kRowTiles][2];  // how many keys each of this thread's rows sees

  // One step of the online softmax. Two loops over this body: only the second carries mask code.
  auto attend = [&](int block, auto is_masked) {
    constexpr bool kMasked = decltype(is_masked)::value;
    const uint32_t slot = (block - start) % kStages * Shape::kKeyBytes;
    Accumulator scores[kRowTiles][kKeyTiles];
    wait_for_copies<2 * kStages - 2>();
    copy_values(block + kStages - 1, is_masked);
    multiply_scores<Element, kDim>(scores, query, my_keys + slot);
    if (kHasScore && arguments.softcap > 0.0f) cap_scores(scores, arguments.softcap, arguments.capped_scale);
    if constexpr (kMasked) {
      const uint64_t keys = find_keys<kBlockN>(key_mask, block * kBlockN, work.seen_by_any);
      const bool all_there = keys == ~uint64_t{0} >> (64 - kBlockN);
      if (!all_there || (block + 1) * kBlockN > seen_by_all) {
        mask_scores(scores, keys >> thread_key, limits, block * kBlockN + thread_key);
      }
    }
    softmax.raise_maximum(scores, arguments.exponent, sums);
    softmax.weigh(scores, arguments.exponent);
    if (kHasScore && arguments.dropout_seed != nullptr) {
      const uint32_t first_key = static_cast<uint32_t>(arguments.dropout_seed[1]);
      drop_weights(scores, arguments.dropout_seed[0], arguments.dropout_threshold, work.batch,
                   work.kv_head * group, group, row, first_key + block * kBlockN + thread_key);
    }
    wait_for_copies<2 * kStages - 2>();
    copy_keys(block + kStages, is_masked);
    add_weighted<Element, kDim>(sums, scores, my_values + slot);
  };

  int block = start;
  for (; block < full; ++block) attend(block, std::false_type());
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limits[m][h] = visible_keys(work.q_offset, (row + m * 16 + h * 8) / group, work.keys);
    }
  }
  for (; block < stop; ++block) attend(block, std::true_type());

  softmax.finish();
  const bool has_parts = gridDim.y > 1;
  auto store = [&](const auto& results, int first_tile, bool owns_lse) {
    if (has_parts) {
      store_rows<float>(arguments, work, split, softmax, results, row, first_tile, owns_lse);
    } else {
      store_rows<Element>(arguments, work, split, softmax, results, row, first_tile, owns_lse);
    }
  };
  if constexpr (Shape::kKeyWarps == 1) {
    store(sums, 0, true);
  } else {
    using Warps = KeyWarps<Shape::kKeyWarps, kDim / 8>;
    static_assert(kRowTiles == 1 && Shape::kBlockM == 16 && Warps::kMergeBytes <= Shape::kSharedBytes, "");
    Accumulator merged[1][kDim / 8 / Shape::kKeyWarps];
    __syncthreads();
    Warps::merge(sums, softmax, warp, shared, merged);
    store(merged, warp * (kDim / 8 / Shape::kKeyWarps), warp == 0);
  }
}

}  // namespace pk::cuda
