// The row side of the backward pass: packed rows by tiles, what the slabs are made of, and the two kernels
// before and after the backward kernel.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/backward.h"
#include "cuda/copy.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/mma.cuh"
#include "cuda/work.cuh"
#include "score.h"

namespace pk::cuda {

// A tile of packed rows as it lies in memory and in shared memory: query, dout, then shift and delta of each
// row. Rows that see no key, and those that fill up a tile, are zeros with shift inf: there P = 0.
template <int kDim, int kBlockM>
struct RowTile {
  static constexpr int kHalf = 2 * kDim * kBlockM;       // bytes of query, and of dout
  static constexpr int kShifts = 2 * kHalf;              // lse in base 2
  static constexpr int kDeltas = kShifts + 4 * kBlockM;  // rowsum(dout * out) - dlse
  static constexpr int kBytes = kDeltas + 4 * kBlockM;
  static constexpr int kNumbers = kDim * kBlockM;  // of dq, in a slab
};

// Number of an example's and key head's first tile. Packed, every sequence may waste a part of one.
template <int kBlockM>
__device__ __forceinline__ int64_t find_first_tile(const BackwardArguments& arguments,
                                                   const Example& example) {
  const int64_t heads_before =
      (arguments.cu_seqlens_q == nullptr ? int64_t{example.batch} * arguments.kv_heads : 0) + example.kv_head;
  const int64_t tile = heads_before * arguments.row_tiles;
  if (arguments.cu_seqlens_q == nullptr) return tile;
  return tile + example.first_query * arguments.group / kBlockM + example.batch;
}

// Of all examples and key heads.
__device__ __forceinline__ int64_t count_tiles(const BackwardArguments& arguments, int heads) {
  return int64_t{arguments.row_tiles} * (arguments.cu_seqlens_q == nullptr ? heads : arguments.kv_heads);
}

// The first packed row that sees a key, if any does.
__device__ __forceinline__ int first_row_of(const Example& example, int group, int key) {
  return min(max(key - example.q_offset, 0), example.queries) * group;
}

// How many keys each run has but the last ones.
__device__ __forceinline__ int keys_of_run(const BackwardArguments& arguments, const Example& example,
                                           int block_n) {
  const int tiles = (example.keys + block_n - 1) / block_n;
  return max((tiles + arguments.runs - 1) / arguments.runs, 1) * block_n;
}

// Eight numbers and their sum of products with eight others.
template <class Element>
__device__ __forceinline__ float multiply_chunks(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 left = unpack<Element>(x[i]), right = unpack<Element>(y[i]);
    sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
  }
  return sum;
}

// A block fills a tile, a warp a row at a time. Grid: row tiles of the longest example x batch x kv_heads.
template <class Shape>
__global__ void __launch_bounds__(Shape::kSlabThreads) pack_rows(const BackwardArguments arguments) {
  using Element = typename Shape::Element;
  using Rows = typename Shape::Rows;
  constexpr int kDim = Shape::kDim, kBlockM = Shape::kBlockM;
  constexpr float kLog2E = 1.442695041f;
  const int group = arguments.group;
  const int row_blocks = (arguments.queries * group + kBlockM - 1) / kBlockM;
  const Example example = find_example(arguments, blockIdx.x / row_blocks);
  const int tile = blockIdx.x % row_blocks, rows = example.queries * group;
  if (tile * kBlockM >= rows) return;
  const int lane = threadIdx.x % 32, column = lane * kChunk;
  unsigned char* place = static_cast<unsigned char*>(arguments.tiles) +
                         (find_first_tile<kBlockM>(arguments, example) + tile) * Rows::kBytes;
  auto load = [&](const View& view, int head, int64_t query, int dim) {
    const uint16_t* row = at<uint16_t>(view, example.batch, head, query);
    return column < dim ? *reinterpret_cast<const uint4*>(row + column) : uint4{0, 0, 0, 0};
  };
  for (int i = threadIdx.x / 32; i < kBlockM; i += Shape::kSlabThreads / 32) {
    const int r = tile * kBlockM + i;
    const int head = example.kv_head * group + r % group;
    const int64_t query = example.first_query + r / group;
    uint4 query_chunk = {0, 0, 0, 0}, dout_chunk = {0, 0, 0, 0};
    float shift = INFINITY, delta = 0.0f;
    const float lse = r < rows ? *at<float>(arguments.lse, example.batch, head, query) : -INFINITY;
    if (lse != -INFINITY) {
      query_chunk = load(arguments.query, head, query, arguments.dim);
      dout_chunk = load(arguments.dout, head, query, arguments.value_dim);
      delta = multiply_chunks<Element>(dout_chunk, load(arguments.out, head, query, arguments.value_dim));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(kAllLanes, delta, step);
      if (arguments.dlse.data != nullptr) delta -= *at<float>(arguments.dlse, example.batch, head, query);
      shift = lse * kLog2E;
    }
    if (column < kDim) {
      unsigned char* chunk = place + Shape::Layout::offset(i, lane);
      *reinterpret_cast<uint4*>(chunk) = query_chunk;
      *reinterpret_cast<uint4*>(chunk + Rows::kHalf) = dout_chunk;
    }
    if (lane == 0) {
      reinterpret_cast<float*>(place + Rows::kShifts)[i] = shift;
      reinterpret_cast<float*>(place + Rows::kDeltas)[i] = delta;
    }
  }
}

