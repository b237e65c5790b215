// Hopper's tensor-core products: four warps, a warp group, multiply 64 rows at a time, with operands in
// shared memory. Reached by sm_90a code alone.
//
// The accumulators lie in the threads as mma.sync's do, 16 rows for each warp of the group.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"
#include "cuda/mma.cuh"

namespace pk::cuda::hopper {

constexpr int kGroup = 128;  // threads of a warp group

// Rows of kDim 16-bit numbers in panels of 64 columns, 128 bytes, in which eight rows' chunks of one column
// lie in different banks (the hardware's 128-byte swizzle). Tiles begin at multiples of 1024 bytes.
template <int kDim, int kRows>
struct Panels {
  static constexpr int kRowCount = kRows, kCount = kDim / 64, kPanelBytes = 128 * kRows,
                       kBytes = kCount * kPanelBytes;
  static_assert(kDim % 64 == 0 && kRows % 8 == 0, "whole panels of whole groups of rows");

  __device__ static uint32_t offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + (chunk ^ row) % 8 * 16;
  }
};

// What tells the hardware where an operand lies: its address, and the bytes from one panel to the next, where
// the operand spans several along its contiguous side. Groups of eight rows follow one another.
__device__ __forceinline__ uint64_t describe(uint32_t address, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupBytes = 1024;
  return kSwizzle128 | kGroupBytes >> 4 << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// An operand whose rows are summed along (the depth of the product is its contiguous side), and one that is
// transposed (its rows are the depth), with the place of the `step`-th 16 of the depth.
template <int kDim, int kRows>
__device__ __forceinline__ uint64_t along_rows(uint32_t tile, int step) {
  return describe(tile + step / 4 * Panels<kDim, kRows>::kPanelBytes + step % 4 * 32, 16);
}

template <int kDim, int kRows>
__device__ __forceinline__ uint64_t across_rows(uint32_t tile, int step) {
  return describe(tile + step * 16 * 128, Panels<kDim, kRows>::kPanelBytes);
}

// Before the first product, and whenever other instructions have touched its registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Until all groups of products but the latest kPending are there.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what concerns these registers across a wait.
template <int kTiles>
__device__ __forceinline__ void pin(Accumulator (&sums)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[n][e])::"memory");
  }
}

// What this thread has written to shared memory the tensor cores may read once it has met their warps.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

#define PK_SUMS_4(c, n) c(sums[n][0]), c(sums[n][1]), c(sums[n][2]), c(sums[n][3])
#define PK_SUMS_16(c, n) PK_SUMS_4(c, n), PK_SUMS_4(c, n + 1), PK_SUMS_4(c, n + 2), PK_SUMS_4(c, n + 3)
#define PK_SUMS_32(c, n) PK_SUMS_16(c, n), PK_SUMS_16(c, n + 4)
#define PK_SUMS_64(c, n) PK_SUMS_32(c, n), PK_SUMS_32(c, n + 8)
#define PK_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PK_LIST_32 \
  PK_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_LIST_64                                                                                    \
  PK_LIST_32                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `c`: "+f" to add to the sums, "=f" to begin them. The places of the operands that follow the sums: a, b,
// ...
#define PK_PRODUCT(c, columns, type, count, list, a, b, d, ta, tb)                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" d                                                 \
               ", 0;\n"                                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, %" a    \
               ", %" b ", add, 1, 1, %" ta ", %" tb ";\n}\n"                                              \
               : PK_SUMS_##count(c, 0)                                                                    \
               : "l"(left), "l"(right), "n"(static_cast<int>(kAdds)), "n"(static_cast<int>(kLeftAcross)), \
                 "n"(static_cast<int>(kRightAcross)))

// The left operand in registers.
#define PK_PRODUCT_OF_REGISTERS(columns, type, count, list, a0, a1, a2, a3, b, tb)                       \
  asm volatile(                                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, {%" a0 ", %" a1 \
      ", %" a2 ", %" a3 "}, %" b ", add, 1, 1, %" tb ";\n}\n"                                            \
      : PK_SUMS_##count("+f", 0)                                                                         \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),                              \
        "n"(static_cast<int>(kRightAcross)))

