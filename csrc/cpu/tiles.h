// Intel's tiles (AMX): 16 rows of 64 bytes, so 16 x 16 accumulators or 16 rows of 16 bfloat16 pairs. Packed
// operands are tiles as they lie; what reaches over an edge goes through a copy that zeros fill up. Strides
// are in elements of four bytes.
#pragma once

#include "simd.h"

namespace pk::cpu::PK_ISA {

constexpr int kTileSide = 16;  // rows, accumulators in a row, operands in a row
static_assert(kTileSide == kLanes<float>);

#ifdef PK_EMULATE_AMX  // what the instructions compute, but for subnormal numbers, which they take as zeros
struct Tile {
  uint32_t at[kTileSide][kTileSide];
};
inline thread_local Tile emulated_tiles[8];
inline thread_local bool emulated_tiles_are_set_up = false;
inline Tile& emulated_tile(int tile) {
  if (!emulated_tiles_are_set_up) __builtin_trap();
  return emulated_tiles[tile];
}

class TileSession {
 public:
  TileSession() : before_(emulated_tiles_are_set_up) {
    emulated_tiles_are_set_up = true;
    for (Tile& tile : emulated_tiles) tile = {};
  }
  ~TileSession() { emulated_tiles_are_set_up = before_; }
  TileSession(const TileSession&) = delete;

 private:
  bool before_;
};
template <int kTile>
inline void tile_zero() {
  emulated_tile(kTile) = {};
}
template <int kTile>
inline void tile_load(const uint32_t* from, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    __builtin_memcpy(emulated_tile(kTile).at[row], from + row * stride, 64);
}
template <int kTile>
inline void tile_store(float* to, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    __builtin_memcpy(to + row * stride, emulated_tile(kTile).at[row], 64);
}
template <int kC, int kA, int kB>
inline void tile_multiply_add() {
  for (int row = 0; row < kTileSide; ++row)
    for (int column = 0; column < kTileSide; ++column) {
      float even = 0, odd = 0;
      for (int step = 0; step < kTileSide; ++step) {
        const uint32_t a = emulated_tile(kA).at[row][step], b = emulated_tile(kB).at[step][column];
        even += bit_cast<float>(a << 16) * bit_cast<float>(b << 16);
        odd += bit_cast<float>(a & 0xffff0000u) * bit_cast<float>(b & 0xffff0000u);
      }
      uint32_t& c = emulated_tile(kC).at[row][column];
      c = bit_cast<uint32_t>(bit_cast<float>(c) + (even + odd));
    }
}
#else
// While one lives, this thread's tiles are set up as we use them; then as they were: others may count on
// that.
class TileSession {
 public:
  TileSession() {
    Configuration ours;
    ours.palette = 1;
    for (int tile = 0; tile < 8; ++tile) ours.row_bytes[tile] = 64, ours.rows[tile] = kTileSide;
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    __asm__ volatile("ldtilecfg %0" ::"m"(ours));
  }
  ~TileSession() { __asm__ volatile("ldtilecfg %0" ::"m"(before_)); }
  TileSession(const TileSession&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Configuration before_;
};
template <int kTile>
PK_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
PK_INLINE void tile_load(const uint32_t* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,4), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
PK_INLINE void tile_store(float* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,4)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kC, int kA, int kB>
PK_INLINE void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
#endif

// The first `count` operands of a row, zeros behind them.
inline Vec<uint32_t> load_operands(const uint32_t* p, int64_t count) {
  if (count >= kTileSide) return load(p);
#ifdef __AVX512F__
  return (Vec<uint32_t>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(count)), p);
#else
  Vec<uint32_t> v = {};
  __builtin_memcpy(&v, p, count * sizeof *p);
  return v;
#endif
}

// A tile of which only so many rows and operands exist.
template <int kTile>
inline void tile_load_edge(const uint32_t* from, int64_t stride, int64_t rows, int64_t operands) {
  alignas(64) uint32_t copy[kTileSide * kTileSide];
  for (int64_t r = 0; r < kTileSide; ++r)
    store(copy + r * kTileSide, r < rows ? load_operands(from + r * stride, operands) : Vec<uint32_t>{});
  tile_load<kTile>(copy, kTileSide);
}

}  // namespace pk::cpu::PK_ISA
