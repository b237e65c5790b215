// Forward: for each block of keys, S = K Q^T, online softmax, O^T += V^T P. Query rows of one key head share
// the packed block; what is left of a row block over its key range is (O^T, maximum, sum), merged across
// ranges by combine.
#pragma once

#include "softmax.h"

namespace pk::cpu::PK_ISA {

constexpr int kForwardKeys = 256;

// A partial result: per panel maximum[width], sum[width], o[value_dim][width].
template <class Acc>
inline int64_t slot_elements(const Attention& p, int64_t rows) {
  return round_up(rows, kLanes<Acc>) * (p.value_dim + 2);
}
template <class Acc>
struct Partial {
  Acc *maximum, *sum, *o;
  Partial(const Attention& p, char* slot, const Panel& panel)
      : maximum(reinterpret_cast<Acc*>(slot) + panel.first * (p.value_dim + 2)),
        sum(maximum + panel.width),
        o(sum + panel.width) {}
};

template <class Mode, class T>
struct ForwardScratch {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  KeyBlock<kForwardKeys>* keys;
  const T** rows;
  Operand *queries, *k, *v, *p;
  Acc *s, *factor, *highest, *rescale;

  ForwardScratch(Arena& arena, const Attention& problem, int64_t query_rows) {
    constexpr int64_t kTile = int64_t{kForwardKeys} * kPanel<Acc>;
    keys = arena.take<KeyBlock<kForwardKeys>>(1);
    rows = arena.take<const T*>(kForwardKeys > kPanel<Acc> ? kForwardKeys : kPanel<Acc>);
    queries = arena.take<Operand>(round_up(query_rows, kLanes<Acc>) * steps<Mode>(problem.dim));
    k = arena.take<Operand>(kForwardKeys * steps<Mode>(problem.dim) + kPackSlack);
    v = arena.take<Operand>(channel_tiles_size<Mode>(kForwardKeys, problem.value_dim));
    s = arena.take<Acc>(kTile);
    if constexpr (Mode::kPack == 1)
      p = s;  // in place
    else
      p = arena.take<Operand>(kTile / Mode::kPack);
    factor = arena.take<Acc>(problem.dropout_p > 0 ? kTile : 0);
    highest = arena.take<Acc>(kPanel<Acc>);
    rescale = arena.take<Acc>(kPanel<Acc>);
  }
};

template <class Mode, class T>
inline int64_t forward_scratch_bytes(const Attention& p, int64_t rows) {
  Arena arena(nullptr);
  ForwardScratch<Mode, T>(arena, p, rows);
  return arena.used();
}

template <class Mode, class T>
void forward(const Attention& p, const RowBlock& block, KeyRange range, char* scratch, char* slot) {
  using Acc = typename Mode::Acc;
  Arena arena(scratch);
  ForwardScratch<Mode, T> tmp(arena, p, block.rows);
  const Scoring<Acc> scoring(p);
  [[maybe_unused]] const typename Mode::Session session;
  const int64_t dim_steps = steps<Mode>(p.dim), panels = panel_count<Acc>(block.rows);

  for (int64_t i = 0; i < panels; ++i) {
    const Panel panel = panel_at<Acc>(block.rows, i);
    for (int64_t r = 0; r < panel.rows; ++r)
      tmp.rows[r] = query_row<const T>(p, block, p.query, panel.first + r);
    pack_transposed<Mode, T>(tmp.rows, panel.rows, p.dim, panel.width, tmp.queries + panel.first * dim_steps);
    const Partial<Acc> partial(p, slot, panel);
    for (int64_t lane = 0; lane < panel.width; ++lane) partial.maximum[lane] = -Acc(__builtin_inf());
    for (int64_t x = 0; x < panel.width * (p.value_dim + 1); ++x) partial.sum[x] = 0;
  }

  const int64_t last_visible = visible_to_row(p, block, block.rows - 1);
  const int64_t end = range.end < last_visible ? range.end : last_visible;
  for (int64_t begin = range.begin; begin < end; begin += kForwardKeys) {
    KeyBlock<kForwardKeys>& keys = *tmp.keys;
    keys.fill(p, block.sequence, begin, begin + kForwardKeys < end ? begin + kForwardKeys : end);
    const int64_t count = keys.listed;
    if (count == 0) continue;
    keys.rows(block, p.key, count, tmp.rows);
    pack_channel_steps<Mode>(tmp.rows, count, p.dim, tmp.k);
    keys.rows(block, p.value, count, tmp.rows);
    pack_channel_tiles<Mode>(tmp.rows, count, p.value_dim, tmp.v);

    for (int64_t i = 0; i < panels; ++i) {
      const Panel panel = panel_at<Acc>(block.rows, i);
      const Visibility<Acc> visible(p, block, keys, panel);
      keys.template prefetch_next<T>(block, p.key, p.dim, end, i, panels);
      keys.template prefetch_next<T>(block, p.value, p.value_dim, end, i, panels);
      if (visible.any == 0) continue;
      const Partial<Acc> partial(p, slot, panel);

      Product<Mode> scores{
          tmp.k,       dim_steps, dim_steps, 1,          tmp.queries + panel.first * dim_steps,
          panel.width, dim_steps, tmp.s,     panel.width};
      scores.column_max = tmp.highest;
      for (int64_t lane = 0; lane < panel.width; ++lane) tmp.highest[lane] = -Acc(__builtin_inf());
      if (scoring.transforms || visible.all < visible.any) {
        multiply<Update::kStore>(scores, visible.any, panel.width);
        if (scoring.transforms) scoring.transform(tmp.s, visible.any * panel.width);
        mask_tile<Acc>(tmp.s, panel.width, visible.all, visible.any, visible.limit);
        tile_maximum(tmp.s, visible.any, panel.width, tmp.highest);
      } else {
        multiply<Update::kStoreMax>(scores, visible.any, panel.width);
      }
      if (p.dropout_p > 0) dropout_factors(p, block, panel, keys.index, visible.any, tmp.factor);
      with_vectors<Acc>(panel.width, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        const auto step =
            p.dropout_p > 0 ? softmax_step<Mode, kVectors, true> : softmax_step<Mode, kVectors, false>;
        step(visible.any, tmp.s, scoring.to_log2, tmp.factor, tmp.highest, partial.maximum, partial.sum,
             tmp.rescale, tmp.p);
      });
      Product<Mode> values = product_of_channels<Mode>(tmp.v, count);
      values.b = tmp.p;
      values.b_step = values.c_row = panel.width;
      values.depth = steps<Mode>(visible.any);
      values.c = partial.o;
      values.column_scale = tmp.rescale;
      multiply<Update::kRescale>(values, p.value_dim, panel.width);
    }
  }
}

