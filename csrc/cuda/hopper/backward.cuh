// The backward kernel for Hopper (sm_90a): as cuda/backward.cuh, but that the warps have roles. Of one warp
// group half copies keys and values, half tiles of rows; two compute, for 64 keys each. dq they share: each
// has all keys' dS, through shared memory, and half of the channels.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/backward.h"
#include "cuda/copy.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/blocks.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/rows.cuh"
#include "cuda/work.cuh"

namespace pk::cuda::hopper {

template <class ElementType, int kDimension>
struct BackwardTile {
  using Element = ElementType;
  static constexpr int kDim = kDimension, kBlockM = 64, kBlockN = 128, kSlots = 2;
  static constexpr int kConsumers = kBlockN / 64, kThreads = kGroup * (1 + kConsumers);
  using Keys = Panels<kDim, kBlockN>;
  using Rows = RowTile<kDim, kBlockM>;
  using Layout = Panels<kDim, kBlockM>;  // of its query and dout
  using Gradients = Panels<kBlockM, kBlockN>;

  // Tiles of keys, values, rows and gradients, then the rows' numbers, kSlots of each.
  static constexpr int kNumberBytes = Rows::kBytes - Rows::kShifts;
  static constexpr int kSharedBytes =
      kSlots * (2 * Keys::kBytes + Rows::kShifts + Gradients::kBytes + kNumberBytes);

