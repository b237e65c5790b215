// exp2 and tanh on vectors. One polynomial: 2^f - 1 = f h(f) on [-1/2, 1/2], so that expm1, and tanh from it,
// keep their relative accuracy near zero.
#pragma once

#include "simd.h"

namespace pk::cpu::PK_ISA {

// Least maximal relative error of 2^f: 9.2e-8 at five terms, 2.9e-6 at four (enough where p is rounded to
// bfloat16).
template <int kTerms>
inline Vec<float> exp2_minus_one(Vec<float> f) {
  if constexpr (kTerms == 4) {
    Vec<float> h = f * 0.009582852867f + 0.05590642492f;
    h = f * h + 0.2402409862f;
    h = f * h + 0.6931241934f;
    return f * h;
  } else {
    Vec<float> h = f * 0.00132647269f + 0.009671512661f;
    h = f * h + 0.05550733744f;
    h = f * h + 0.2402224208f;
    h = f * h + 0.6931469776f;
    return f * h;
  }
}
template <int>
inline Vec<double> exp2_minus_one(Vec<double> f) {  // 2.0e-16
  constexpr double kTerms[] = {0.6931471805599459524,     0.2402265069591026647,   0.05550410866480992578,
                               0.009618129107526796062,   0.001333355814621017821, 0.0001540353052646992182,
                               0.00001525273437863461368, 1.321540764820383629e-6, 1.017792783386539668e-7,
                               7.077687769196927547e-9,   4.456524038687348366e-10};
  Vec<double> h = splat(kTerms[10]);
  for (int term = 9; term >= 0; --term) h = f * h + kTerms[term];
  return f * h;
}

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

// Splits x into 2^round(x) and 2^(x - round(x)) - 1.
template <int kTerms, class T>
inline void split_exp2(Vec<T> x, Vec<T>* power, Vec<T>* fraction) {
  Vec<T> shifted = x + Exponent<T>::kShift;
  *power = bit_cast<Vec<T>>(bit_cast<Vec<Bits<T>>>(shifted) << Exponent<T>::kMantissaBits);
  *fraction = exp2_minus_one<kTerms>(x - (shifted - Exponent<T>::kShift));
}

// 2^x for x <= 127 (1023): exactly 0 below the smallest normal number and at -inf, NaN stays NaN.
template <int kTerms = 5, class T>
inline Vec<T> exp2_vec(Vec<T> x) {
  Vec<T> power, fraction;
  split_exp2<kTerms, T>(x, &power, &fraction);
  Vec<T> result = power * fraction + power;
  return x < Exponent<T>::kSmallest ? Vec<T>{} : result;
}

template <class T>
inline Vec<T> tanh_vec(Vec<T> x) {
  constexpr T kTwoLog2E = T(2.885390081777926814719849362);
  using B = Bits<T>;
  Vec<B> sign = bit_cast<Vec<B>>(x) & bit_cast<Vec<B>>(splat(T(-0.0)));
  Vec<T> magnitude = bit_cast<Vec<T>>(bit_cast<Vec<B>>(x) ^ sign);
  // e = expm1(-2 |x|), tanh |x| = -e / (2 + e). From 40 on tanh is 1 to the last bit.
  Vec<T> clamped = magnitude > T(40) ? splat(T(40)) : magnitude;
  Vec<T> power, fraction;
  split_exp2<5, T>(-kTwoLog2E * clamped, &power, &fraction);
  Vec<T> e = power * fraction + (power - 1);
  return bit_cast<Vec<T>>(bit_cast<Vec<B>>(-e / (2 + e)) | sign);
}

}  // namespace pk::cpu::PK_ISA
