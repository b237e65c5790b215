// exp2 and tanh on vectors. One polynomial: 2^f - 1 = f h(f) on [-1/2, 1/2], so that expm1, and tanh from it,
// keep their relative accuracy near zero.
#pragma once

#include "simd.h"

namespace pk::cpu::PK_ISA {

// h from the constant term up. Least maximal relative error of 2^f: 9.2e-8 at five terms, 2.9e-6 at four
// (enough where p is rounded to bfloat16), 2.0e-16 at eleven.
template <class T, int kTerms>
struct Exp2Terms;
template <>
struct Exp2Terms<float, 4> {
  static constexpr float h[] = {0.6931241934f, 0.2402409862f, 0.05590642492f, 0.009582852867f};
};
template <>
struct Exp2Terms<float, 5> {
  static constexpr float h[] = {0.6931469776f, 0.2402224208f, 0.05550733744f, 0.009671512661f,
                                0.00132647269f};
};
template <>
struct Exp2Terms<double, 11> {
  static constexpr double h[] = {0.6931471805599459524,     0.2402265069591026647,   0.05550410866480992578,
                                 0.009618129107526796062,   0.001333355814621017821, 0.0001540353052646992182,
                                 0.00001525273437863461368, 1.321540764820383629e-6, 1.017792783386539668e-7,
                                 7.077687769196927547e-9,   4.456524038687348366e-10};
};
template <class T>
constexpr int kExpTerms = 5;
template <>
constexpr int kExpTerms<double> = 11;

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr float kShift =
      12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer, biased for the exponent
  static constexpr int kMantissaBits = 23;
  static constexpr float kSmallest = -126;
};
template <>
struct Exponent<double> {
  static constexpr double kShift = 6755399441055744.0 + 1023;
  static constexpr int kMantissaBits = 52;
  static constexpr double kSmallest = -1022;
};

// Splits each x into 2^round(x), which takes its place, and 2^(x - round(x)) - 1. Vectors go step by step
// together: the latency of one hides behind the others.
template <int kTerms, int kCount, class T>
PK_INLINE void split_exp2(Vec<T>* x, Vec<T>* fraction) {
  constexpr auto& h = Exp2Terms<T, kTerms>::h;
  Vec<T> f[kCount];
  unrolled<kCount>([&](auto i) {
    const Vec<T> shifted = x[i] + Exponent<T>::kShift;
    f[i] = x[i] - (shifted - Exponent<T>::kShift);
    x[i] = bit_cast<Vec<T>>(bit_cast<Vec<Bits<T>>>(shifted) << Exponent<T>::kMantissaBits);
  });
  unrolled<kCount>([&](auto i) { fraction[i] = f[i] * h[kTerms - 1] + h[kTerms - 2]; });
  unrolled<kTerms - 2>([&](auto term) {
    unrolled<kCount>([&](auto i) { fraction[i] = f[i] * fraction[i] + h[kTerms - 3 - term]; });
  });
  unrolled<kCount>([&](auto i) { fraction[i] *= f[i]; });
}

// x becomes 2^x, for x <= 127 (1023): exactly 0 below the smallest normal number and at -inf, NaN stays NaN.
template <int kTerms, int kCount, class T>
PK_INLINE void exp2_each(Vec<T>* x) {
  Vec<T> power[kCount], fraction[kCount];
  unrolled<kCount>([&](auto i) { power[i] = x[i]; });
  split_exp2<kTerms, kCount, T>(power, fraction);
  unrolled<kCount>([&](auto i) {
    const Vec<T> result = power[i] * fraction[i] + power[i];
    x[i] = x[i] < Exponent<T>::kSmallest ? Vec<T>{} : result;
  });
}
template <class T>
inline Vec<T> exp2_vec(Vec<T> x) {
  exp2_each<kExpTerms<T>, 1, T>(&x);
  return x;
}

template <class T>
inline Vec<T> tanh_vec(Vec<T> x) {
  constexpr T kTwoLog2E = T(2.885390081777926814719849362);
  using B = Bits<T>;
  Vec<B> sign = bit_cast<Vec<B>>(x) & bit_cast<Vec<B>>(splat(T(-0.0)));
  Vec<T> magnitude = bit_cast<Vec<T>>(bit_cast<Vec<B>>(x) ^ sign);
  // e = expm1(-2 |x|), tanh |x| = -e / (2 + e). From 40 on tanh is 1 to the last bit.
  Vec<T> clamped = magnitude > T(40) ? splat(T(40)) : magnitude;
  Vec<T> power = -kTwoLog2E * clamped, fraction;
  split_exp2<kExpTerms<T>, 1, T>(&power, &fraction);
  Vec<T> e = power * fraction + (power - 1);
  return bit_cast<Vec<T>>(bit_cast<Vec<B>>(-e / (2 + e)) | sign);
}

}  // namespace pk::cpu::PK_ISA
