// The forward kernel for Hopper (sm_90a): as cuda/forward.cuh, but that the warps have roles. One warp group
// copies, half of it keys, half of it values; two compute, 64 packed rows each, and take turns: while one's
// products run, the other turns its scores into weights. Roles as in FlashAttention-3 (Shah et al. 2024,
// arXiv 2407.08608).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/forward.h"
#include "cuda/hopper/blocks.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/softmax.cuh"
#include "cuda/work.cuh"

namespace pk::cuda::hopper {

template <class ElementType, int kDimension>
struct ForwardTile {
  using Element = ElementType;
  static constexpr int kDim = kDimension, kBlockM = 128, kBlockN = 128, kSlots = 2;
  static constexpr int kConsumers = kBlockM / 64, kThreads = kGroup * (1 + kConsumers);
  using Rows = Panels<kDim, kBlockM>;
  using Keys = Panels<kDim, kBlockN>;
  static constexpr int kSharedBytes = Rows::kBytes + 2 * kSlots * Keys::kBytes;
};

// Slots of kind 0 hold keys, of kind 1 values. Consumers take turns at the tensor cores.
template <class Shape>
struct ForwardBarriers : SlotBarriers<Shape::kSlots, Shape::kConsumers> {
  __device__ static int turn(int consumer) { return ForwardBarriers::kNext + consumer; }
  static_assert(ForwardBarriers::kNext + Shape::kConsumers <= 16, "the hardware's");
};

// kHasScore: softcap or dropout. Dynamic shared memory: Shape::kSharedBytes; grid: row blocks x batch x
// kv_heads, splits.
template <class Shape, bool kHasScore>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_forward(const ForwardArguments arguments) {
  using Element = typename Shape::Element;
  using Barriers = ForwardBarriers<Shape>;
  using RowPanels = typename Shape::Rows;
  using KeyPanels = typename Shape::Keys;
  constexpr int kDim = Shape::kDim, kBlockN = Shape::kBlockN, kSlots = Shape::kSlots;
  extern __shared__ __align__(1024) unsigned char shared[];

  const int group = arguments.group;
  const int row_blocks = (arguments.queries * group + Shape::kBlockM - 1) / Shape::kBlockM;
  const Example work = find_example(arguments, blockIdx.x / row_blocks);
  const int first_row = blockIdx.x % row_blocks * Shape::kBlockM, rows = work.queries * group;
  if (first_row >= rows) return;
  const uint32_t query_tile = shared_address(shared);
  const uint32_t key_tiles = query_tile + RowPanels::kBytes;
  const uint32_t value_tiles = key_tiles + kSlots * KeyPanels::kBytes;

  // Blocks of keys: this split's that some row of this block sees; those that all of its rows see whole.
  const int last_row = min(first_row + Shape::kBlockM, rows) - 1;
  const int seen = visible_keys(work.q_offset, last_row / group, work.keys);
  const int seen_by_all = visible_keys(work.q_offset, first_row / group, work.keys);
  const int split_blocks = ((work.keys + kBlockN - 1) / kBlockN + gridDim.y - 1) / gridDim.y;
  const int split = blockIdx.y, start = split * split_blocks;
  const int stop = min(start + split_blocks, (seen + kBlockN - 1) / kBlockN);

  if (threadIdx.x < kGroup) {  // copies
    give_registers<40>();
    const int kind = threadIdx.x / Barriers::kCopiers, thread = threadIdx.x % Barriers::kCopiers;
    const uint32_t slots = kind == 0 ? key_tiles : value_tiles;
    BlockCopier<KeyPanels, 4> copier(work, kind == 0 ? arguments.key : arguments.value,
                                     kind == 0 ? arguments.dim : arguments.value_dim, thread,
                                     start * kBlockN);
    if (kind == 0 && start < stop) {
      const Copier<64, Shape::kBlockM, Barriers::kCopiers> rows_copier(thread);
      for (int step = 0; step < rows_copier.kSteps; ++step) {
        const int r = first_row + rows_copier.row + step * rows_copier.kRowStep;
        const uint16_t* source = at<uint16_t>(arguments.query, work.batch, work.kv_head * group + r % group,
                                              work.first_query + r / group) +
                                 rows_copier.column;
#pragma unroll
        for (int panel = 0; panel < RowPanels::kCount; ++panel) {
          rows_copier.copy_row(query_tile + panel * RowPanels::kPanelBytes, step, source + panel * 64,
                               arguments.dim - panel * 64, r < rows);
        }
      }
      if (arguments.query_sign != 0) {
        wait_for_own_copies();
        for (int panel = 0; panel < RowPanels::kCount; ++panel) {
          rows_copier.flip_signs(query_tile + panel * RowPanels::kPanelBytes, arguments.query_sign);
        }
      }
    }
    for (int block = start; block < stop; ++block) {
      const int slot = (block - start) % kSlots;
      if (block >= start + kSlots) await<Barriers::kEmptyThreads>(Barriers::empty(kind, slot));
      copier.copy(slots + slot * KeyPanels::kBytes, arguments, work, block * kBlockN);
      Barriers::fill(kind, slot);
    }
    return;
  }

  take_registers<232>();
  const int consumer = threadIdx.x / kGroup - 1, lane = threadIdx.x % 32;
  const int row = first_row + consumer * 64 + threadIdx.x % kGroup / 32 * 16 + lane / 4;
  const int thread_key = lane % 4 * 2;  // this thread's first within each key block
  const uint32_t my_query = query_tile + consumer * 64 * 128;
  const uint8_t* key_mask = find_key_mask(arguments, work);
  const int full = key_mask != nullptr ? start : min(stop, seen_by_all / kBlockN);
  OnlineSoftmax<1> softmax;
  Accumulator sums[1][kDim / 8] = {};
  Accumulator scores[1][kBlockN / 8];
  Fragment weights[kBlockN / 16];
  int limits[1][2];  // how many keys each of this thread's rows sees
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    limits[0][h] = visible_keys(work.q_offset, (row + h * 8) / group, work.keys);
  }

