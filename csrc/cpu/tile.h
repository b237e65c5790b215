// A tile is a block of keys (rows) by a panel of queries (lanes). This file says which of its entries exist:
// visibility of keys, lengths of panels, dropout. Queries lie in the lanes, so that every softmax statistic
// is a vector.
#pragma once

#include "../score.h"
#include "kernels.h"
#include "pack.h"

namespace pk::cpu::PK_ISA {

// Bump allocation out of one buffer; without a buffer it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

inline int64_t group_size(const Attention& p) { return p.heads / p.kv_heads; }

template <class T>
inline T* row_pointer(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

// Where query row r of a block lives in a tensor indexed like query.
template <class T>
inline T* query_row(const Attention& p, const RowBlock& block, const View& view, int64_t r) {
  const int64_t group = group_size(p), row = block.first_row + r;
  return row_pointer<T>(view, block.sequence.index, block.kv_head * group + row % group,
                        block.sequence.first_query_row + row / group);
}

inline int64_t visible_to_row(const Attention& p, const RowBlock& block, int64_t r) {
  return visible_keys(block.sequence.q_offset, (block.first_row + r) / group_size(p), block.sequence.keys);
}

// `rows` query rows from `first` on in `width` lanes; the lanes behind them compute on zeros.
struct Panel {
  int64_t first, rows, width;
};
template <class Acc>
inline Panel panel_at(int64_t rows, int64_t index) {
  const int64_t first = index * kPanel<Acc>, rest = rows - first;
  const int64_t count = rest < kPanel<Acc> ? rest : kPanel<Acc>;
  return {first, count, round_up(count, kLanes<Acc>)};
}
template <class Acc>
inline int64_t panel_count(int64_t rows) {
  return (rows + kPanel<Acc> - 1) / kPanel<Acc>;
}

// The keys of a range that key_mask lets through, in order. Masked keys are never read.
template <int kMaxKeys>
struct KeyBlock {
  int64_t first, size, listed;
  int64_t index[kMaxKeys];
  int32_t before[kMaxKeys + 1];  // how many listed keys come before first + i

  void fill(const Attention& p, const Sequence& sequence, int64_t begin, int64_t end) {
    first = begin;
    size = end - begin;
    listed = p.key_mask ? 0 : size;
    if (p.key_mask) {
      const bool* mask = p.key_mask + sequence.index * p.key_mask_batch_stride +
                         (sequence.first_key_row + begin) * p.key_mask_stride;
      for (int64_t i = 0; i < size; ++i) {
        before[i] = static_cast<int32_t>(listed);
        index[listed] = begin + i;
        listed += mask[i * p.key_mask_stride];
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        before[i] = static_cast<int32_t>(i);
        index[i] = begin + i;
      }
    }
    before[size] = static_cast<int32_t>(listed);
  }

  // How many listed keys a query sees that sees the first `visible` keys of the sequence.
  int64_t seen(int64_t visible) const {
    const int64_t i = visible - first;
    return before[i < 0 ? 0 : i < size ? i : size];
  }

  template <class T>
  void rows(const RowBlock& block, const View& view, int64_t count, const T** to) const {
    const T* base =
        row_pointer<const T>(view, block.sequence.index, block.kv_head, block.sequence.first_key_row + first);
    if (listed == size)
      for (int64_t i = 0; i < count; ++i) to[i] = base + i * view.row_stride;
    else
      for (int64_t i = 0; i < count; ++i) to[i] = base + (index[i] - first) * view.row_stride;
  }

  // Asks for one of `parts` parts of the rows behind this block, up to key `end`: memory works while the
  // products do.
  template <class T>
  PK_INLINE void prefetch_next(const RowBlock& block, const View& view, int64_t channels, int64_t end,
                               int64_t part, int64_t parts) const {
    const char* base = reinterpret_cast<const char*>(row_pointer<const T>(
        view, block.sequence.index, block.kv_head, block.sequence.first_key_row + first + size));
    const int64_t next = end - first - size < kMaxKeys ? end - first - size : kMaxKeys;
    constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));
    for (int64_t i = part * next / parts; i < (part + 1) * next / parts; ++i)
      for (int64_t at = 0; at < channels * kBytes; at += 64)
        __builtin_prefetch(base + i * view.row_stride * kBytes + at, 0, 2);
  }
};

