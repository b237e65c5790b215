// The passes between the products: raw products to logits, the online softmax of the forward, P and dS of the
// backward. A tile holds keys in rows and queries in lanes, `width` lanes to a row.
#pragma once

#include "tile.h"

namespace pk::cpu::PK_ISA {

// Logits are scale * (q . k), soft-capped; exponents are in base 2.
template <class Acc>
struct Scoring {
  Acc scale, softcap, inverse_softcap;
  bool transforms;   // whether the tile needs a pass of its own before exp2
  Acc to_logits;     // from the tile, after that pass, to natural logits
  Acc to_log2;       // and to base-2 logits
  double from_log2;  // from base-2 logits as rounded here to natural ones

  explicit Scoring(const Attention& p) {
    constexpr double kLog2E = 1.442695040888963407;
    scale = static_cast<Acc>(p.scale);
    softcap = static_cast<Acc>(p.softcap);
    inverse_softcap = softcap ? 1 / softcap : 0;
    // A maximum survives multiplication by a positive number only; other scales are applied before it is
    // taken.
    transforms = softcap != 0 || p.scale < 1e-30;
    to_logits = transforms ? 1 : scale;
    to_log2 = static_cast<Acc>((transforms ? 1 : p.scale) * kLog2E);
    from_log2 = (transforms ? 1 : p.scale) / static_cast<double>(to_log2);
  }

  void transform(Acc* s, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes<Acc>) {
      Vec<Acc> logits = load(s + i) * scale;
      store(s + i, softcap ? softcap * tanh_vec<Acc>(logits * inverse_softcap) : logits);
    }
  }
};

