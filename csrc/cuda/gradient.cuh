// The steps of the backward kernel: from scores to weights and their gradients, on accumulators in a warp's
// registers, and what goes through memory between warps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/backward.h"
#include "cuda/copy.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/mma.cuh"
#include "cuda/softmax.cuh"
#include "cuda/work.cuh"
#include "score.h"

namespace pk::cuda {

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

// Rows by tiles of 8 x keys by tiles of 16, transposed: of accumulator [m][n] element e belongs to this
// thread's key m * 16 + e / 2 * 8 and row n * 8 + e % 2.
template <int kKeyTiles, int kRowTiles>
using Transposed = Accumulator[kKeyTiles][kRowTiles];

// What happens to the scores of a few rows, between the products.
template <int kKeyTiles, int kRowTiles, bool kMasked, bool kHasScore>
struct Step {
  using Scores = Transposed<kKeyTiles, kRowTiles>;
  using Bits = std::conditional_t<kKeyTiles * kRowTiles <= 8, uint32_t, uint64_t>;  // one for each score

  const BackwardArguments& arguments;
  const Example& example;
  const int (&first_rows)[kKeyTiles][2];  // the first packed row that sees each of this thread's keys
  int row, key;                           // this thread's first

  // Scores become P * Z, but for dropout's constant factor; `factors` P * score_grad, negative where dropout
  // has its zero.
  __device__ __forceinline__ void weigh(Scores& scores, Scores& factors, uint32_t shifts) const {
    Bits dropped = 0;
    if (kHasScore && arguments.dropout_seed != nullptr) dropped = find_dropped();
    const float inverse_softcap = kHasScore ? 1.0f / arguments.softcap : 0.0f;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const float2 shift = load_shared_pair(shifts + n * 32);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float x = scores[m][n][e], grad = 1.0f;
          if (kHasScore && arguments.softcap > 0.0f) {
            x = arguments.softcap * tanh_accurate(x * arguments.capped_scale);
            grad = softcap_grad(x, inverse_softcap);
          }
          float weight = exp2_approximate(fmaf(x, arguments.exponent, e % 2 == 0 ? -shift.x : -shift.y));
          if (kMasked && row + n * 8 + e % 2 < first_rows[m][e / 2]) weight = 0.0f;
          const bool is_dropped = dropped >> ((n * kKeyTiles + m) * 4 + e) & 1;
          scores[m][n][e] = is_dropped ? 0.0f : weight;
          factors[m][n][e] = is_dropped ? -weight * grad : weight * grad;
        }
      }
    }
  }

  // dP, but for Z, becomes dS.
  __device__ __forceinline__ void differentiate(Scores& products, const Scores& factors,
                                                uint32_t deltas) const {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const float2 delta = load_shared_pair(deltas + n * 32);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float product = products[m][n][e], factor = factors[m][n][e];
          if constexpr (kHasScore) {
            product = __float_as_int(factor) < 0 ? 0.0f : product * arguments.keep_factor;
            factor = fabsf(factor);
          }
          products[m][n][e] = factor * (product - (e % 2 == 0 ? delta.x : delta.y));
        }
      }
    }
  }

 private:
  // Bit (n * kKeyTiles + m) * 4 + e: accumulator [m][n]'s element e is dropped. Packed row r is query
  // r / group of the key head's query head r % group.
  __device__ __forceinline__ Bits find_dropped() const {
    const int group = arguments.group;
    const int64_t seed = arguments.dropout_seed[0];
    const uint32_t first_key = static_cast<uint32_t>(arguments.dropout_seed[1]);
    Bits dropped = 0;
#pragma unroll 1  // ten rounds each: a loop of its own keeps the code short
    for (int i = 0; i < kKeyTiles * kRowTiles * 4; ++i) {
      const int r = row + i / 4 / kKeyTiles * 8 + i % 2;
      const int j = key + i / 4 % kKeyTiles * 16 + i % 4 / 2 * 8;
      const uint32_t word =
          philox(seed, example.batch, example.kv_head * group + r % group, r / group, first_key + j);
      dropped |= static_cast<Bits>(word < arguments.dropout_threshold) << i;
    }
    return dropped;
  }
};