// Entries of tile rows [from, to) that a lane may not see become -inf; lane l sees rows below limit[l].
template <class Acc>
inline void mask_tile(Acc* s, int64_t width, int64_t from, int64_t to, const Bits<Acc>* limit) {
  for (int64_t j = from; j < to; ++j)
    for (int64_t lane = 0; lane < width; lane += kLanes<Acc>) {
      Acc* at = s + j * width + lane;
      store(at, load(limit + lane) > static_cast<Bits<Acc>>(j) ? load(at) : splat(-Acc(__builtin_inf())));
    }
}

// What the panel's queries see of the block: every lane sees rows below `all`, some lane sees rows below
// `any`.
template <class Acc>
struct Visibility {
  int64_t all, any;
  Bits<Acc> limit[kPanel<Acc>];

  template <int kMaxKeys>
  Visibility(const Attention& p, const RowBlock& block, const KeyBlock<kMaxKeys>& keys, const Panel& panel) {
    all = keys.seen(visible_to_row(p, block, panel.first));
    any = keys.seen(visible_to_row(p, block, panel.first + panel.rows - 1));
    if (all < any)
      for (int64_t lane = 0; lane < panel.width; ++lane) {
        const int64_t r = panel.first + (lane < panel.rows ? lane : panel.rows - 1);
        limit[lane] = static_cast<Bits<Acc>>(keys.seen(visible_to_row(p, block, r)));
      }
  }
};

// 0 where dropout drops the entry, 1 / (1 - p) where it keeps it.
template <class Acc>
inline Acc dropout_factor(const Attention& p, const RowBlock& block, int64_t r, int64_t key) {
  const int64_t group = group_size(p), row = block.first_row + r;
  const uint32_t bits =
      philox(p.dropout_seed, static_cast<uint32_t>(block.sequence.index),
             static_cast<uint32_t>(block.kv_head * group + row % group), static_cast<uint32_t>(row / group),
             static_cast<uint32_t>(p.dropout_first_key + key));
  return bits >= dropout_threshold(p.dropout_p) ? static_cast<Acc>(1 / (1 - p.dropout_p)) : 0;
}

template <class Acc>
inline void dropout_factors(const Attention& p, const RowBlock& block, const Panel& panel,
                            const int64_t* key_index, int64_t count, Acc* factor) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t lane = 0; lane < panel.width; ++lane)
      factor[j * panel.width + lane] = dropout_factor<Acc>(p, block, panel.first + lane, key_index[j]);
}

// Writes rows of a panel from lanes: value(channel, lane) is the vector of one channel for the queries from
// `lane` on.
template <class Acc, class T, class Value>
inline void write_rows(const Attention& p, const RowBlock& block, const Panel& panel, const View& view,
                       int64_t channels, Value&& value) {
  constexpr int kSide = kLanes<Acc>;
  for (int64_t lane = 0; lane < panel.width; lane += kSide)
    for (int64_t channel = 0; channel < channels; channel += kSide) {
      const int64_t count = channels - channel;
      Vec<Acc> square[kSide];
      for (int64_t side = 0; side < kSide; ++side)
        square[side] = side < count ? value(channel + side, lane) : Vec<Acc>{};
      transpose<Acc>(square);
      for (int64_t side = 0; side < kSide && lane + side < panel.rows; ++side)
        store_as(query_row<T>(p, block, view, panel.first + lane + side) + channel, square[side], count);
    }
}

}  // namespace pk::cpu::PK_ISA
