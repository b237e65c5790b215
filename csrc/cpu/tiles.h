// The product on Intel's tiles (AMX): a tile is 16 rows of 64 bytes, so 16 x 16 accumulators, or 16 rows of
// 16 bfloat16 pairs. Packed operands are tiles as they lie; what reaches over an edge goes through a copy
// that zeros fill up.
#pragma once

#include "simd.h"

namespace pk::cpu::PK_ISA {

constexpr int kTileSide = 16;  // rows, accumulators in a row, operands in a row

#if defined(PK_EMULATE_AMX)  // what the instructions compute; lets machines without them test the mode
struct Tile {
  uint32_t at[kTileSide][kTileSide];
};
inline thread_local Tile emulated_tiles[8];

struct TileSession {
  ~TileSession() {}
};
template <int kTile>
inline void tile_zero() {
  emulated_tiles[kTile] = {};
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    __builtin_memcpy(emulated_tiles[kTile].at[row], static_cast<const char*>(from) + row * stride, 64);
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    __builtin_memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[kTile].at[row], 64);
}
template <int kC, int kA, int kB>
inline void tile_multiply_add() {
  for (int row = 0; row < kTileSide; ++row)
    for (int column = 0; column < kTileSide; ++column) {
      float sum = bit_cast<float>(emulated_tiles[kC].at[row][column]);
      for (int step = 0; step < kTileSide; ++step) {
        const uint32_t a = emulated_tiles[kA].at[row][step], b = emulated_tiles[kB].at[step][column];
        sum += bit_cast<float>(a << 16) * bit_cast<float>(b << 16);
        sum += bit_cast<float>(a & 0xffff0000u) * bit_cast<float>(b & 0xffff0000u);
      }
      emulated_tiles[kC].at[row][column] = bit_cast<uint32_t>(sum);
    }
}
#else
// A thread's tiles are set up as long as one lives.
struct TileSession {
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileSession() { __asm__ volatile("tilerelease"); }
};
template <int kTile>
PK_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
PK_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
PK_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kC, int kA, int kB>
PK_INLINE void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
#endif

// The first `count` operands of a row, zeros behind them.
inline Vec<uint32_t> load_operands(const uint32_t* p, int64_t count) {
  return bit_cast<Vec<uint32_t>>(load_as<float>(reinterpret_cast<const float*>(p), count));
}

// A tile of which only so many rows and operands exist.
template <int kTile>
inline void tile_load_edge(const uint32_t* from, int64_t row, int64_t rows, int64_t operands) {
  alignas(64) uint32_t copy[kTileSide * kTileSide];
  for (int64_t r = 0; r < kTileSide; ++r)
    store(copy + r * kTileSide, r < rows ? load_operands(from + r * row, operands) : Vec<uint32_t>{});
  tile_load<kTile>(copy, kTileSide * sizeof(uint32_t));
}

}  // namespace pk::cpu::PK_ISA
