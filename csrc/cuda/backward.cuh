// The backward kernel, keys stationary: with P = exp(score - lse), Z the dropout factor and
// delta = rowsum(dout * out) - dlse,
//
//   dV = (P * Z)^T dout    dP = Z * (dout V^T)    dS = P * (dP - delta) * score_grad
//   dQ = scale * dS K      dK = scale * dS^T Q
//
// A block owns a run of key tiles of one key head. For each it goes over the tiles of packed rows that see
// any of its keys; dk and dv collect in registers, dq in a float slab of the block's own. Scores are
// computed transposed, keys by rows: P^T and dS^T stay in registers on their way into dv and dk.
// Algorithm: Dao et al. 2022 (arXiv 2205.14135), appendix B.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/backward.h"
#include "cuda/copy.cuh"
#include "cuda/gradient.cuh"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"
#include "cuda/work.cuh"
#include "score.h"

namespace pk::cuda {

// How a block's work is shared out. kKeyWarps warps have kKeyTiles times 16 keys each, and do all that
// concerns these; or, where two roles split it, one warp of a pair computes P and dv, the other dS and dk.
template <class ElementType, int kDimension, int kRows, int kKeyTiles_, int kKeyWarps_, int kRoles_,
          int kStep, int kRowWarps_, bool kKeysInRegisters>
struct BackwardTile {
  using Element = ElementType;
  static constexpr int kDim = kDimension, kKeyTiles = kKeyTiles_, kKeyWarps = kKeyWarps_, kRoles = kRoles_;
  static constexpr int kBlockM = kRows, kBlockN = 16 * kKeyTiles * kKeyWarps;
  static constexpr int kWarps = kKeyWarps * kRoles, kThreads = 32 * kWarps;
  static constexpr int kStepRows = kStep, kSteps = kBlockM / kStep;  // rows whose scores are there at a time
  static constexpr bool kHeld = kKeysInRegisters;
  // dq: kRowWarps groups of warps share out the rows, those of a group the channels.
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kQueryTiles = kBlockM / kRowWarps / 16, kColumnTiles = kDim / kColumnWarps / 8;