// Merges the partial results of a panel in the order of the key ranges; writes out and lse.
template <class Acc, class T>
void combine(const Attention& p, const RowBlock& block, int64_t index, Slots slots) {
  constexpr int kStep = kLanes<Acc>;
  constexpr Acc kMinusInf = -Acc(__builtin_inf());
  const double from_log2 = Scoring<Acc>(p).from_log2;
  const Panel panel = panel_at<Acc>(block.rows, index);
  Acc weight[kMaxSplits][kPanel<Acc>];
  for (int64_t lane = 0; lane < panel.width; lane += kStep) {
    Vec<Acc> top = splat(kMinusInf), sum = {};
    for (int s = 0; s < slots.count; ++s)
      top = maximum(load(Partial<Acc>(p, slots.data + s * slots.stride, panel).maximum + lane), top);
    top = top == kMinusInf ? Vec<Acc>{} : top;
    for (int s = 0; s < slots.count; ++s) {
      const Partial<Acc> partial(p, slots.data + s * slots.stride, panel);
      const Vec<Acc> w = exp2_vec<Acc>(load(partial.maximum + lane) - top);
      store(weight[s] + lane, w);
      sum += w * load(partial.sum + lane);
    }
    for (int s = 0; s < slots.count; ++s)  // a row that saw no key: 0 instead of 0 / 0
      store(weight[s] + lane, sum == 0 ? Vec<Acc>{} : load(weight[s] + lane) / sum);
    for (int64_t x = lane; x < lane + kStep && x < panel.rows; ++x)
      *query_row<Acc>(p, block, p.lse, panel.first + x) =
          sum[x - lane] == 0 ? kMinusInf
                             : static_cast<Acc>(top[x - lane] * from_log2 +
                                                __builtin_log(static_cast<double>(sum[x - lane])));
  }
  write_rows<Acc, T>(p, block, panel, p.out, p.value_dim, [&](int64_t channel, int64_t lane) {
    Vec<Acc> total = {};
    for (int s = 0; s < slots.count; ++s) {
      const Partial<Acc> partial(p, slots.data + s * slots.stride, panel);
      total += load(weight[s] + lane) * load(partial.o + channel * panel.width + lane);
    }
    return total;
  });
}

}  // namespace pk::cpu::PK_ISA