// Through shared memory to the thread with the same keys and rows, rounded, 16 bytes for two accumulators.
template <class Element, int kKeyTiles, int kRowTiles>
__device__ __forceinline__ void send(const Transposed<kKeyTiles, kRowTiles>& weights, uint32_t place) {
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kRowTiles; n += 2) {
      const Accumulator &a = weights[m][n], &b = weights[m][n + 1];
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(place + (m * kRowTiles + n) * 256),
                   "r"(pack<Element>(a[0], a[1])), "r"(pack<Element>(a[2], a[3])),
                   "r"(pack<Element>(b[0], b[1])), "r"(pack<Element>(b[2], b[3]))
                   : "memory");
    }
  }
}

template <class Element, int kKeyTiles, int kRowTiles>
__device__ __forceinline__ void receive(Transposed<kKeyTiles, kRowTiles>& weights, uint32_t place) {
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kRowTiles; n += 2) {
      uint32_t packed[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(packed[0]), "=r"(packed[1]), "=r"(packed[2]), "=r"(packed[3])
                   : "r"(place + (m * kRowTiles + n) * 256)
                   : "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Element>(packed[i]);
        weights[m][n + i / 2][i % 2 * 2] = pair.x;
        weights[m][n + i / 2][i % 2 * 2 + 1] = pair.y;
      }
    }
  }
}

// dS^T, rounded, to a tile whose rows are keys. `tile`: the warp's first key.
template <class Element, int kBlockM, int kKeyTiles, int kRowTiles>
__device__ __forceinline__ void store_gradients(const Transposed<kKeyTiles, kRowTiles>& gradients,
                                                uint32_t tile, int row, int lane) {
  const uint32_t first = tile + Tile<kBlockM>::offset(lane / 4, 0) + lane % 4 * 4;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const uint32_t place = Tile<kBlockM>::chunk(first, row / 8 + n);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t packed = pack<Element>(gradients[m][n][2 * h], gradients[m][n][2 * h + 1]);
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(place + (m * 16 + h * 8) * Tile<kBlockM>::kRowBytes),
                     "r"(packed)
                     : "memory");
      }
    }
  }
}

// dq += dS @ key, of 16-row tiles from first_row on and 8-channel tiles from first_column on. Both operands'
// tiles have keys for rows.
template <class Element, int kDim, int kBlockM, int kBlockN, int kQueryTiles, int kColumnTiles>
__device__ __forceinline__ void add_queries(Accumulator (&dq)[kQueryTiles][kColumnTiles], uint32_t gradients,
                                            uint32_t keys, int first_row, int first_column) {
  uint32_t rows[kQueryTiles], columns[kColumnTiles / 2];
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) rows[m] = Tile<kBlockM>::advance(gradients, first_row + m);
#pragma unroll
  for (int n = 0; n < kColumnTiles / 2; ++n) columns[n] = Tile<kDim>::advance(keys, first_column / 2 + n);
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    Fragment a[kQueryTiles];
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m) {
      load_fragment_transposed(a[m], rows[m] + k * 16 * Tile<kBlockM>::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      Fragment b;
      load_fragment_transposed(b, columns[n / 2] + k * 16 * Tile<kDim>::kRowBytes);
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m) {
        multiply<Element>(dq[m][n], a[m], b[0], b[1]);
        multiply<Element>(dq[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Rounded, of keys from `key` on, this thread's first.
template <class Element, int kKeyTiles, int kTiles>
__device__ __forceinline__ void store_keys(const View& view, const Example& example, int dim, int key,
                                           const Accumulator (&sums)[kKeyTiles][kTiles], float factor) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = key + m * 16 + h * 8;
      if (j >= example.keys) continue;
      Element* target = at<Element>(view, example.batch, example.kv_head, example.first_key + j);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (column + n * 8 < dim) {
          store_pair(target + column + n * 8, sums[m][n][2 * h] * factor, sums[m][n][2 * h + 1] * factor);
        }
      }
    }
  }
}

}  // namespace pk::cuda
