// Backward with keys stationary: for each block of keys, over all query rows: P = exp(S - lse), dV += P^T dO,
// dS = P (dO V^T - delta), dK += dS^T Q, dQ += dS K, with delta = rowsum(dO * O) - dlse. K and V are read
// once; dK and dV of a block are written once; dQ of a key range collects in a slab of its own, summed in
// order by reduce.
#pragma once

#include "softmax.h"

namespace pk::cpu::PK_ISA {

constexpr int kBackwardKeys = 128;
constexpr int kBackwardPanels = 4;  // query panels per pass over dK and dV

// Channels as columns fill whole vectors.
template <class Acc>
inline int64_t padded(int64_t channels) {
  return round_up(channels, kLanes<Acc>);
}

// The query side in operand order. Per panel of queries: queries and dout with channels as depth; per panel
// of channels: queries and dout with query rows as depth; per row lse and delta.
template <class Mode>
struct PackedQueries {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  Operand *q, *dout, *q_rows, *dout_rows;
  Acc *lse, *delta;
  int64_t row_steps;

  PackedQueries(Arena& arena, const Attention& p, int64_t rows) {
    const int64_t lanes = round_up(rows, kLanes<Acc>);
    row_steps = steps<Mode>(lanes);
    q = arena.take<Operand>(lanes * steps<Mode>(p.dim));
    dout = arena.take<Operand>(lanes * steps<Mode>(p.value_dim));
    q_rows = arena.take<Operand>(row_steps * padded<Acc>(p.dim) + kPackSlack);
    dout_rows = arena.take<Operand>(row_steps * padded<Acc>(p.value_dim) + kPackSlack);
    lse = arena.take<Acc>(lanes);
    delta = arena.take<Acc>(lanes);
  }
};

template <class Mode>
inline int64_t packed_bytes(const Attention& p, int64_t rows) {
  Arena arena(nullptr);
  PackedQueries<Mode>(arena, p, rows);
  return arena.used();
}

template <class Mode, class T>
void pack_queries(const Attention& p, const AttentionGradient& gradient, const RowBlock& block, int64_t index,
                  char* buffer) {
  using Acc = typename Mode::Acc;
  constexpr Acc kInf = Acc(__builtin_inf());
  Arena arena(buffer);
  const PackedQueries<Mode> packed(arena, p, block.rows);
  const Panel panel = panel_at<Acc>(block.rows, index);

  // Rows that saw no key count as zeros, whatever they or their gradients hold, and so do lanes without a
  // row.
  bool live[kPanel<Acc>] = {};
  for (int64_t lane = 0; lane < panel.width; ++lane) {
    const int64_t r = panel.first + lane;
    Acc lse = kInf, delta = 0;  // P = exp(s - inf) = 0
    live[lane] = lane < panel.rows && *query_row<const Acc>(p, block, p.lse, r) != -kInf;
    if (live[lane]) {
      lse = *query_row<const Acc>(p, block, p.lse, r);
      const T *dout = query_row<const T>(p, block, gradient.dout, r),
              *out = query_row<const T>(p, block, p.out, r);
      Vec<Acc> sum = {};
      for (int64_t c = 0; c < p.value_dim; c += kLanes<Acc>)
        sum += load_as<Acc>(dout + c, p.value_dim - c) * load_as<Acc>(out + c, p.value_dim - c);
      delta = sum_of_lanes<Acc>(sum);
      if (gradient.dlse.data) delta -= *query_row<const Acc>(p, block, gradient.dlse, r);
    }
    packed.lse[r] = lse;
    packed.delta[r] = delta;
  }

  const auto pack = [&](const View& view, int64_t dim, typename Mode::Operand* by_channel,
                        typename Mode::Operand* by_row) {
    const T* rows[kPanel<Acc>] = {};
    for (int64_t lane = 0; lane < panel.rows; ++lane)
      if (live[lane]) rows[lane] = query_row<const T>(p, block, view, panel.first + lane);
    pack_transposed<Mode, T>(rows, panel.rows, dim, panel.width, by_channel + panel.first * steps<Mode>(dim));
    for (int64_t c = 0; c < dim; c += kPanel<Acc>) {
      const int64_t channels = dim - c < kPanel<Acc> ? dim - c : kPanel<Acc>, width = padded<Acc>(channels);
      pack_row_steps<Mode, T>(rows, panel.width, c, channels, width,
                              by_row + c * packed.row_steps + panel.first / Mode::kPack * width);
    }
  };
  pack(p.query, p.dim, packed.q, packed.q_rows);
  pack(gradient.dout, p.value_dim, packed.dout, packed.dout_rows);
}

// Lanes without a live row: their zeros must not meet an infinite key or value.
template <class Acc>
inline void silence_dead_lanes(const Acc* lse, int64_t width, int64_t keys, Acc* s, Acc* dp) {
  constexpr Acc kInf = Acc(__builtin_inf());
  for (int64_t lane = 0; lane < width; ++lane)
    if (lse[lane] == kInf)
      for (int64_t j = 0; j < keys; ++j) {
        s[j * width + lane] = -kInf;
        dp[j * width + lane] = 0;
      }
}

template <class Mode, class T>
struct BackwardScratch {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  static constexpr int64_t kColumns = int64_t{kBackwardPanels} * kPanel<Acc>;
  KeyBlock<kBackwardKeys>* keys;
  const T** rows;
  Operand *k, *v, *k_tiles;  // k_tiles: with keys as the depth
  Acc *dk, *dv, *s, *dp, *factor;
  Operand *p, *ds, *ds_keys;

