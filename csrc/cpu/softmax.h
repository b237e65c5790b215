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

// One online-softmax step: takes in rows [0, keys) of the tile, updates maximum (base-2 logits) and sum per
// lane, leaves exp2(logit - maximum) in p as the second product's operand, and in `rescale` what earlier
// results shrink by.
template <class Mode, int kVectors, bool kDropout>
inline void softmax_step(int64_t keys, typename Mode::Acc* s, typename Mode::Acc to_log2,
                         const typename Mode::Acc* factor, typename Mode::Acc* maximum_,
                         typename Mode::Acc* sum_, typename Mode::Acc* rescale, typename Mode::Operand* p) {
  using Acc = typename Mode::Acc;
  constexpr int kStep = kLanes<Acc>, kWidth = kVectors * kStep;
  constexpr Acc kMinusInf = -Acc(__builtin_inf());
  Vec<Acc> top[kVectors], sum[kVectors] = {}, size = {};
  for (int v = 0; v < kVectors; ++v) top[v] = splat(kMinusInf);
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) top[v] = maximum(load(s + j * kWidth + v * kStep), top[v]);
  for (int v = 0; v < kVectors; ++v) {
    const Vec<Acc> before = load(maximum_ + v * kStep);
    const Vec<Acc> now = maximum(before, top[v] * to_log2);
    top[v] = now == kMinusInf ? Vec<Acc>{} : now;  // nothing seen yet: any finite number avoids -inf - -inf
    store(maximum_ + v * kStep, now);
    store(rescale + v * kStep, exp2_vec<Mode::kExpTerms, Acc>(before - top[v]));
    size = maximum(size, maximum(top[v], -top[v]));
  }
  if (max_of_lanes<Acc>(size) > kHugeLogit<Acc>) to_log2 = round_logits(s, keys * kWidth, to_log2);
  const auto probability = [&](int64_t j, int v) {
    Vec<Acc> e = exp2_vec<Mode::kExpTerms, Acc>(load(s + j * kWidth + v * kStep) * to_log2 - top[v]);
    sum[v] += e;
    if constexpr (kDropout) e *= load(factor + j * kWidth + v * kStep);
    return e;
  };
  for (int64_t j = 0; j < keys; j += Mode::kPack, p += kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Acc> e = probability(j, v);
      if constexpr (Mode::kPack == 2)
        store(p + v * kStep, bfloat16_pairs(e, j + 1 < keys ? probability(j + 1, v) : Vec<Acc>{}));
      else
        store(p + v * kStep, e);
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
  const auto entry = [&](int64_t j, int v, Vec<Acc>* p, Vec<Acc>* ds) {
    const int64_t at = j * kWidth + v * kStep;
    const Vec<Acc> logits = load(tile.s + at);
    Vec<Acc> dp = load(tile.dp + at);
    // lse comes rounded: subtracted before the change of base, it adds no second rounding.
    const Vec<Acc> x = not_above_zero(logits * tile.to_logits - load(tile.lse + v * kStep));
    *p = exp2_vec<Mode::kExpTerms, Acc>(x * kLog2E);
    if constexpr (kDropout) dp *= load(tile.factor + at);
    *ds = *p * (dp - load(tile.delta + v * kStep));
    if constexpr (kSoftcap) *ds *= *p == 0 ? Vec<Acc>{} : softcap_grad(logits, tile.inverse_softcap);
    if constexpr (kDropout) *p *= load(tile.factor + at);
  };
  for (int64_t j = 0; j < keys; j += Mode::kPack)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<Acc> p, ds;
      entry(j, v, &p, &ds);
      if constexpr (Mode::kPack == 2) {
        Vec<Acc> next_p = {}, next_ds = {};
        if (j + 1 < keys) entry(j + 1, v, &next_p, &next_ds);
        const int64_t at = j * tile.stride + v * kStep / 2;
        store_as(reinterpret_cast<BFloat16*>(tile.p + at), p);
        store_as(reinterpret_cast<BFloat16*>(tile.ds + at), ds);
        store_as(reinterpret_cast<BFloat16*>(tile.p + at + tile.stride), next_p);
        store_as(reinterpret_cast<BFloat16*>(tile.ds + at + tile.stride), next_ds);
        store(tile.ds_keys + j / 2 * tile.keys_stride + v * kStep, bfloat16_pairs(ds, next_ds));
      } else {
        store(tile.p + j * tile.stride + v * kStep, p);
        store(tile.ds + j * tile.stride + v * kStep, ds);
      }
    }
}

}  // namespace pk::cpu::PK_ISA
