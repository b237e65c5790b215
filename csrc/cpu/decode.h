// Forward for a handful of query rows, bound by memory: every row of K and V is read once and used by all
// query rows. Here channels lie in the lanes of the products, and keys in the lanes of the softmax.
#pragma once

#include "forward.h"

namespace pk::cpu::PK_ISA {

constexpr int kDecodeRows = 8;
constexpr int kDecodeKeys = 64;

template <class Acc, class T>
struct DecodeScratch {
  KeyBlock<kDecodeKeys>* keys;
  const T** rows;
  Acc *q, *o, *p;

  DecodeScratch(Arena& arena, const Attention& problem) {
    keys = arena.take<KeyBlock<kDecodeKeys>>(1);
    rows = arena.take<const T*>(kDecodeKeys);
    q = arena.take<Acc>(kDecodeRows * round_up(problem.dim, kLanes<Acc>));
    o = arena.take<Acc>(kDecodeRows * round_up(problem.value_dim, kLanes<Acc>));
    p = arena.take<Acc>(kDecodeRows * kDecodeKeys);
  }
};

template <class Acc, class T>
inline int64_t decode_scratch_bytes(const Attention& p) {
  Arena arena(nullptr);
  DecodeScratch<Acc, T>(arena, p);
  return arena.used();
}

// s[r][j] = q[r] . k[j]
template <int kRows, class Acc, class T>
inline void decode_scores(const Acc* q, const T* const* k, int64_t count, int64_t dim, Acc* s) {
  constexpr int kSide = kLanes<Acc>;
  const int64_t q_stride = round_up(dim, kSide), whole = dim / kSide * kSide;
  for (int64_t j = 0; j < count; j += kSide) {
    Vec<Acc> products[kRows][kSide];
    for (int64_t side = 0; side < kSide; ++side) {
      Vec<Acc> sum[kRows] = {};
      if (j + side < count) {
        const T* key = k[j + side];
        const auto accumulate = [&](int64_t c, Vec<Acc> channels) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum[r] += load(q + r * q_stride + c) * channels;
        };
        for (int64_t c = 0; c < whole; c += kSide) accumulate(c, load_as(key + c));
        if (whole < dim) accumulate(whole, load_as<Acc>(key + whole, dim - whole));
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) products[r][side] = sum[r];
    }
    for (int r = 0; r < kRows; ++r) store(s + r * kDecodeKeys + j, sum_each<Acc>(products[r]));
  }
}

// o[r] = o[r] * rescale[r] + sum over j of p[r][j] v[j]
template <int kRows, class Acc, class T>
inline void decode_values(const Acc* p, const T* const* v, int64_t count, int64_t dim, const Acc* rescale,
                          Acc* o) {
  constexpr int kSide = kLanes<Acc>, kVectors = kRows > 4 ? 2 : 4;
  const int64_t o_stride = round_up(dim, kSide);
  const auto columns = [&](int64_t c, auto vectors, auto&& load_channels) {
    constexpr int kCount = decltype(vectors)::value;
    Vec<Acc> sum[kRows][kCount];
    for (int r = 0; r < kRows; ++r)
      for (int x = 0; x < kCount; ++x) sum[r][x] = load(o + r * o_stride + c + x * kSide) * rescale[r];
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
      for (int x = 0; x < kCount; ++x) {
        const Vec<Acc> channels = load_channels(v[j] + c + x * kSide);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][x] += p[r * kDecodeKeys + j] * channels;
      }
    for (int r = 0; r < kRows; ++r)
      for (int x = 0; x < kCount; ++x) store(o + r * o_stride + c + x * kSide, sum[r][x]);
  };
  int64_t c = 0;
  for (; c + kVectors * kSide <= dim; c += kVectors * kSide)
    columns(c, Constant<kVectors>{}, [](const T* at) { return load_as(at); });
  for (; c + kSide <= dim; c += kSide) columns(c, Constant<1>{}, [](const T* at) { return load_as(at); });
  if (c < dim) columns(c, Constant<1>{}, [&](const T* at) { return load_as<Acc>(at, dim - c); });
}

