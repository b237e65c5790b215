// Forward for a handful of query rows, bound by memory: every row of K and V is read once and used by all
// query rows. Here channels lie in the lanes of the products, and keys in the lanes of the softmax.
#pragma once

#include <utility>

#include "forward.h"

namespace pk::cpu::PK_ISA {

constexpr int kDecodeRows = 8;
constexpr int kDecodeKeys = 64;

// A block of keys, and where its rows of K and V lie.
template <class T>
struct DecodeBlock {
  KeyBlock<kDecodeKeys> keys;
  int64_t count;
  const T *k[kDecodeKeys], *v[kDecodeKeys];

  // The first block from `*begin` on that has keys below `end` to look at; none has count 0.
  void fill(const Attention& p, const RowBlock& block, int64_t* begin, int64_t end) {
    count = 0;
    while (count == 0 && *begin < end) {
      const int64_t stop = *begin + kDecodeKeys < end ? *begin + kDecodeKeys : end;
      keys.fill(p, block.sequence, *begin, stop);
      count = keys.listed;
      *begin = stop;
    }
    if (count == 0) return;
    keys.rows(block, p.key, count, k);
    keys.rows(block, p.value, count, v);
  }
};

// Asks for the next block while one is at work: row i / 2 of K or, where i is odd, of V. An even pace over
// both keeps two streams of memory busy, which is faster than reading either alone.
template <class T>
struct Prefetch {
  const DecodeBlock<T>& block;
  int64_t dim, value_dim;

  // Out of line, GCC would drop it as a function without effects.
  __attribute__((always_inline)) void operator()(int64_t i) const {
    if (i >= 2 * block.count) return;
    const char* row = reinterpret_cast<const char*>(i % 2 ? block.v[i / 2] : block.k[i / 2]);
    const int64_t bytes = (i % 2 ? value_dim : dim) * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
};

template <class Acc, class T>
struct DecodeScratch {
  DecodeBlock<T>* blocks;  // the one at work and the next
  Acc *q, *o, *p;

  DecodeScratch(Arena& arena, const Attention& problem) {
    blocks = arena.take<DecodeBlock<T>>(2);
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

// Independent sums that hide the latency of a multiply-add and leave registers for the rest.
constexpr int kDecodeSums = 8;

// s[r][j] = q[r] . k[j]
template <int kRows, class Acc, class T>
inline void decode_scores(const Acc* q, const T* const* k, int64_t count, int64_t dim, Acc* s,
                          Prefetch<T> prefetch) {
  constexpr int kSide = kLanes<Acc>, kKeys = kDecodeSums / kRows < kSide ? kDecodeSums / kRows : kSide;
  const int64_t q_stride = round_up(dim, kSide), whole = dim / kSide * kSide;
  for (int64_t first = 0; first < count; first += kSide) {
    Vec<Acc> products[kRows][kSide];
    for (int side = 0; side < kSide; side += kKeys) {
      // Behind the last key its row stands in; nobody looks at these scores.
      const T* rows[kKeys];
      unrolled<kKeys>([&](auto x) {
        const int64_t j = first + side + x;
        rows[x] = k[j < count ? j : count - 1];
      });
      Vec<Acc> sum[kRows][kKeys] = {};
      const auto accumulate = [&](int64_t c, auto&& load_channels) {
        for (int64_t x = c; x < kKeys * kSide; x += q_stride) prefetch(first + side + x / kSide);
        Vec<Acc> channels[kKeys];
        unrolled<kKeys>([&](auto x) { channels[x] = load_channels(rows[x] + c); });
        unrolled<kRows>([&](auto r) {
          const Vec<Acc> qr = load(q + r * q_stride + c);
          unrolled<kKeys>([&](auto x) { sum[r][x] += qr * channels[x]; });
        });
      };
      for (int64_t c = 0; c < whole; c += kSide) accumulate(c, [](const T* at) { return load_as(at); });
      if (whole < dim) accumulate(whole, [&](const T* at) { return load_as<Acc>(at, dim - whole); });
      unrolled<kRows>([&](auto r) { unrolled<kKeys>([&](auto x) { products[r][side + x] = sum[r][x]; }); });
    }
    for (int r = 0; r < kRows; ++r) store(s + r * kDecodeKeys + first, sum_each<Acc>(products[r]));
  }
}

// o[r] = o[r] * rescale[r] + sum over j of p[r][j] v[j]
template <int kRows, class Acc, class T>
inline void decode_values(const Acc* p, const T* const* v, int64_t count, int64_t dim, const Acc* rescale,
                          Acc* o, Prefetch<T> prefetch) {
  constexpr int kSide = kLanes<Acc>;
  const int64_t o_stride = round_up(dim, kSide);
  const auto columns = [&](int64_t c, auto vectors, auto&& load_channels) {
    constexpr int kCount = decltype(vectors)::value;
    Vec<Acc> sum[kRows][kCount];
    unrolled<kRows>([&](auto r) {
      unrolled<kCount>([&](auto x) { sum[r][x] = load(o + r * o_stride + c + x * kSide) * rescale[r]; });
    });
    for (int64_t j = 0; j < count; ++j) {
      if (c == 0) prefetch(count + j);
      Vec<Acc> channels[kCount];
      unrolled<kCount>([&](auto x) { channels[x] = load_channels(v[j] + c + x * kSide); });
      unrolled<kRows>([&](auto r) {
        const Vec<Acc> weight = splat(p[r * kDecodeKeys + j]);
        unrolled<kCount>([&](auto x) { sum[r][x] += weight * channels[x]; });
      });
    }
    unrolled<kRows>([&](auto r) {
      unrolled<kCount>([&](auto x) { store(o + r * o_stride + c + x * kSide, sum[r][x]); });
    });
  };
  constexpr int kMost = kDecodeSums / kRows;
  int64_t c = 0;
  unrolled<4>([&](auto halvings) {
    constexpr int kVectors = kMost >> decltype(halvings)::value;
    if constexpr (kVectors > 0)
      for (; c + kVectors * kSide <= dim; c += kVectors * kSide)
        columns(c, Constant<kVectors>{}, [](const T* at) { return load_as(at); });
  });
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
  const int64_t end = range.end < last_visible ? range.end : last_visible;
  int64_t begin = range.begin;
  DecodeBlock<T>*now = tmp.blocks, *next = now + 1;
  now->fill(p, block, &begin, end);
  for (; now->count > 0; std::swap(now, next)) {
    next->fill(p, block, &begin, end);
    const KeyBlock<kDecodeKeys>& keys = now->keys;
    const Prefetch<T> prefetch{*next, p.dim, p.value_dim};
    decode_scores<kRows>(tmp.q, now->k, now->count, p.dim, tmp.p, prefetch);
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
      rescale[r] = exp2_vec<Acc>(splat(top[r] - base))[0];
      top[r] = now;
      Vec<Acc> total = {};
      for (int64_t j = 0; j < kDecodeKeys; j += kSide) {
        const Vec<Acc> e = exp2_vec<Acc>(load(s + j) * to_log2 - base);
        total += e;
        store(s + j, e);
      }
      sum[r] = sum[r] * rescale[r] + sum_of_lanes<Acc>(total);
      if (p.dropout_p > 0 && r < block.rows)
        for (int64_t j = 0; j < seen; ++j) s[j] *= dropout_factor<Acc>(p, block, r, keys.index[j]);
    }
    decode_values<kRows>(tmp.p, now->v, now->count, p.value_dim, rescale, tmp.o, prefetch);
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