  using Rows = RowTile<kDim, kBlockM>;
  using Layout = Tile<kDim>;  // of its query and dout
  static constexpr int kSlabThreads = kThreads;
  // A warp's first row and channel of dq.
  __device__ static int row_of(int warp) { return warp / kColumnWarps * kQueryTiles * 16; }
  __device__ static int column_of(int warp) { return warp % kColumnWarps * kColumnTiles * 8; }
  static constexpr int kKeyBytes = 2 * kBlockN * kDim;
  static constexpr int kGradientBytes = 2 * kBlockN * kBlockM;
  static constexpr int kFactorBytes = kRoles == 2 ? 2 * kBlockN * kStepRows : 0;
  // Values are needed only until they are in registers.
  static constexpr int kLateBytes = kGradientBytes + kFactorBytes + (kHeld ? 0 : kKeyBytes);
  static constexpr int kSharedBytes =
      kKeyBytes + 2 * Rows::kBytes + (kLateBytes > kKeyBytes ? kLateBytes : kKeyBytes);
  static_assert(kBlockM % (16 * kRowWarps) == 0 && kBlockM % kStepRows == 0 && kStepRows % 16 == 0 &&
                    kDim % (16 * kColumnWarps) == 0 && kWarps % kRowWarps == 0,
                "whole tiles");
};

// Keys and values of a tile, zeros for those that aren't there; whether all that this thread copies are.
template <class Copier>
__device__ __forceinline__ bool copy_keys(const Copier& copier, const BackwardArguments& arguments,
                                          const Example& example, int start, uint32_t keys, uint32_t values) {
  bool all_there = true;
#pragma unroll
  for (int step = 0; step < Copier::kSteps; ++step) {
    const int j = start + copier.row + step * Copier::kRowStep;
    const bool there = is_there(arguments, example, j);
    auto copy = [&](const View& view, uint32_t tile, int dim) {
      const uint16_t* source = at<uint16_t>(view, example.batch, example.kv_head, example.first_key + j);
      copier.copy_row(tile, step, source + copier.column, dim, there);
    };
    copy(arguments.key, keys, arguments.dim);
    copy(arguments.value, values, arguments.value_dim);
    all_there &= there;
  }
  return all_there;
}

// kHasScore: softcap or dropout. Dynamic shared memory: Shape::kSharedBytes; grid: runs x batch x kv_heads.
template <class Shape, bool kHasScore>
__global__ void __launch_bounds__(Shape::kThreads) attention_backward(const BackwardArguments arguments) {
  using Element = typename Shape::Element;
  using Rows = typename Shape::Rows;
  constexpr int kDim = Shape::kDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kKeyTiles = Shape::kKeyTiles, kRowTiles = Shape::kStepRows / 8;
  constexpr bool kSplit = Shape::kRoles == 2;
  extern __shared__ __align__(128) unsigned char shared[];

  const Example example = find_example(arguments, blockIdx.x / arguments.runs);
  const int run = blockIdx.x % arguments.runs, group = arguments.group;
  const int row_tiles = (example.queries * group + kBlockM - 1) / kBlockM;
  const int run_keys = keys_of_run(arguments, example, kBlockN);
  const int run_start = min(int64_t{run} * run_keys, int64_t{example.keys});
  const int run_stop = min(int64_t{run_start} + run_keys, int64_t{example.keys});
  const int64_t first_tile = find_first_tile<kBlockM>(arguments, example);
  const unsigned char* tiles = static_cast<const unsigned char*>(arguments.tiles) + first_tile * Rows::kBytes;
  float* slab = arguments.slabs +
                (run * count_tiles(arguments, gridDim.x / arguments.runs) + first_tile) * Rows::kNumbers;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool does_values = !kSplit || warp < Shape::kKeyWarps;
  const int pair = warp % Shape::kKeyWarps, warp_key = pair * kKeyTiles * 16;
  const int row_warp = warp / Shape::kColumnWarps, column_warp = warp % Shape::kColumnWarps;

  const uint32_t keys = shared_address(shared), stages = keys + Shape::kKeyBytes;
  const uint32_t gradients = stages + 2 * Rows::kBytes, factors_tile = gradients + Shape::kGradientBytes;
  const uint32_t values = Shape::kHeld ? gradients : factors_tile + Shape::kFactorBytes;
  const uint32_t my_rows = lane_offset<kDim>(lane), my_columns = lane_offset_of_columns<kDim>(lane);
  const Copier<kDim, kBlockN, Shape::kThreads> copier;

  for (int start = run_start; start < run_stop; start += kBlockN) {
    // Tiles of rows before `first` see none of these keys, those from `full` on all of them. A run's first
    // keys count as masked: the other loop only ever adds to the slab.
    const int first = start < example.seen_by_any ? first_row_of(example, group, start) / kBlockM : row_tiles;
    int full = (first_row_of(example, group, start + kBlockN - 1) + kBlockM - 1) / kBlockM;
    auto copy_rows = [&](int tile) {
      if (tile < row_tiles) {
        const unsigned char* source = tiles + tile * int64_t{Rows::kBytes} + threadIdx.x * 16;
        const uint32_t target = stages + (tile - first) % 2 * Rows::kBytes + threadIdx.x * 16;
#pragma unroll
        for (int done = 0; done < Rows::kBytes; done += Shape::kThreads * 16) {
          if (done + Shape::kThreads * 16 <= Rows::kBytes || done + threadIdx.x * 16 < Rows::kBytes) {
            copy_chunk(target + done, source + done, true);
          }
        }
      }
      commit_copies();
    };

    wait_for_copies<0>();  // the keys before these have served, also those that no row sees
    const bool all_there = copy_keys(copier, arguments, example, start, keys, values);
    copy_rows(first);
    if (!__syncthreads_and(all_there) || start == run_start) full = row_tiles;
    full = min(full, row_tiles);
    if constexpr (Shape::kHeld) wait_for_copies<0>();
    LeftOperand<kDim, kKeyTiles, Shape::kHeld> left[3 - Shape::kRoles];
    const uint32_t my_keys = warp_key * Tile<kDim>::kRowBytes + my_rows;
    left[0].load_all((does_values ? keys : values) + my_keys);
    if constexpr (!kSplit) left[1].load_all(values + my_keys);
    Accumulator sums[3 - Shape::kRoles][kKeyTiles][kDim / 8] = {};  // dv, dk

    int first_rows[kKeyTiles][2];  // the first that see each of this thread's keys
    const int key = start + warp_key + lane / 4;
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = key + m * 16 + h * 8;
        first_rows[m][h] = is_there(arguments, example, j) ? first_row_of(example, group, j) : INT_MAX;
      }
    }

