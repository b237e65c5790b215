// The register-tiled product that all passes are made of: C (rows x columns) from A (rows x depth) and B
// (depth x columns). Elements of A are broadcast, rows of B are vectors; a step of the depth is one operand
// wide: a float, a double, or two bfloat16 side by side. On tiles a step is 16 of these.
#pragma once

#include "math.h"
#include "simd.h"
#ifdef PK_AMX
#include "tiles.h"
#endif

namespace pk::cpu::PK_ISA {

// How numbers enter the product. Acc: accumulators; Operand: what one broadcast moves; kPack: elements per
// operand; kTerms: of the exponential whose results become operands; kRows: of A that one step takes;
// kOnTiles: whether that is a tile of the processor's own. Session: held by a thread while it multiplies.
struct NoSession {};
template <class T>
struct Plain {
  using Acc = T;
  using Operand = T;
  using Session = NoSession;
  static constexpr bool kOnTiles = false;
  static constexpr int kPack = 1, kTerms = kExpTerms<T>, kRows = kTileRows;
  static inline Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) { return a * b + c; }
};

struct BFloat16Pairs {
  using Acc = float;
  using Operand = uint32_t;
  using Session = NoSession;
  static constexpr bool kOnTiles = false;
  static constexpr int kPack = 2, kTerms = 4, kRows = kTileRows;
  static inline Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
#if defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else  // what the instruction computes; lets machines without it test the mode
    const Vec<float> odd =
        bit_cast<Vec<float> >(a & 0xffff0000u) * bit_cast<Vec<float> >(b & 0xffff0000u) + c;
    return bit_cast<Vec<float> >(a << 16) * bit_cast<Vec<float> >(b << 16) + odd;
#endif
  }
};

#ifdef PK_AMX
// The same pairs; those of a row of A lie next to each other (a_step 1), rows equally far apart (a_tile =
// a_row).
struct BFloat16Tiles : BFloat16Pairs {
  using Session = TileSession;
  static constexpr bool kOnTiles = true;
  static constexpr int kRows = 2 * kTileSide;
};
using BFloat16Mode = BFloat16Tiles;
#elif defined(__AVX512BF16__) || defined(PK_EMULATE_AVX512_BF16)
using BFloat16Mode = BFloat16Pairs;
#else
using BFloat16Mode = Plain<float>;  // converted in the packing
#endif

// C = AB; C = AB with column_max = max(column_max, C); C += AB; C = C * column_scale + AB
enum class Update { kStore, kStoreMax, kAdd, kRescale };

template <class Mode>
struct Product {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;

  const Operand* a;
  int64_t a_tile;         // a tile that starts at row r lies at a + r * a_tile
  int64_t a_row, a_step;  // within a tile
  const Operand* b;
  int64_t b_step;
  int64_t depth;  // in operands
  Acc* c;
  int64_t c_row;
  const Acc* column_scale = nullptr;  // Update::kRescale only
  Acc* column_max = nullptr;          // Update::kStoreMax only
};

template <class Mode, Update kUpdate, int kRows, int kVectors>
inline void multiply_tile(const Product<Mode>& p, int64_t row) {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  constexpr int kStep = kLanes<Acc>;
  Vec<Acc> acc[kRows][kVectors] = {};
  const Operand* a = p.a + row * p.a_tile;
  const Operand* b = p.b;
  const int64_t a_row = p.a_row;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step) {
    Vec<Operand> bs[kVectors];
    unrolled<kVectors>([&](auto v) { bs[v] = load(b + v * kStep); });
    unrolled<kRows>([&](auto r) {
      const Vec<Operand> ar = splat(a[r * a_row]);
      unrolled<kVectors>([&](auto v) { acc[r][v] = Mode::multiply_add(ar, bs[v], acc[r][v]); });
    });
  }
  Acc* c = p.c + row * p.c_row;
  unrolled<kRows>([&](auto r) {
    unrolled<kVectors>([&](auto v) {
      Acc* to = c + r * p.c_row + v * kStep;
      if constexpr (kUpdate == Update::kAdd) acc[r][v] += load(to);
      if constexpr (kUpdate == Update::kRescale) acc[r][v] += load(to) * load(p.column_scale + v * kStep);
      store(to, acc[r][v]);
    });
  });
  if constexpr (kUpdate == Update::kStoreMax)
    unrolled<kVectors>([&](auto v) {
      Vec<Acc> highest = load(p.column_max + v * kStep);
      unrolled<kRows>([&](auto r) { highest = maximum(acc[r][v], highest); });
      store(p.column_max + v * kStep, highest);
    });
}

