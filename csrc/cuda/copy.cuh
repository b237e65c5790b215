// Tiles of 16-bit numbers in shared memory: where an element lies, and how rows get there asynchronously.
#pragma once

#include <cstdint>

namespace pk::cuda {

constexpr int kChunk = 8;  // numbers in 16 bytes, the unit of every copy

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros, and nothing is read, where not is_there.
__device__ __forceinline__ void copy_chunk(uint32_t target, const void* source, bool is_there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until all groups but the latest kPending have landed, those of other threads too.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
  __syncthreads();
}

// Until those of this thread have landed.
__device__ __forceinline__ void wait_for_own_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Barriers of some warps, kThreads in all: those that arrive go on, those that await don't until all are
// there.
template <int kThreads>
__device__ __forceinline__ void arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void await(int barrier) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Rows of kDim numbers. Eight rows' chunks of one column lie in different banks: a row permutes its chunks,
// in groups of kSpan, by the exclusive or with a number that differs between rows that begin in the same
// bank.
template <int kDim>
struct Tile {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kSpan = kDim % 64 == 0 ? 8 : 4;
  static_assert(kDim % 32 == 0, "a row is a whole number of groups");

  __device__ static uint32_t offset(int row, int chunk) {
    int permutation = kSpan == 8 ? row % 8 : row / 2 % 4;
    return row * kRowBytes + (chunk ^ permutation) * 16;
  }

  // From the address of chunk 0 of a row to that of another.
  __device__ static uint32_t chunk(uint32_t address, int number) {
    return (address ^ (number % kSpan * 16)) + number / kSpan * kSpan * 16;
  }

  // From the address of chunk 0 or 1 of a row to that of the chunk 2 * pairs further on.
  __device__ static uint32_t advance(uint32_t address, int pairs) { return chunk(address, 2 * pairs); }
};

// This thread's share in copying kRows rows at a time: kSpan threads share a row.
template <int kDim, int kRows, int kThreads>
struct Copier {
  static constexpr int kSpan = Tile<kDim>::kSpan;
  static constexpr int kRowStep = kThreads / kSpan;
  static constexpr int kSteps = (kRows + kRowStep - 1) / kRowStep;
  static_assert((kRows % kRowStep == 0 || kSteps == 1) && kRowStep % 8 == 0,
                "equal shares, or one row or none");

  int row, column;
  uint32_t offset;

  __device__ explicit Copier(int thread = threadIdx.x)
      : row(thread / kSpan),
        column(thread % kSpan * kChunk),
        offset(Tile<kDim>::offset(thread / kSpan, thread % kSpan)) {}

  // The chunks of row `row + step * kRowStep`, the first of which is at `source`.
  __device__ void copy_row(uint32_t tile, int step, const uint16_t* source, int dim, bool is_there) const {
    if (kRows < kRowStep && row >= kRows) return;
    uint32_t target = tile + offset + step * kRowStep * Tile<kDim>::kRowBytes;
#pragma unroll
    for (int skip = 0; skip < kDim; skip += kSpan * kChunk) {
      copy_chunk(target + 2 * skip, source + skip, is_there && column + skip < dim);
    }
  }

  // `source`: this thread's first chunk, moved on to the next tile. Bit j of `rows`: row j is copied, not
  // zero.
  template <bool kMasked>
  __device__ void copy_tile(uint32_t tile, const uint16_t*& source, int64_t row_stride, int dim,
                            uint64_t rows) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      copy_row(tile, step, source, dim, !kMasked || (rows >> (row + step * kRowStep) & 1));
      source += kRowStep * row_stride;
    }
  }

  // Zero and one exchanged in the signs of what this thread has copied and waited for.
  __device__ void flip_signs(uint32_t tile, uint32_t signs) const {
    if (kRows < kRowStep && row >= kRows) return;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int skip = 0; skip < kDim; skip += kSpan * kChunk) {
        uint32_t at = tile + offset + step * kRowStep * Tile<kDim>::kRowBytes + 2 * skip;
        asm volatile(
            "{\n.reg .b32 a, b, c, d;\n"
            "ld.shared.v4.b32 {a, b, c, d}, [%0];\n"
            "xor.b32 a, a, %1;\nxor.b32 b, b, %1;\nxor.b32 c, c, %1;\nxor.b32 d, d, %1;\n"
            "st.shared.v4.b32 [%0], {a, b, c, d};\n}\n" ::"r"(at),
            "r"(signs)
            : "memory");
      }
    }
  }
};

}  // namespace pk::cuda