#define PK_PRODUCTS(c)                                                          \
  constexpr bool kHalf = std::is_same_v<Element, __half>;                       \
  if constexpr (kTiles == 4 && kHalf) {                                         \
    PK_PRODUCT(c, "32", "f16", 16, PK_LIST_16, "16", "17", "18", "19", "20");   \
  } else if constexpr (kTiles == 4) {                                           \
    PK_PRODUCT(c, "32", "bf16", 16, PK_LIST_16, "16", "17", "18", "19", "20");  \
  } else if constexpr (kTiles == 8 && kHalf) {                                  \
    PK_PRODUCT(c, "64", "f16", 32, PK_LIST_32, "32", "33", "34", "35", "36");   \
  } else if constexpr (kTiles == 8) {                                           \
    PK_PRODUCT(c, "64", "bf16", 32, PK_LIST_32, "32", "33", "34", "35", "36");  \
  } else if constexpr (kHalf) {                                                 \
    PK_PRODUCT(c, "128", "f16", 64, PK_LIST_64, "64", "65", "66", "67", "68");  \
  } else {                                                                      \
    PK_PRODUCT(c, "128", "bf16", 64, PK_LIST_64, "64", "65", "66", "67", "68"); \
  }

// sums (64, 8 kTiles) = or, where kAdds, += left (64, 16) @ right (16, 8 kTiles); k...Across: an operand is
// transposed. What is begun needs no registers before.
template <class Element, bool kAdds, bool kLeftAcross, bool kRightAcross, int kTiles>
__device__ __forceinline__ void multiply(Accumulator (&sums)[kTiles], uint64_t left, uint64_t right) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16, "32, 64 or 128 columns");
  if constexpr (kAdds) {
    PK_PRODUCTS("+f")
  } else {
    PK_PRODUCTS("=f")
  }
}

template <class Element, bool kRightAcross, int kTiles>
__device__ __forceinline__ void multiply(Accumulator (&sums)[kTiles], const Fragment& left, uint64_t right) {
  static_assert(kTiles == 8 || kTiles == 16, "64 or 128 columns");
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  if constexpr (kTiles == 8 && kHalf) {
    PK_PRODUCT_OF_REGISTERS("64", "f16", 32, PK_LIST_32, "32", "33", "34", "35", "36", "37");
  } else if constexpr (kTiles == 8) {
    PK_PRODUCT_OF_REGISTERS("64", "bf16", 32, PK_LIST_32, "32", "33", "34", "35", "36", "37");
  } else if constexpr (kHalf) {
    PK_PRODUCT_OF_REGISTERS("128", "f16", 64, PK_LIST_64, "64", "65", "66", "67", "68", "69");
  } else {
    PK_PRODUCT_OF_REGISTERS("128", "bf16", 64, PK_LIST_64, "64", "65", "66", "67", "68", "69");
  }
}

#undef PK_PRODUCT
#undef PK_PRODUCT_OF_REGISTERS
#undef PK_PRODUCTS

// sums (64, 8 kTiles) = left (64, kDim) @ right (8 kTiles, kDim)^T, from tiles of kLeftRows and kRightRows.
template <class Element, int kDim, int kLeftRows, int kRightRows, int kTiles>
__device__ __forceinline__ void multiply_rows(Accumulator (&sums)[kTiles], uint32_t left, uint32_t right) {
  multiply<Element, false, false, false>(sums, along_rows<kDim, kLeftRows>(left, 0),
                                         along_rows<kDim, kRightRows>(right, 0));
#pragma unroll
  for (int k = 1; k < kDim / 16; ++k) {
    multiply<Element, true, false, false>(sums, along_rows<kDim, kLeftRows>(left, k),
                                          along_rows<kDim, kRightRows>(right, k));
  }
}

// sums (64, kDim) += weights (64, 16 kSteps) @ rows (16 kSteps, kDim).
template <class Element, int kDim, int kSteps, int kTiles>
__device__ __forceinline__ void add_rows(Accumulator (&sums)[kTiles], const Fragment (&weights)[kSteps],
                                         uint32_t rows) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    multiply<Element, true>(sums, weights[k], across_rows<kDim, 16 * kSteps>(rows, k));
  }
}

}  // namespace pk::cuda::hopper