#ifdef PK_AMX
// kRowTiles x kColumnTiles tiles of C, of whose rows `rows` exist.
template <Update kUpdate, int kRowTiles, int kColumnTiles>
inline void multiply_tiles(const Product<BFloat16Tiles>& p, int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kHeight = kRowTiles * kTileSide, kWidth = kColumnTiles * kTileSide;
  const uint32_t *a = p.a + row * p.a_row, *b = p.b + column;
  unrolled<kRowTiles * kColumnTiles>([](auto tile) { tile_zero<tile>(); });
  for (int64_t k = 0; k < p.depth; k += kTileSide, a += kTileSide, b += kTileSide * p.b_step) {
    const int64_t rest = p.depth - k;
    unrolled<kColumnTiles>([&](auto tile) {
      if (rest >= kTileSide)
        tile_load<6 + tile>(b + tile * kTileSide, p.b_step);
      else
        tile_load_edge<6 + tile>(b + tile * kTileSide, p.b_step, rest, kTileSide);
    });
    unrolled<kRowTiles>([&](auto tile) {
      const uint32_t* from = a + tile * kTileSide * p.a_row;
      if (rest >= kTileSide && rows == kHeight)
        tile_load<4 + tile>(from, p.a_row);
      else
        tile_load_edge<4 + tile>(from, p.a_row, rows - tile * kTileSide, rest);
    });
    unrolled<kRowTiles * kColumnTiles>(
        [](auto tile) { tile_multiply_add<tile, 4 + tile / kColumnTiles, 6 + tile % kColumnTiles>(); });
  }

  float* c = p.c + row * p.c_row + column;
  alignas(64) float local[kHeight * kWidth];
  const bool direct = (kUpdate == Update::kStore || kUpdate == Update::kStoreMax) && rows == kHeight;
  float* to = direct ? c : local;
  const int64_t to_row = direct ? p.c_row : kWidth;
  unrolled<kRowTiles * kColumnTiles>([&](auto tile) {
    constexpr int kRow = tile / kColumnTiles * kTileSide, kColumn = tile % kColumnTiles * kTileSide;
    tile_store<tile>(to + kRow * to_row + kColumn, to_row);
  });
  if (direct && kUpdate == Update::kStore) return;
  for (int64_t v = 0; v < kWidth; v += kTileSide) {
    Vec<float> scale = {}, highest = {};
    if constexpr (kUpdate == Update::kRescale) scale = load(p.column_scale + column + v);
    if constexpr (kUpdate == Update::kStoreMax) highest = load(p.column_max + column + v);
    for (int64_t r = 0; r < rows; ++r) {
      Vec<float> sum = load(to + r * to_row + v);
      if constexpr (kUpdate == Update::kAdd) sum += load(c + r * p.c_row + v);
      if constexpr (kUpdate == Update::kRescale) sum += load(c + r * p.c_row + v) * scale;
      if constexpr (kUpdate == Update::kStoreMax) highest = maximum(sum, highest);
      if (!direct) store(c + r * p.c_row + v, sum);
    }
    if constexpr (kUpdate == Update::kStoreMax) store(p.column_max + column + v, highest);
  }
}

template <Update kUpdate>
inline void multiply(const Product<BFloat16Tiles>& p, int64_t rows, int64_t columns) {
  constexpr int64_t kStep = BFloat16Tiles::kRows;  // two tiles each way
  for (int64_t row = 0; row < rows; row += kStep)
    for (int64_t column = 0; column < columns; column += kStep) {
      const int64_t count = rows - row < kStep ? rows - row : kStep;
      const bool tall = count > kTileSide, wide = columns - column > kTileSide;
      const auto run = tall   ? wide ? multiply_tiles<kUpdate, 2, 2> : multiply_tiles<kUpdate, 2, 1>
                       : wide ? multiply_tiles<kUpdate, 1, 2>
                              : multiply_tiles<kUpdate, 1, 1>;
      run(p, row, count, column);
    }
}
#endif

// `columns`: a multiple of the vector width, at most one panel.
template <Update kUpdate, class Mode>
inline void multiply(const Product<Mode>& p, int64_t rows, int64_t columns) {
  with_vectors<typename Mode::Acc>(columns, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows)
      multiply_tile<Mode, kUpdate, kTileRows, kVectors>(p, row);
    static_assert(kTileRows == 6);
    switch (rows - row) {
      case 1:
        return multiply_tile<Mode, kUpdate, 1, kVectors>(p, row);
      case 2:
        return multiply_tile<Mode, kUpdate, 2, kVectors>(p, row);
      case 3:
        return multiply_tile<Mode, kUpdate, 3, kVectors>(p, row);
      case 4:
        return multiply_tile<Mode, kUpdate, 4, kVectors>(p, row);
      case 5:
        return multiply_tile<Mode, kUpdate, 5, kVectors>(p, row);
    }
  });
}

}  // namespace pk::cpu::PK_ISA
