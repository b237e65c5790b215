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

template <class T>
inline uint32_t pair_of(const T* low, const T* high, int64_t channel) {
  uint32_t low_bits = low ? low[channel].bits : 0u;
  uint32_t high_bits = high ? high[channel].bits : 0u;
  return low_bits | high_bits << 16;
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

// Rows are the depth: to[row step][channel - first] for `channels` channels, zeros up to `width`.
template <class Mode, class T>
inline void pack_row_steps(const T* const* rows, int64_t count, int64_t first, int64_t channels,
                           int64_t width, typename Mode::Operand* to) {
  using Acc = typename Mode::Acc;
  for (int64_t r = 0; r < count; r += Mode::kPack, to += width) {
    const T* row = rows[r];
    int64_t channel = 0;
    if constexpr (Mode::kPack == 2) {
      const T* next = r + 1 < count ? rows[r + 1] : nullptr;
      if (row && next)
        for (; channel + kLanes<float> <= channels; channel += kLanes<float>) {
          Vec<uint32_t> low = bit_cast<Vec<uint32_t>>(load_as(row + first + channel)) >> 16;
          store(to + channel, low | bit_cast<Vec<uint32_t>>(load_as(next + first + channel)));
        }
      for (; channel < channels; ++channel) to[channel] = pair_of(row, next, first + channel);
    } else if (row) {
      for (; channel < channels; channel += kLanes<Acc>)
        store(to + channel, load_as<Acc>(row + first + channel, channels - channel));
      channel = channels;
    }
    for (; channel < width; ++channel) to[channel] = 0;
  }
}

// Rows are the depth and channels come in tiles: to[tile][row step][channel in tile]. A tile is read from one
// end to the other, where rows as they are would cost a cache line for each of its steps.
template <class Mode, class T>
inline void pack_channel_tiles(const T* const* rows, int64_t count, int64_t channels,
                               typename Mode::Operand* to) {
  using Operand = typename Mode::Operand;
  using Acc = typename Mode::Acc;
  // Whole vectors are stored: what is too much of each is overwritten by the next.
  for (int64_t tile = 0; tile < channels; tile += kTileRows)
    for (int64_t r = 0; r < count; r += Mode::kPack, to += kTileRows)
      for (int64_t x = 0; x < kTileRows; x += kLanes<Acc>) {
        const int64_t channel = tile + x, rest = channels - channel;
        if constexpr (Mode::kPack == 2) {
          const auto bits_of = [&](const T* row) {
            return bit_cast<Vec<uint32_t>>(load_as<float>(row + channel, rest));
          };
          const Vec<Operand> high = r + 1 < count ? bits_of(rows[r + 1]) : Vec<Operand>{};
          store(to + x, bits_of(rows[r]) >> 16 | high);
        } else {
          store(to + x, load_as<Acc>(rows[r] + channel, rest));
        }
      }
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
