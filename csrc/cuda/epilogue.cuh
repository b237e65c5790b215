// From a block's accumulators to memory: the warps that share rows merge, rows are normalised and stored; and
// the kernel that merges what the splits have stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/forward.h"
#include "cuda/mma.cuh"
#include "cuda/softmax.cuh"
#include "cuda/work.cuh"

namespace pk::cuda {

// The kWarps warps that share 16 rows leave their results in shared memory (kMergeBytes, from `shared` on);
// of the merged ones each takes up the accumulators of its own channels, and the rows' maxima and sums.
template <int kWarps, int kTiles>
struct KeyWarps {
  static constexpr int kMergeBytes = kWarps * (16 * sizeof(float2) + kTiles * 32 * sizeof(float4));

  __device__ static void merge(const Accumulator (&sums)[1][kTiles], OnlineSoftmax<1>& softmax, int warp,
                               unsigned char* shared, Accumulator (&merged)[1][kTiles / kWarps]) {
    const int lane = threadIdx.x % 32;
    float2* rows = reinterpret_cast<float2*>(shared);  // (kWarps, 16): maximum, sum
    float4* parts = reinterpret_cast<float4*>(rows + kWarps * 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (lane % 4 == 0) rows[warp * 16 + h * 8 + lane / 4] = {softmax.maximum[0][h], softmax.sum[0][h]};
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Accumulator& part = sums[0][n];
      parts[(warp * kTiles + n) * 32 + lane] = {part[0], part[1], part[2], part[3]};
    }
    __syncthreads();

    float weights[kWarps][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2* row = rows + h * 8 + lane / 4;
      float highest = row[0].x, total = 0.0f;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, row[w * 16].x);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weights[w][h] = exp2_approximate(row[w * 16].x - highest);
        total += row[w * 16].y * weights[w][h];
      }
      softmax.maximum[0][h] = highest;
      softmax.sum[0][h] = total;
    }
#pragma unroll
    for (int n = 0; n < kTiles / kWarps; ++n) {
      Accumulator& sum = merged[0][n];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        float4 part = parts[(w * kTiles + warp * (kTiles / kWarps) + n) * 32 + lane];
        sum[0] = (w > 0 ? sum[0] : 0.0f) + part.x * weights[w][0];
        sum[1] = (w > 0 ? sum[1] : 0.0f) + part.y * weights[w][0];
        sum[2] = (w > 0 ? sum[2] : 0.0f) + part.z * weights[w][1];
        sum[3] = (w > 0 ? sum[3] : 0.0f) + part.w * weights[w][1];
      }
    }
  }
};

__device__ __forceinline__ void store_pair(float* target, float low, float high) {
  *reinterpret_cast<float2*>(target) = {low, high};
}

template <class Element>
__device__ __forceinline__ void store_pair(Element* target, float low, float high) {
  *reinterpret_cast<uint32_t*>(target) = pack<Element>(low, high);
}

// Writes the channels of the accumulators, tiles of eight from first_tile on, and, by the warps that own it,
// lse.
template <class Out, int kRowTiles, int kTiles>
__device__ __forceinline__ void store_rows(const ForwardArguments& arguments, const Example& work, int split,
                                           const OnlineSoftmax<kRowTiles>& softmax,
                                           const Accumulator (&sums)[kRowTiles][kTiles], int row,
                                           int first_tile, bool owns_lse) {
  const int lane = threadIdx.x % 32, group = arguments.group;
  const int64_t first_head = static_cast<int64_t>(work.kv_head) * group;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * 16 + h * 8;
      if (r >= work.queries * group) continue;
      const int64_t head = first_head + r % group, query = work.first_query + r / group;
      const float sum = softmax.sum[m][h];
      const bool is_dead = sum == 0.0f;
      const float factor = is_dead ? 0.0f : arguments.keep_factor / sum;
      Out* out = static_cast<Out*>(arguments.out.data) + split * arguments.out_split_stride +
                 work.batch * arguments.out.batch_stride + head * arguments.out.head_stride +
                 query * arguments.out.row_stride;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int column = (first_tile + n) * 8 + lane % 4 * 2;
        if (column < arguments.value_dim) {
          store_pair(out + column, sums[m][n][2 * h] * factor, sums[m][n][2 * h + 1] * factor);
        }
      }
      if (owns_lse && lane % 4 == 0) {
        float* lse = static_cast<float*>(arguments.lse.data) + split * arguments.lse_split_stride +
                     work.batch * arguments.lse.batch_stride + head * arguments.lse.head_stride +
                     query * arguments.lse.row_stride;
        *lse = is_dead ? -INFINITY : (softmax.maximum[m][h] + __log2f(sum)) * kLn2;
      }
    }
  }
}

// A warp merges a row's parts, in the order of the splits. Grid: rows / kCombineRows, rounded up.
template <class Element>
__global__ void __launch_bounds__(kCombineThreads) combine_splits(const CombineArguments arguments) {
  constexpr float kLog2E = 1.442695041f;
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{kCombineRows} + threadIdx.x / 32;
  if (row >= arguments.rows) return;
  const float* lses = arguments.part_lses + row;

  float highest = kLowest;
  for (int split = lane; split < arguments.splits; split += 32) {
    highest = fmaxf(highest, lses[split * arguments.rows]);
  }
  for (int step = 16; step > 0; step /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
  float sum = 0.0f;
  for (int split = lane; split < arguments.splits; split += 32) {
    sum += exp2_approximate((lses[split * arguments.rows] - highest) * kLog2E);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  const bool is_dead = sum == 0.0f;
  if (lane == 0) arguments.lse[row] = is_dead ? -INFINITY : highest + __logf(sum);

  const int64_t query = row % arguments.queries, head = row / arguments.queries % arguments.heads;
  const int64_t batch = row / arguments.queries / arguments.heads;
  Element* out = static_cast<Element*>(arguments.out.data) + batch * arguments.out.batch_stride +
                 head * arguments.out.head_stride + query * arguments.out.row_stride;
  for (int column = lane * 4; column < arguments.value_dim; column += 128) {
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < arguments.splits; ++split) {
      const int64_t place = split * arguments.rows + row;
      float weight = exp2_approximate((lses[split * arguments.rows] - highest) * kLog2E);
      float4 part = *reinterpret_cast<const float4*>(arguments.parts + place * arguments.value_dim + column);
      total.x += part.x * weight;
      total.y += part.y * weight;
      total.z += part.z * weight;
      total.w += part.w * weight;
    }
    const float factor = is_dead ? 0.0f : 1.0f / sum;
    store_pair(out + column, total.x * factor, total.y * factor);
    store_pair(out + column + 2, total.z * factor, total.w * factor);
  }
}

}  // namespace pk::cuda
