// Copies of rows in the order the products read them, converted to operands. A row is a pointer to contiguous
// channels; a null row counts as zeros, and so do the rows and channels that fill up the last pair.
#pragma once

#include "gemm.h"

namespace pk::cpu::PK_ISA {

// Packed buffers are written a vector at a time: leave this many operands of room behind the last one.
constexpr int64_t kPackSlack = kVectorBytes / sizeof(float);

template <class Mode>
inline int64_t steps(int64_t elements) {
  return (elements + Mode::kPack - 1) / Mode::kPack;
}

// One step of the depth where rows are the depth: a row, or a pair of rows, from `channel` on.
template <class Mode, class T>
inline Vec<typename Mode::Operand> load_row_step(const T* const* rows, int64_t r, int64_t count,
                                                 int64_t channel, int64_t rest) {
  using Acc = typename Mode::Acc;
  const auto row_at = [&](int64_t x) {
    return x < count && rows[x] ? load_as<Acc>(rows[x] + channel, rest) : Vec<Acc>{};
  };
  if constexpr (Mode::kPack == 2)
    return bit_cast<Vec<uint32_t>>(row_at(r)) >> 16 | bit_cast<Vec<uint32_t>>(row_at(r + 1));
  else
    return row_at(r);
}

// Channels are the depth: to[row][step].
template <class Mode, class T>
inline void pack_channel_steps(const T* const* rows, int64_t count, int64_t dim, typename Mode::Operand* to) {
  using Acc = typename Mode::Acc;
  const int64_t width = steps<Mode>(dim);
  for (int64_t r = 0; r < count; ++r, to += width) {
    const T* row = rows[r];
    if (!row) {
      for (int64_t step = 0; step < width; ++step) to[step] = 0;
    } else if constexpr (Mode::kPack == 2) {
      to[width - 1] = 0;
      __builtin_memcpy(to, row, dim * sizeof(T));
    } else {
      for (int64_t channel = 0; channel < dim; channel += kLanes<Acc>)
        store(to + channel, load_as<Acc>(row + channel, dim - channel));
    }
  }
}

// Rows are the depth: to[row step][channel - first] for `channels` channels, zeros up to `width`. Whole
// vectors are stored: what is too much of each is overwritten by the next.
template <class Mode, class T>
inline void pack_row_steps(const T* const* rows, int64_t count, int64_t first, int64_t channels,
                           int64_t width, typename Mode::Operand* to) {
  for (int64_t r = 0; r < count; r += Mode::kPack, to += width)
    for (int64_t channel = 0; channel < width; channel += kLanes<typename Mode::Acc>)
      store(to + channel, load_row_step<Mode>(rows, r, count, first + channel, channels - channel));
}

// Rows are the depth and channels come in tiles: to[tile][row step][channel in tile]. A tile is read from one
// end to the other, where rows as they are would cost a cache line for each of its steps. On the
// processor's own tiles: to[channel][row step], stored in whole squares.
template <class Mode>
inline int64_t channel_steps(int64_t rows) {
  return Mode::kOnTiles ? round_up(steps<Mode>(rows), kLanes<typename Mode::Operand>) : steps<Mode>(rows);
}
template <class Mode>
inline int64_t channel_tiles_size(int64_t rows, int64_t channels) {
  return channel_steps<Mode>(rows) * round_up(channels, Mode::kRows) + kPackSlack;
}
template <class Mode, class T>
inline void pack_channel_tiles(const T* const* rows, int64_t count, int64_t channels,
                               typename Mode::Operand* to) {
  const int64_t width = channel_steps<Mode>(count);
  if constexpr (Mode::kOnTiles) {
    constexpr int kSide = kLanes<typename Mode::Operand>;
    for (int64_t channel = 0; channel < channels; channel += kSide, to += kSide * width)
      for (int64_t step = 0; step < width; step += kSide) {
        Vec<typename Mode::Operand> block[kSide];
        for (int64_t side = 0; side < kSide; ++side)
          block[side] =
              load_row_step<Mode>(rows, (step + side) * Mode::kPack, count, channel, channels - channel);
        transpose<typename Mode::Operand>(block);
        for (int64_t side = 0; side < kSide; ++side) store(to + side * width + step, block[side]);
      }
  } else {
    for (int64_t tile = 0; tile < channels; tile += kTileRows, to += width * kTileRows)
      pack_row_steps<Mode>(rows, count, tile, channels - tile, kTileRows, to);
  }
}

// A product whose A was packed so, with `rows` rows as its depth.
template <class Mode>
inline Product<Mode> product_of_channels(const typename Mode::Operand* a, int64_t rows) {
  const int64_t width = channel_steps<Mode>(rows);
  Product<Mode> product{};
  product.a = a;
  product.a_tile = width;
  product.a_row = Mode::kOnTiles ? width : 1;
  product.a_step = Mode::kOnTiles ? 1 : kTileRows;
  return product;
}

// The operands at steps [step, step + vector width) of a row, zeros past its end.
template <class Mode, class T>
inline Vec<typename Mode::Operand> load_steps(const T* row, int64_t step, int64_t dim) {
  const int64_t first = step * Mode::kPack, rest = dim - first;
  if constexpr (Mode::kPack == 2) {
    Vec<uint32_t> v = {};
    __builtin_memcpy(&v, row + first, (rest < 2 * kLanes<float> ? rest : 2 * kLanes<float>)*sizeof(T));
    return v;
  } else {
    return load_as<typename Mode::Acc>(row + first, rest);
  }
}

// Channels are the depth and rows lie side by side: to[step][row], zeros for rows in [count, width).
template <class Mode, class T>
inline void pack_transposed(const T* const* rows, int64_t count, int64_t dim, int64_t width,
                            typename Mode::Operand* to) {
  using Operand = typename Mode::Operand;
  constexpr int kSide = kLanes<Operand>;
  const int64_t depth = steps<Mode>(dim);
  for (int64_t r = 0; r < width; r += kSide)
    for (int64_t step = 0; step < depth; step += kSide) {
      Vec<Operand> block[kSide];
      for (int64_t side = 0; side < kSide; ++side) {
        const T* row = r + side < count ? rows[r + side] : nullptr;
        block[side] = row ? load_steps<Mode>(row, step, dim) : Vec<Operand>{};
      }
      transpose<Operand>(block);
      for (int64_t side = 0; side < kSide && step + side < depth; ++side)
        store(to + (step + side) * width + r, block[side]);
    }
}

}  // namespace pk::cpu::PK_ISA