  auto multiply_scores = [&](int block) {
    const uint32_t keys = key_tiles + (block - start) % kSlots * KeyPanels::kBytes;
    multiply_rows<Element, kDim, Shape::kBlockM, kBlockN>(scores[0], my_query, keys);
  };
  auto add_weighted = [&](int block) {
    add_rows<Element, kDim>(sums[0], weights, value_tiles + (block - start) % kSlots * KeyPanels::kBytes);
  };
  auto await_full = [&](int kind, int block) {
    await<Barriers::kFullThreads>(Barriers::full(kind, (block - start) % kSlots, consumer));
  };
  auto leave = [&](int kind, int block) {  // the slot to the copiers, if they want it
    if (block + kSlots < stop) {
      arrive<Barriers::kEmptyThreads>(Barriers::empty(kind, (block - start) % kSlots));
    }
  };
  // One step of the online softmax: scores become weights. Only the masked form carries mask code.
  auto weigh = [&](int block, auto is_masked) {
    if (kHasScore && arguments.softcap > 0.0f) cap_scores(scores, arguments.softcap, arguments.capped_scale);
    if constexpr (decltype(is_masked)::value) {
      const int first = block * kBlockN;
      mask_scores<0>(scores, find_keys<64>(key_mask, first, work.seen_by_any) >> thread_key, limits,
                     first + thread_key);
      mask_scores<8>(scores, find_keys<64>(key_mask, first + 64, work.seen_by_any) >> thread_key, limits,
                     first + 64 + thread_key);
    }
    softmax.raise_maximum(scores, arguments.exponent, sums);
    softmax.weigh(scores, arguments.exponent);
    if (kHasScore && arguments.dropout_seed != nullptr) {
      const uint32_t first_key = static_cast<uint32_t>(arguments.dropout_seed[1]);
      drop_weights(scores, arguments.dropout_seed[0], arguments.dropout_threshold, work.batch,
                   work.kv_head * group, group, row, first_key + block * kBlockN + thread_key);
    }
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) pack_weights<Element>(weights[k], scores[0], k);
  };

  auto attend = [&](int block, auto is_masked) {
    await<2 * kGroup>(Barriers::turn(consumer));
    await_full(0, block);
    await_full(1, block - 1);
    pin(sums[0]);
    begin_products();
    multiply_scores(block);
    add_weighted(block - 1);
    commit_products();
    if (consumer == 0 || block + 1 < stop) arrive<2 * kGroup>(Barriers::turn(1 - consumer));
    wait_for_products<0>();
    pin(scores[0]);
    pin(sums[0]);
    leave(0, block);
    leave(1, block - 1);
    weigh(block, is_masked);
  };

  if (start < stop) {
    await_full(0, start);
    begin_products();
    multiply_scores(start);
    commit_products();
    if (consumer == 1 && start + 1 < stop) arrive<2 * kGroup>(Barriers::turn(0));
    wait_for_products<0>();
    pin(scores[0]);
    leave(0, start);
    if (start < full) {
      weigh(start, std::false_type());
    } else {
      weigh(start, std::true_type());
    }
    int block = start + 1;
    for (; block < full; ++block) attend(block, std::false_type());
    for (; block < stop; ++block) attend(block, std::true_type());
    await_full(1, stop - 1);
    pin(sums[0]);
    begin_products();
    add_weighted(stop - 1);
    commit_products();
    wait_for_products<0>();
    pin(sums[0]);
  }

  softmax.finish();
  if (gridDim.y > 1) {
    store_rows<float>(arguments, work, split, softmax, sums, row, 0, true);
  } else {
    store_rows<Element>(arguments, work, split, softmax, sums, row, 0, true);
  }
}

}  // namespace pk::cuda::hopper