    // What a tile of rows gives to these keys, and these keys to it. Two loops over this body: only the first
    // carries mask code.
    auto attend = [&](int tile, auto is_masked) {
      constexpr bool kMasked = decltype(is_masked)::value;
      const uint32_t stage = stages + (tile - first) % 2 * Rows::kBytes;
      wait_for_copies<0>();
      copy_rows(tile + 1);
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        const int row = step * Shape::kStepRows, thread_row = row + lane % 4 * 2;
        const uint32_t query = stage + row * Tile<kDim>::kRowBytes, dout = query + Rows::kHalf;
        const uint32_t shifts = stage + Rows::kShifts + thread_row * 4;
        const uint32_t deltas = stage + Rows::kDeltas + thread_row * 4;
        const uint32_t my_gradients = gradients + warp_key * Tile<kBlockM>::kRowBytes;
        Transposed<kKeyTiles, kRowTiles> scores, factors;
        const Step<kKeyTiles, kRowTiles, kMasked, kHasScore> between{arguments, example, first_rows,
                                                                     tile * kBlockM + thread_row, key};
        if constexpr (kSplit) {
          const uint32_t place = factors_tile + (pair * kKeyTiles * kRowTiles * 16 + lane) * 16;
          multiply_scores<Element, kDim>(scores, left[0], (does_values ? query : dout) + my_columns);
          if (does_values) {
            between.weigh(scores, factors, shifts);
            if (step > 0) await<Shape::kThreads>(2 * step);
            send<Element>(factors, place);
            arrive<Shape::kThreads>(2 * step + 1);
          } else {
            await<Shape::kThreads>(2 * step + 1);
            receive<Element>(factors, place);
            if (step < Shape::kSteps - 1) arrive<Shape::kThreads>(2 * step + 2);
            between.differentiate(scores, factors, deltas);
            store_gradients<Element, kBlockM>(scores, my_gradients, row, lane);
          }
          add_weighted<Element, kDim>(sums[0], scores, (does_values ? dout : query) + my_rows);
        } else {
          Transposed<kKeyTiles, kRowTiles> products;
          multiply_scores<Element, kDim>(scores, left[0], query + my_columns);
          multiply_scores<Element, kDim>(products, left[1], dout + my_columns);
          between.weigh(scores, factors, shifts);
          between.differentiate(products, factors, deltas);
          store_gradients<Element, kBlockM>(products, my_gradients, row, lane);
          add_weighted<Element, kDim>(sums[0], scores, dout + my_rows);
          add_weighted<Element, kDim>(sums[1], products, query + my_rows);
        }
      }
      __syncthreads();  // dS is there
      Accumulator dq[Shape::kQueryTiles][Shape::kColumnTiles] = {};
      add_queries<Element, kDim, kBlockM, kBlockN>(dq, gradients + lane_offset_of_columns<kBlockM>(lane),
                                                   keys + my_rows, row_warp * Shape::kQueryTiles,
                                                   column_warp * Shape::kColumnTiles);
      add_to_slab<Shape>(dq, slab + tile * int64_t{Rows::kNumbers}, threadIdx.x,
                         kMasked && start == run_start);
    };
    int tile = first;
    for (; tile < full; ++tile) attend(tile, std::true_type());
    for (; tile < row_tiles; ++tile) attend(tile, std::false_type());

    if (!kSplit || does_values) {
      store_keys<Element>(arguments.dvalue, example, arguments.value_dim, key, sums[0],
                          arguments.keep_factor);
    }
    if (!kSplit || !does_values) {
      store_keys<Element>(arguments.dkey, example, arguments.dim, key, sums[2 - Shape::kRoles],
                          arguments.scale);
    }
  }
}

}  // namespace pk::cuda
