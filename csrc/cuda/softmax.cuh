// What happens between the two products, on the accumulators in a warp's registers: softcap, visibility, the
// online softmax in base 2, dropout.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"
#include "cuda/work.cuh"
#include "score.h"

namespace pk::cuda {

constexpr float kLowest = -1e38f;  // where a row's maximum starts: finite, so that no -inf meets another
constexpr float kSlack = 8.0f;     // how far a row's scores may outgrow its maximum, in powers of two
constexpr float kLn2 = 0.693147180559945f;

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// To float32's own precision: near 0 the exponentials would cancel.
__device__ __forceinline__ float tanh_accurate(float x) {
  float square = x * x;
  float series = fmaf(square, -0.00602131f, 0.02120866f);
  series = fmaf(square, series, -0.05391115f);
  series = fmaf(square, series, 0.13333147f);
  series = fmaf(square, series, -0.33333333f);
  float near = fmaf(x * square, series, x);
  float z = exp2_approximate(fabsf(x) * -2.885390082f);
  float far = __fdividef(1.0f - z, 1.0f + z);
  return fabsf(x) < 0.55f ? near : copysignf(far, x);
}

// One number for each of a thread's rows: row h of row tile m is row m * 16 + h * 8 + lane / 4 of its warp.
template <int kRowTiles>
using Rows = float[kRowTiles][2];

template <int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void cap_scores(Accumulator (&scores)[kRowTiles][kKeyTiles], float softcap,
                                           float capped_scale) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = softcap * tanh_accurate(scores[m][n][e] * capped_scale);
    }
  }
}

// -inf where bit j of `keys` isn't set or key first + j is beyond the row's limit; j counts from this
// thread's first of the eight tiles of keys (all there are, if fewer) from kFirstTile on.
template <int kFirstTile = 0, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_scores(Accumulator (&scores)[kRowTiles][kKeyTiles], uint64_t keys,
                                            const int (&limits)[kRowTiles][2], int first) {
  constexpr int kTiles = kKeyTiles - kFirstTile < 8 ? kKeyTiles - kFirstTile : 8;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int j = n * 8 + e % 2;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (!(keys >> j & 1) || j >= limits[m][e / 2] - first) scores[m][kFirstTile + n][e] = -INFINITY;
      }
    }
  }
}

template <int kRowTiles>
struct OnlineSoftmax {
  Rows<kRowTiles> maximum, sum;  // of exponents; of this thread's weights relative to the maximum

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      maximum[m][0] = maximum[m][1] = kLowest;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // Before a row's scores become weights: its maximum rises, and its sums shrink, where the scores have
  // outgrown it by more than kSlack. Below that the weights are large but exact, and what's rare costs next
  // to nothing.
  template <int kKeyTiles, int kTiles>
  __device__ __forceinline__ void raise_maximum(const Accumulator (&scores)[kRowTiles][kKeyTiles],
                                                float exponent, Accumulator (&sums)[kRowTiles][kTiles]) {
    Rows<kRowTiles> highest;
    bool has_grown = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float found = fmaxf(scores[m][0][2 * h], scores[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) {
          found = fmaxf(found, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        }
        found = fmaxf(found, __shfl_xor_sync(kAllLanes, found, 1));
        highest[m][h] = fmaxf(found, __shfl_xor_sync(kAllLanes, found, 2)) * exponent;
        has_grown |= highest[m][h] > maximum[m][h] + kSlack;
      }
    }
    if (!__any_sync(kAllLanes, has_grown)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A row's result doesn't depend on its neighbours: where it hasn't grown, the factor is 1.
        float raised = highest[m][h] > maximum[m][h] + kSlack ? highest[m][h] : maximum[m][h];
        float decay = exp2_approximate(maximum[m][h] - raised);
        maximum[m][h] = raised;
        sum[m][h] *= decay;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          sums[m][n][2 * h] *= decay;
          sums[m][n][2 * h + 1] *= decay;
        }
      }
    }
  }

  // Scores become weights.
  template <int kKeyTiles>
  __device__ __forceinline__ void weigh(Accumulator (&scores)[kRowTiles][kKeyTiles], float exponent) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[m][n][e] = exp2_approximate(fmaf(scores[m][n][e], exponent, -maximum[m][e / 2]));
          sum[m][e / 2] += scores[m][n][e];
        }
      }
    }
  }

  // The sums of the four threads that share a row meet.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += __shfl_xor_sync(kAllLanes, sum[m][h], 1);
        sum[m][h] += __shfl_xor_sync(kAllLanes, sum[m][h], 2);
      }
    }
  }
};

// Weights of entries that aren't kept become 0. `row`, `key`: this thread's first; row r is query r / group
// of head first_head + r % group.
template <int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void drop_weights(Accumulator (&weights)[kRowTiles][kKeyTiles], uint64_t seed,
                                             uint32_t threshold, int batch, int first_head, int group,
                                             int row, uint32_t key) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * 16 + h * 8;
      const int query = r / group, head = first_head + r % group;
      uint32_t dropped = 0;
#pragma unroll 1  // ten rounds each: a loop of its own keeps the code short
      for (int j = 0; j < 2 * kKeyTiles; ++j) {
        bool is_dropped = philox(seed, batch, head, query, key + j / 2 * 8 + j % 2) < threshold;
        dropped |= static_cast<uint32_t>(is_dropped) << j;
      }
#pragma unroll
      for (int j = 0; j < 2 * kKeyTiles; ++j) {
        if (dropped >> j & 1) weights[m][j / 2][2 * h + j % 2] = 0.0f;
      }
    }
  }
}

}  // namespace pk::cuda