  static constexpr int kSlabThreads = kGroup * kConsumers, kQueryTiles = 1,
                       kColumnTiles = kDim / kConsumers / 8;
  __device__ static int row_of(int warp) { return warp % 4 * 16; }
  __device__ static int column_of(int warp) { return warp / 4 * kColumnTiles * 8; }
};

// Slots of kind 0 hold keys and values, of kind 1 tiles of rows. Consumers meet when dS is there.
template <class Shape>
struct BackwardBarriers : SlotBarriers<Shape::kSlots, Shape::kConsumers> {
  static constexpr int kGradients = BackwardBarriers::kNext;
};

// kHasScore: softcap or dropout. Dynamic shared memory: Shape::kSharedBytes; grid: runs x batch x kv_heads.
template <class Shape, bool kHasScore>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_backward(const BackwardArguments arguments) {
  using Element = typename Shape::Element;
  using Barriers = BackwardBarriers<Shape>;
  using Rows = typename Shape::Rows;
  using Keys = typename Shape::Keys;
  constexpr int kDim = Shape::kDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kSlots = Shape::kSlots, kTiles = kBlockM / 8;
  extern __shared__ __align__(1024) unsigned char shared[];

  const Example example = find_example(arguments, blockIdx.x / arguments.runs);
  const int run = blockIdx.x % arguments.runs, group = arguments.group;
  const int row_tiles = (example.queries * group + kBlockM - 1) / kBlockM;
  const int run_keys = keys_of_run(arguments, example, kBlockN);
  const int run_start = min(int64_t{run} * run_keys, int64_t{example.keys});
  const int run_stop = min(int64_t{run_start} + run_keys, int64_t{example.keys});
  const int64_t first_tile = find_first_tile<kBlockM>(arguments, example);

  const uint32_t key_slots = shared_address(shared), value_slots = key_slots + kSlots * Keys::kBytes;
  const uint32_t row_slots = value_slots + kSlots * Keys::kBytes;
  const uint32_t gradient_slots = row_slots + kSlots * Rows::kShifts;
  const uint32_t number_slots = gradient_slots + kSlots * Shape::Gradients::kBytes;

  // Tiles of rows before this see none of a block's keys.
  auto first_of = [&](int start) {
    return start < example.seen_by_any ? first_row_of(example, group, start) / kBlockM : row_tiles;
  };

  if (threadIdx.x < kGroup) {  // copies
    give_registers<40>();
    const int thread = threadIdx.x % Barriers::kCopiers;
    if (threadIdx.x < Barriers::kCopiers) {
      BlockCopier<Keys, 3> keys(example, arguments.key, arguments.dim, thread, run_start);
      BlockCopier<Keys, 3> values(example, arguments.value, arguments.value_dim, thread, run_start);
      int block = 0;
      for (int start = run_start; start < run_stop; start += kBlockN, ++block) {
        const int slot = block % kSlots;
        if (block >= kSlots) await<Barriers::kEmptyThreads>(Barriers::empty(0, slot));
        keys.copy(key_slots + slot * Keys::kBytes, arguments, example, start);
        values.copy(value_slots + slot * Keys::kBytes, arguments, example, start);
        Barriers::fill(0, slot);
      }
    } else {
      const unsigned char* tiles =
          static_cast<const unsigned char*>(arguments.tiles) + first_tile * Rows::kBytes + thread * 16;
      int step = 0;
      for (int start = run_start; start < run_stop; start += kBlockN) {
        for (int tile = first_of(start); tile < row_tiles; ++tile, ++step) {
          const int slot = step % kSlots;
          const unsigned char* source = tiles + tile * int64_t{Rows::kBytes};
          const uint32_t target = row_slots + slot * Rows::kShifts + thread * 16;
          if (step >= kSlots) await<Barriers::kEmptyThreads>(Barriers::empty(1, slot));
#pragma unroll 4
          for (int done = 0; done < Rows::kShifts; done += Barriers::kCopiers * 16) {
            copy_chunk(target + done, source + done, true);
          }
          if (thread * 16 < Shape::kNumberBytes) {
            copy_chunk(number_slots + slot * Shape::kNumberBytes + thread * 16, source + Rows::kShifts, true);
          }
          Barriers::fill(1, slot);
        }
      }
    }
    return;
  }

  take_registers<232>();
  const int consumer = threadIdx.x / kGroup - 1, lane = threadIdx.x % 32;
  const int warp_key = consumer * 64 + threadIdx.x % kGroup / 32 * 16, thread_row = lane % 4 * 2;
  const uint32_t my_part = consumer * 64 * 128;  // of a tile of keys
  const uint32_t my_channels = consumer * Shape::kColumnTiles * 8 / 64 * Keys::kPanelBytes +
                               consumer * Shape::kColumnTiles * 8 % 64 * 2;  // likewise
  float* slab = arguments.slabs +
                (run * count_tiles(arguments, gridDim.x / arguments.runs) + first_tile) * Rows::kNumbers;
  auto await_full = [&](int kind, int slot) {
    await<Barriers::kFullThreads>(Barriers::full(kind, slot, consumer));
  };

  int block = 0, step = 0;
  for (int start = run_start; start < run_stop; start += kBlockN, ++block) {
    // Tiles of rows before `first` see none of these keys, those from `full` on all of them. A run's first
    // keys count as masked: the other loop only ever adds to the slab.
    const int first = first_of(start);
    const bool all_there = arguments.key_mask == nullptr && start + kBlockN <= example.seen_by_any;
    const int full =
        !all_there || start == run_start
            ? row_tiles
            : min((first_row_of(example, group, start + kBlockN - 1) + kBlockM - 1) / kBlockM, row_tiles);
    const uint32_t keys = key_slots + block % kSlots * Keys::kBytes;
    const uint32_t values = value_slots + block % kSlots * Keys::kBytes;
    const int key = start + warp_key + lane / 4;
    int first_rows[1][2];  // the first that see each of this thread's keys
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = key + h * 8;
      first_rows[0][h] = is_there(arguments, example, j) ? first_row_of(example, group, j) : INT_MAX;
    }
    Accumulator dvalue[1][kDim / 8] = {}, dkey[1][kDim / 8] = {};

    // (64 keys, 64 rows) = a tile of keys @ a tile of rows^T.
    auto multiply_by_rows = [&](Transposed<1, kTiles>& sums, uint32_t left, uint32_t right) {
      multiply_rows<Element, kDim, kBlockN, kBlockM>(sums[0], left + my_part, right);
    };

    // What a tile of rows gives to these keys, and these keys to it; only the masked form carries mask code.
    auto attend = [&](int tile, auto is_masked) {
      constexpr bool kMasked = decltype(is_masked)::value;
      const int slot = step % kSlots;
      const uint32_t query = row_slots + slot * Rows::kShifts, dout = query + Rows::kHalf;
      const uint32_t shifts = number_slots + slot * Shape::kNumberBytes + thread_row * 4;
      const uint32_t gradients = gradient_slots + slot * Shape::Gradients::kBytes;
      const Step<1, kTiles, kMasked, kHasScore> between{arguments, example, first_rows,
                                                        tile * kBlockM + thread_row, key};
      Fragment weights[kBlockM / 16], differences[kBlockM / 16];
      Transposed<1, kTiles> scores, products, factors;
      Accumulator dq[1][Shape::kColumnTiles];

      await_full(1, slot);
      begin_products();
      multiply_by_rows(scores, keys, query);
      commit_products();
      multiply_by_rows(products, values, dout);
      commit_products();
      wait_for_products<1>();
      pin(scores[0]);
      between.weigh(scores, factors, shifts);
#pragma unroll
      for (int k = 0; k < kBlockM / 16; ++k) pack_weights<Element>(weights[k], scores[0], k);
      pin(dvalue[0]);
      begin_products();
      add_rows<Element, kDim>(dvalue[0], weights, dout);
      commit_products();
      wait_for_products<1>();
      pin(products[0]);
      if constexpr (!kHasScore) unpack_weights<Element>(factors[0], weights);
      between.differentiate(products, factors, shifts + 4 * kBlockM);
      store_gradients<Element, kBlockM>(products, gradients + warp_key * 128, 0, lane);
      publish();
#pragma unroll
      for (int k = 0; k < kBlockM / 16; ++k) pack_weights<Element>(differences[k], products[0], k);
      await<Barriers::kReaders>(Barriers::kGradients);
      pin(dkey[0]);
      begin_products();
      add_rows<Element, kDim>(dkey[0], differences, query);
      multiply<Element, false, true, true>(dq[0], across_rows<kBlockM, kBlockN>(gradients, 0),
                                           across_rows<kDim, kBlockN>(keys + my_channels, 0));
#pragma unroll
      for (int k = 1; k < kBlockN / 16; ++k) {
        multiply<Element, true, true, true>(dq[0], across_rows<kBlockM, kBlockN>(gradients, k),
                                            across_rows<kDim, kBlockN>(keys + my_channels, k));
      }
      commit_products();
      wait_for_products<0>();
      pin(dvalue[0]);
      pin(dkey[0]);
      pin(dq[0]);
      arrive<Barriers::kEmptyThreads>(Barriers::empty(1, slot));
      ++step;
      add_to_slab<Shape>(dq, slab + tile * int64_t{Rows::kNumbers}, threadIdx.x - kGroup,
                         kMasked && start == run_start);
    };

    await_full(0, block % kSlots);
    int tile = first;
    for (; tile < full; ++tile) attend(tile, std::true_type());
    for (; tile < row_tiles; ++tile) attend(tile, std::false_type());
    arrive<Barriers::kEmptyThreads>(Barriers::empty(0, block % kSlots));
    store_keys<Element>(arguments.dvalue, example, arguments.value_dim, key, dvalue, arguments.keep_factor);
    store_keys<Element>(arguments.dkey, example, arguments.dim, key, dkey, arguments.scale);
  }
}

}  // namespace pk::cuda::hopper