  BackwardScratch(Arena& arena, const Attention& problem) {
    constexpr int64_t kTile = int64_t{kBackwardKeys} * kPanel<Acc>;
    keys = arena.take<KeyBlock<kBackwardKeys>>(1);
    rows = arena.take<const T*>(kBackwardKeys);
    k = arena.take<Operand>(kBackwardKeys * steps<Mode>(problem.dim) + kPackSlack);
    v = arena.take<Operand>(kBackwardKeys * steps<Mode>(problem.value_dim) + kPackSlack);
    k_tiles = arena.take<Operand>(channel_tiles_size<Mode>(kBackwardKeys, problem.dim));
    dk = arena.take<Acc>(kBackwardKeys * padded<Acc>(problem.dim));
    dv = arena.take<Acc>(kBackwardKeys * padded<Acc>(problem.value_dim));
    s = arena.take<Acc>(kTile);
    dp = arena.take<Acc>(kTile);
    factor = arena.take<Acc>(problem.dropout_p > 0 ? kTile : 0);
    p = arena.take<Operand>(kBackwardKeys * kColumns / Mode::kPack);
    ds = arena.take<Operand>(kBackwardKeys * kColumns / Mode::kPack);
    if constexpr (Mode::kPack == 1) {
      ds_keys = ds;
    } else {
      ds_keys = arena.take<Operand>(kTile / 2);
    }
  }
};

template <class Mode, class T>
inline int64_t backward_scratch_bytes(const Attention& p, int64_t) {
  Arena arena(nullptr);
  BackwardScratch<Mode, T>(arena, p);
  return arena.used();
}

// dQ^T of a key range: per panel [dim][width].
template <class Acc>
inline int64_t slab_bytes(const Attention& p, int64_t rows) {
  return round_up(rows, kLanes<Acc>) * p.dim * static_cast<int64_t>(sizeof(Acc));
}

template <class Mode>
inline void gradient_tile(const GradientTile<Mode>& tile, int64_t keys, int64_t width) {
  using Acc = typename Mode::Acc;
  with_vectors<Acc>(width, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const bool dropout = tile.factor, softcap = tile.inverse_softcap != 0;
    const auto step = dropout   ? softcap ? gradient_step<Mode, kVectors, true, true>
                                          : gradient_step<Mode, kVectors, true, false>
                      : softcap ? gradient_step<Mode, kVectors, false, true>
                                : gradient_step<Mode, kVectors, false, false>;
    step(tile, keys);
  });
}