template <int kRows, class Acc, class T>
void decode_rows(const Attention& p, const RowBlock& block, KeyRange range, char* scratch, char* slot) {
  constexpr int kSide = kLanes<Acc>;
  constexpr Acc kMinusInf = -Acc(__builtin_inf());
  Arena arena(scratch);
  DecodeScratch<Acc, T> tmp(arena, p);
  const Scoring<Acc> scoring(p);
  const Panel panel = panel_at<Acc>(block.rows, 0);
  const Partial<Acc> partial(p, slot, panel);
  const int64_t q_stride = round_up(p.dim, kSide), o_stride = round_up(p.value_dim, kSide);

  for (int64_t x = 0; x < kRows * o_stride; ++x) tmp.o[x] = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const T* row = r < block.rows ? query_row<const T>(p, block, p.query, r) : nullptr;
    for (int64_t c = 0; c < p.dim; c += kSide)
      store(tmp.q + r * q_stride + c, row ? load_as<Acc>(row + c, p.dim - c) : Vec<Acc>{});
  }
  Acc top[kRows], sum[kRows] = {}, rescale[kRows];
  for (Acc& t : top) t = kMinusInf;

  const int64_t last_visible = visible_to_row(p, block, block.rows - 1);
  for (int64_t begin = range.begin; begin < range.end && begin < last_visible; begin += kDecodeKeys) {
    KeyBlock<kDecodeKeys>& keys = *tmp.keys;
    keys.fill(p, block.sequence, begin, begin + kDecodeKeys < range.end ? begin + kDecodeKeys : range.end);
    const int64_t count = keys.seen(last_visible);
    if (count == 0) continue;
    keys.rows(block, p.key, count, tmp.rows);
    decode_scores<kRows>(tmp.q, tmp.rows, count, p.dim, tmp.p);
    if (scoring.transforms) scoring.transform(tmp.p, kRows * kDecodeKeys);

    for (int64_t r = 0; r < kRows; ++r) {
      Acc* s = tmp.p + r * kDecodeKeys;
      const int64_t seen = r < block.rows ? keys.seen(visible_to_row(p, block, r)) : 0;
      for (int64_t j = seen; j < kDecodeKeys; ++j) s[j] = kMinusInf;
      Vec<Acc> highest = splat(kMinusInf);
      for (int64_t j = 0; j < kDecodeKeys; j += kSide) highest = maximum(load(s + j), highest);
      const Acc now = max_of_lanes<Acc>(maximum(highest * scoring.to_log2, splat(top[r])));
      const Acc base = now == kMinusInf ? 0 : now;
      Acc to_log2 = scoring.to_log2;
      if (base > kHugeLogit<Acc> || -base > kHugeLogit<Acc>) to_log2 = round_logits(s, kDecodeKeys, to_log2);
      rescale[r] = exp2_vec<5, Acc>(splat(top[r] - base))[0];
      top[r] = now;
      Vec<Acc> total = {};
      for (int64_t j = 0; j < kDecodeKeys; j += kSide) {
        const Vec<Acc> e = exp2_vec<5, Acc>(load(s + j) * to_log2 - base);
        total += e;
        store(s + j, e);
      }
      sum[r] = sum[r] * rescale[r] + sum_of_lanes<Acc>(total);
      if (p.dropout_p > 0 && r < block.rows)
        for (int64_t j = 0; j < seen; ++j) s[j] *= dropout_factor<Acc>(p, block, r, keys.index[j]);
    }
    keys.rows(block, p.value, count, tmp.rows);
    decode_values<kRows>(tmp.p, tmp.rows, count, p.value_dim, rescale, tmp.o);
  }
  for (int64_t lane = 0; lane < panel.width; ++lane) {
    const bool live = lane < block.rows;
    partial.maximum[lane] = live ? top[lane] : kMinusInf;
    partial.sum[lane] = live ? sum[lane] : 0;
    for (int64_t c = 0; c < p.value_dim; ++c)
      partial.o[c * panel.width + lane] = live ? tmp.o[lane * o_stride + c] : 0;
  }
}

template <class Acc, class T>
inline void decode(const Attention& p, const RowBlock& block, KeyRange range, char* scratch, char* slot) {
  static_assert(kDecodeRows == 8);
  const auto rows = block.rows <= 1   ? decode_rows<1, Acc, T>
                    : block.rows <= 2 ? decode_rows<2, Acc, T>
                    : block.rows <= 4 ? decode_rows<4, Acc, T>
                                      : decode_rows<8, Acc, T>;
  rows(p, block, range, scratch, slot);
}

}  // namespace pk::cpu::PK_ISA
