// Tensor-core products of 16 x 16 by 16 x 8, and their operands' fragments.
//
// In a warp, lane l holds of an accumulator (16 rows, 8 columns) the columns 2 (l % 4) and the next, of row l
// / 4 in elements 0, 1 and of row l / 4 + 8 in elements 2, 3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"

namespace pk::cuda {

using Accumulator = float[4];
using Fragment = uint32_t[4];

__device__ __forceinline__ void load_fragment(Fragment& fragment, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_fragment_transposed(Fragment& fragment, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

template <class Element>
__device__ __forceinline__ void multiply(Accumulator& sum, const Fragment& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two numbers, rounded, as one register.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  } else {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  }
}

// Where a lane's row of the first 16 x 16 block of a tile lies, for load_fragment of ...
// ... a left operand, or transposed of a right operand whose rows are summed over.
template <int kDim>
__device__ __forceinline__ uint32_t lane_offset(int lane) {
  return Tile<kDim>::offset(lane % 16, lane / 16);
}

// ... a right operand of which each row makes a column of the product.
template <int kDim>
__device__ __forceinline__ uint32_t lane_offset_of_columns(int lane) {
  return Tile<kDim>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// scores = query @ key^T. `query`: its fragments, or their address where they don't stay in registers.
template <class Element, int kDim, int kRowTiles, int kKeyTiles, class Query>
__device__ __forceinline__ void multiply_scores(Accumulator (&scores)[kRowTiles][kKeyTiles],
                                                const Query& query, uint32_t key) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    Fragment a[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) query.load(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      Fragment b;
      load_fragment(b, Tile<kDim>::advance(key, k) + n * 8 * Tile<kDim>::kRowBytes);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply<Element>(scores[m][n], a[m], b[0], b[1]);
        multiply<Element>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The accumulators of two neighbouring tiles of eight columns are, rounded, a left operand.
template <class Element, int kTiles>
__device__ __forceinline__ void pack_weights(Fragment& a, const Accumulator (&weights)[kTiles], int pair) {
  const Accumulator &low = weights[2 * pair], &high = weights[2 * pair + 1];
  a[0] = pack<Element>(low[0], low[1]);
  a[1] = pack<Element>(low[2], low[3]);
  a[2] = pack<Element>(high[0], high[1]);
  a[3] = pack<Element>(high[2], high[3]);
}

// And back again.
template <class Element, int kTiles>
__device__ __forceinline__ void unpack_weights(Accumulator (&weights)[kTiles],
                                               const Fragment (&a)[kTiles / 2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 pair = unpack<Element>(a[n / 2][n % 2 * 2 + h]);
      weights[n][2 * h] = pair.x;
      weights[n][2 * h + 1] = pair.y;
    }
  }
}

// sums += weights @ value.
template <class Element, int kDim, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void add_weighted(Accumulator (&sums)[kRowTiles][kDim / 8],
                                             const Accumulator (&weights)[kRowTiles][kKeyTiles],
                                             uint32_t value) {
#pragma unroll
  for (int k = 0; k < kKeyTiles; k += 2) {
    Fragment a[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) pack_weights<Element>(a[m], weights[m], k / 2);
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      Fragment b;
      load_fragment_transposed(b, Tile<kDim>::advance(value, n / 2) + k * 8 * Tile<kDim>::kRowBytes);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply<Element>(sums[m][n], a[m], b[0], b[1]);
        multiply<Element>(sums[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Left operands that stay in registers, and those that are loaded whenever they are needed.
template <int kDim, int kRowTiles, bool kInRegisters>
struct LeftOperand {
  uint32_t address;

  __device__ void load_all(uint32_t at) { address = at; }
  __device__ void load(Fragment& fragment, int m, int k) const {
    load_fragment(fragment, Tile<kDim>::advance(address, k) + m * 16 * Tile<kDim>::kRowBytes);
  }
};

template <int kDim, int kRowTiles>
struct LeftOperand<kDim, kRowTiles, true> {
  Fragment fragments[kRowTiles][kDim / 16];

  __device__ void load_all(uint32_t at) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        load_fragment(fragments[m][k], Tile<kDim>::advance(at, k) + m * 16 * Tile<kDim>::kRowBytes);
      }
    }
  }
  __device__ void load(Fragment& fragment, int m, int k) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) fragment[e] = fragments[m][k][e];
  }
};

}  // namespace pk::cuda