// C += A B for all channel panels of B, whose rows are query rows [first, first + depth) in operands.
template <class Mode>
inline void add_to_keys(const typename Mode::Operand* a, int64_t a_row, const typename Mode::Operand* b,
                        int64_t row_steps, int64_t first, int64_t depth, int64_t channels,
                        typename Mode::Acc* c, int64_t rows) {
  using Acc = typename Mode::Acc;
  for (int64_t column = 0; column < channels; column += kPanel<Acc>) {
    const int64_t rest = channels - column, width = padded<Acc>(rest < kPanel<Acc> ? rest : kPanel<Acc>);
    multiply<Update::kAdd>(Product<Mode>{a, a_row, a_row, 1, b + column * row_steps + first * width, width,
                                         depth, c + column, padded<Acc>(channels)},
                           rows, width);
  }
}

// Writes the rows of the listed keys, and zeros for the others of the range.
template <class Acc, class T>
inline void write_keys(const RowBlock& block, const KeyBlock<kBackwardKeys>& keys, const View& view,
                       const Acc* rows, int64_t channels, Acc scale) {
  int64_t listed = 0;
  for (int64_t i = 0; i < keys.size; ++i) {
    T* to = row_pointer<T>(view, block.sequence.index, block.kv_head,
                           block.sequence.first_key_row + keys.first + i);
    const bool is_listed = keys.before[i + 1] > keys.before[i];
    const Acc* from = rows + listed * padded<Acc>(channels);
    for (int64_t c = 0; c < channels; c += kLanes<Acc>)
      store_as(to + c, is_listed ? load(from + c) * scale : Vec<Acc>{}, channels - c);
    listed += is_listed;
  }
}