// Two rows of numbers as one row of bfloat16 pairs: `low` is the even element of the depth.
inline Vec<uint32_t> bfloat16_pairs(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves order;
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = static_cast<uint16_t>(i);
    order[2 * i + 1] = static_cast<uint16_t>(i + 16);
  }
  return (Vec<uint32_t>)_mm512_permutexvar_epi16((__m512i)order,
                                                 (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return round_to_bfloat16(low) >> 16 | (round_to_bfloat16(high) & 0xffff0000u);
#endif
}

// From here on the rounding of a maximum is worth whole powers of two, and what the fused multiply-add keeps
// exact beside it must be rounded like it. Returns what is left to multiply by.
template <class Acc>
constexpr Acc kHugeLogit = 1 << 20;
template <class Acc>
inline Acc round_logits(Acc* s, int64_t count, Acc to_log2) {
  for (int64_t i = 0; i < count; i += kLanes<Acc>) store(s + i, load(s + i) * to_log2);
  return 1;
}

// highest = max(highest, rows [0, keys) of the tile)
template <class Acc>
inline void tile_maximum(const Acc* s, int64_t keys, int64_t width, Acc* highest) {
  for (int64_t lane = 0; lane < width; lane += kLanes<Acc>) {
    Vec<Acc> top = load(highest + lane);
    for (int64_t j = 0; j < keys; ++j) top = maximum(load(s + j * width + lane), top);
    store(highest + lane, top);
  }
}

// One online-softmax step: takes in rows [0, keys) of the tile, whose maximum over the rows is `highest`,
// updates maximum (base-2 logits) and sum per lane, leaves exp2(logit - maximum) in p as the second product's
// operand, and in `rescale` what earlier results shrink by.
template <class Mode, int kVectors, bool kDropout>
inline void softmax_step(int64_t keys, typename Mode::Acc* s, typename Mode::Acc to_log2,
                         const typename Mode::Acc* factor, const typename Mode::Acc* highest,
                         typename Mode::Acc* maximum_, typename Mode::Acc* sum_, typename Mode::Acc* rescale,
                         typename Mode::Operand* p) {
  using Acc = typename Mode::Acc;
  constexpr int kStep = kLanes<Acc>, kWidth = kVectors * kStep;
  constexpr Acc kMinusInf = -Acc(__builtin_inf());
  Vec<Acc> top[kVectors], sum[kVectors] = {}, size = {};
  for (int v = 0; v < kVectors; ++v) {
    const Vec<Acc> before = load(maximum_ + v * kStep);
    const Vec<Acc> now = maximum(before, load(highest + v * kStep) * to_log2);
    top[v] = now == kMinusInf ? Vec<Acc>{} : now;  // nothing seen yet: any finite number avoids -inf - -inf
    store(maximum_ + v * kStep, now);
    store(rescale + v * kStep, exp2_vec<Acc>(before - top[v]));
    size = maximum(size, maximum(top[v], -top[v]));
  }
  if (max_of_lanes<Acc>(size) > kHugeLogit<Acc>) to_log2 = round_logits(s, keys * kWidth, to_log2);
  const auto probabilities = [&](int64_t j, Vec<Acc>* e) {
    unrolled<kVectors>([&](auto v) { e[v] = load(s + j * kWidth + v * kStep) * to_log2 - top[v]; });
    exp2_each<Mode::kTerms, kVectors, Acc>(e);
    unrolled<kVectors>([&](auto v) {
      sum[v] += e[v];
      if constexpr (kDropout) e[v] *= load(factor + j * kWidth + v * kStep);
    });
  };
  for (int64_t j = 0; j < keys; j += Mode::kPack, p += kWidth) {
    Vec<Acc> e[kVectors];
    probabilities(j, e);
    if constexpr (Mode::kPack == 2) {
      Vec<Acc> next[kVectors] = {};
      if (j + 1 < keys) probabilities(j + 1, next);
      unrolled<kVectors>([&](auto v) { store(p + v * kStep, bfloat16_pairs(e[v], next[v])); });
    } else {
      unrolled<kVectors>([&](auto v) { store(p + v * kStep, e[v]); });
    }
  }
  for (int v = 0; v < kVectors; ++v)
    store(sum_ + v * kStep, load(sum_ + v * kStep) * load(rescale + v * kStep) + sum[v]);
}

// The backward's P and dS = P (dP - delta), from the tile s, dP and the rows' lse. `p` and `ds` hold
// keys in rows `stride` operands apart with queries as the depth; `ds_keys` holds dS with keys as the depth
// (the same array for Plain).
template <class Mode>
struct GradientTile {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  const Acc *s, *dp, *factor;  // factor may be null
  const Acc *lse, *delta;
  Acc to_logits, inverse_softcap;
  Operand *p, *ds, *ds_keys;
  int64_t stride, keys_stride;
};

template <class Mode, int kVectors, bool kDropout, bool kSoftcap>
inline void gradient_step(const GradientTile<Mode>& tile, int64_t keys) {
  using Acc = typename Mode::Acc;
  constexpr int kStep = kLanes<Acc>, kWidth = kVectors * kStep;
  constexpr Acc kLog2E = Acc(1.442695040888963407);
  // `count` rows from j on, one vector of each.
  const auto entries = [&](int64_t j, int v, auto count, Vec<Acc>* p, Vec<Acc>* ds) {
    constexpr int kCount = decltype(count)::value;
    const int64_t at = j * kWidth + v * kStep;
    unrolled<kCount>([&](auto i) {
      // lse comes rounded: subtracted before the change of base, it adds no second rounding.
      const Vec<Acc> logits = load(tile.s + at + i * kWidth) * tile.to_logits;
      p[i] = not_above_zero(logits - load(tile.lse + v * kStep)) * kLog2E;
    });
    exp2_each<Mode::kTerms, kCount, Acc>(p);
    unrolled<kCount>([&](auto i) {
      Vec<Acc> dp = load(tile.dp + at + i * kWidth);
      if constexpr (kDropout) dp *= load(tile.factor + at + i * kWidth);
      ds[i] = p[i] * (dp - load(tile.delta + v * kStep));
      if constexpr (kSoftcap) {
        const Vec<Acc> logits = load(tile.s + at + i * kWidth);
        ds[i] *= p[i] == 0 ? Vec<Acc>{} : softcap_grad(logits, tile.inverse_softcap);
      }
      if constexpr (kDropout) p[i] *= load(tile.factor + at + i * kWidth);
    });
  };
  for (int64_t j = 0; j < keys; j += Mode::kPack)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<Acc> p[Mode::kPack] = {}, ds[Mode::kPack] = {};
      if (j + Mode::kPack <= keys)
        entries(j, v, Constant<Mode::kPack>{}, p, ds);
      else
        entries(j, v, Constant<1>{}, p, ds);
      if constexpr (Mode::kPack == 2) {
        unrolled<2>([&](auto i) {
          const int64_t at = (j + i) * tile.stride + v * kStep / 2;
          store_as(reinterpret_cast<BFloat16*>(tile.p + at), p[i]);
          store_as(reinterpret_cast<BFloat16*>(tile.ds + at), ds[i]);
        });
        store(tile.ds_keys + j / 2 * tile.keys_stride + v * kStep, bfloat16_pairs(ds[0], ds[1]));
      } else {
        store(tile.p + j * tile.stride + v * kStep, p[0]);
        store(tile.ds + j * tile.stride + v * kStep, ds[0]);
      }
    }
}

}  // namespace pk::cpu::PK_ISA