// Numbers that one instruction adds to memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif

__device__ __forceinline__ void add_to_memory(float* place, const float* numbers) {
  if constexpr (kTogether == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(place), "f"(numbers[0]),
                 "f"(numbers[1]), "f"(numbers[2]), "f"(numbers[3])
                 : "memory");
  } else {
    asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(place), "f"(numbers[0]) : "memory");
  }
}

// A tile of a slab: `act` on every kTogether of a thread's numbers of dq and their place, beside those of all
// threads.
template <class Shape, int kQueryTiles, int kColumnTiles, class Act>
__device__ __forceinline__ void for_each_number(Accumulator (&dq)[kQueryTiles][kColumnTiles], float* tile,
                                                int thread, Act act) {
  float* place = tile + thread * kTogether;
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; e += kTogether) {
        act(dq[m][n] + e, place + ((m * kColumnTiles + n) * 4 + e) * Shape::kSlabThreads);
      }
    }
  }
}

// What a tile of keys gives to dq, the first to come or one of those that follow. A number has one thread
// that adds to it, and no order but that of the tiles.
template <class Shape, int kQueryTiles, int kColumnTiles>
__device__ __forceinline__ void add_to_slab(Accumulator (&dq)[kQueryTiles][kColumnTiles], float* tile,
                                            int thread, bool is_first) {
  if (is_first) {
    for_each_number<Shape>(dq, tile, thread, [](const float* numbers, float* place) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) place[i] = numbers[i];
    });
  } else {
    for_each_number<Shape>(dq, tile, thread,
                           [](const float* numbers, float* place) { add_to_memory(place, numbers); });
  }
}

// dq = scale times the sum of the slabs, in the order of the runs, of which the last may not have reached
// this tile. Grid: as pack_rows'.
template <class Shape>
__global__ void __launch_bounds__(Shape::kSlabThreads) reduce_slabs(const BackwardArguments arguments) {
  using Element = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM, kNumbers = Shape::Rows::kNumbers;
  const int group = arguments.group;
  const int row_blocks = (arguments.queries * group + kBlockM - 1) / kBlockM;
  const Example example = find_example(arguments, blockIdx.x / row_blocks);
  const int tile = blockIdx.x % row_blocks, rows = example.queries * group;
  if (tile * kBlockM >= rows) return;

  const int seen =
      visible_keys(example.q_offset, (min((tile + 1) * kBlockM, rows) - 1) / group, example.keys);
  const int run_keys = keys_of_run(arguments, example, Shape::kBlockN);
  const int64_t slab_numbers = count_tiles(arguments, gridDim.x / row_blocks) * kNumbers;
  float* slab = arguments.slabs + (find_first_tile<kBlockM>(arguments, example) + tile) * kNumbers;
  Accumulator dq[Shape::kQueryTiles][Shape::kColumnTiles] = {};
  for (int start = 0; start < seen; start += run_keys) {
    for_each_number<Shape>(dq, slab, threadIdx.x, [](float* sums, const float* place) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sums[i] += place[i];
    });
    slab += slab_numbers;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = tile * kBlockM + Shape::row_of(warp) + lane / 4;
  const int column = Shape::column_of(warp) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Shape::kQueryTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * 16 + h * 8;
      if (r >= rows) continue;
      Element* target = at<Element>(arguments.dquery, example.batch, example.kv_head * group + r % group,
                                    example.first_query + r / group);
#pragma unroll
      for (int n = 0; n < Shape::kColumnTiles; ++n) {
        if (column + n * 8 < arguments.dim) {
          store_pair(target + column + n * 8, dq[m][n][2 * h] * arguments.scale,
                     dq[m][n][2 * h + 1] * arguments.scale);
        }
      }
    }
  }
}

}  // namespace pk::cuda