template <class Mode, class T>
void backward(const Attention& p, const AttentionGradient& gradient, const RowBlock& block, KeyRange range,
              const char* packed_buffer, char* scratch, char* slab) {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  Arena packed_arena(const_cast<char*>(packed_buffer)), arena(scratch);
  const PackedQueries<Mode> packed(packed_arena, p, block.rows);
  BackwardScratch<Mode, T> tmp(arena, p);
  const Scoring<Acc> scoring(p);
  [[maybe_unused]] const typename Mode::Session session;
  const int64_t dim_steps = steps<Mode>(p.dim), value_steps = steps<Mode>(p.value_dim);
  const int64_t panels = panel_count<Acc>(block.rows);
  const int64_t last_visible = visible_to_row(p, block, block.rows - 1);
  const int64_t last_read = range.end < last_visible ? range.end : last_visible;
  constexpr int64_t kStride = BackwardScratch<Mode, T>::kColumns / Mode::kPack;
  Acc* dq = reinterpret_cast<Acc*>(slab);
  for (int64_t x = 0; x < round_up(block.rows, kLanes<Acc>) * p.dim; ++x) dq[x] = 0;

  for (int64_t begin = range.begin; begin < range.end; begin += kBackwardKeys) {
    KeyBlock<kBackwardKeys>& keys = *tmp.keys;
    keys.fill(p, block.sequence, begin,
              begin + kBackwardKeys < range.end ? begin + kBackwardKeys : range.end);
    const int64_t count = keys.seen(last_visible);
    for (int64_t x = 0; x < keys.listed * padded<Acc>(p.dim); ++x) tmp.dk[x] = 0;
    for (int64_t x = 0; x < keys.listed * padded<Acc>(p.value_dim); ++x) tmp.dv[x] = 0;
    if (count > 0) {
      keys.rows(block, p.key, count, tmp.rows);
      pack_channel_steps<Mode>(tmp.rows, count, p.dim, tmp.k);
      pack_channel_tiles<Mode>(tmp.rows, count, p.dim, tmp.k_tiles);
      keys.rows(block, p.value, count, tmp.rows);
      pack_channel_steps<Mode>(tmp.rows, count, p.value_dim, tmp.v);
    }

    for (int64_t first = 0; first < panels && count > 0; first += kBackwardPanels) {
      const int64_t end = first + kBackwardPanels < panels ? first + kBackwardPanels : panels;
      const int64_t seen =  // by any row of these panels
          keys.seen(visible_to_row(p, block,
                                   end * kPanel<Acc> < block.rows ? end * kPanel<Acc> - 1 : block.rows - 1));
      if (seen == 0) continue;
      int64_t columns = 0;
      for (int64_t i = first; i < end; ++i) {
        const Panel panel = panel_at<Acc>(block.rows, i);
        keys.template prefetch_next<T>(block, p.key, p.dim, last_read, i, panels);
        keys.template prefetch_next<T>(block, p.value, p.value_dim, last_read, i, panels);
        const Visibility<Acc> visible(p, block, keys, panel);
        multiply<Update::kStore>(
            Product<Mode>{tmp.k, dim_steps, dim_steps, 1, packed.q + panel.first * dim_steps, panel.width,
                          dim_steps, tmp.s, panel.width},
            seen, panel.width);
        multiply<Update::kStore>(
            Product<Mode>{tmp.v, value_steps, value_steps, 1, packed.dout + panel.first * value_steps,
                          panel.width, value_steps, tmp.dp, panel.width},
            seen, panel.width);
        if (scoring.transforms) scoring.transform(tmp.s, seen * panel.width);
        if (visible.all < visible.any)
          mask_tile<Acc>(tmp.s, panel.width, visible.all, visible.any, visible.limit);
        for (int64_t x = visible.any * panel.width; x < seen * panel.width; ++x)
          tmp.s[x] = -Acc(__builtin_inf());
        silence_dead_lanes(packed.lse + panel.first, panel.width, seen, tmp.s, tmp.dp);
        if (p.dropout_p > 0) dropout_factors(p, block, panel, keys.index, seen, tmp.factor);
        Operand* ds_keys = Mode::kPack == 1 ? tmp.ds + columns : tmp.ds_keys;
        const int64_t keys_stride = Mode::kPack == 1 ? kStride : panel.width;
        gradient_tile<Mode>(
            {tmp.s, tmp.dp, p.dropout_p > 0 ? tmp.factor : nullptr, packed.lse + panel.first,
             packed.delta + panel.first, scoring.to_logits, scoring.inverse_softcap,
             tmp.p + columns / Mode::kPack, tmp.ds + columns / Mode::kPack, ds_keys, kStride, keys_stride},
            seen, panel.width);
        Product<Mode> to_queries = product_of_channels<Mode>(tmp.k_tiles, count);
        to_queries.b = ds_keys;
        to_queries.b_step = keys_stride;
        to_queries.depth = steps<Mode>(seen);
        to_queries.c = dq + panel.first * p.dim;
        to_queries.c_row = panel.width;
        multiply<Update::kAdd>(to_queries, p.dim, panel.width);
        columns += panel.width;
      }
      const int64_t first_step = first * kPanel<Acc> / Mode::kPack, depth = columns / Mode::kPack;
      add_to_keys<Mode>(tmp.p, kStride, packed.dout_rows, packed.row_steps, first_step, depth, p.value_dim,
                        tmp.dv, seen);
      add_to_keys<Mode>(tmp.ds, kStride, packed.q_rows, packed.row_steps, first_step, depth, p.dim, tmp.dk,
                        seen);
    }
    write_keys<Acc, T>(block, keys, gradient.dkey, tmp.dk, p.dim, scoring.scale);
    write_keys<Acc, T>(block, keys, gradient.dvalue, tmp.dv, p.value_dim, Acc(1));
  }
}

template <class Acc, class T>
void reduce(const Attention& p, const AttentionGradient& gradient, const RowBlock& block, int64_t index,
            Slots slots) {
  const Panel panel = panel_at<Acc>(block.rows, index);
  write_rows<Acc, T>(p, block, panel, gradient.dquery, p.dim, [&](int64_t channel, int64_t lane) {
    Vec<Acc> total = {};
    for (int s = 0; s < slots.count; ++s)
      total += load(reinterpret_cast<const Acc*>(slots.data + s * slots.stride) + panel.first * p.dim +
                    channel * panel.width + lane);
    return total * static_cast<Acc>(p.scale);
  });
}

}  // namespace pk::cpu::PK_ISA
