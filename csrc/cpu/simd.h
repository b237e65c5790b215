// One vector type for every instruction set: GCC/Clang vector extensions, plus the few operations they can't
// say. Included only by kernels.cpp, which is compiled once per instruction set into the namespace PK_ISA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For what takes arrays of vectors that must stay in registers.
#define PK_INLINE __attribute__((always_inline)) inline

namespace pk::cpu::PK_ISA {

// kPanel vectors side by side and kTileRows rows fill the register file with accumulators.
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(PK_EMULATE_AVX512_BF16)
constexpr int kVectorBytes = 64, kPanelVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPanelVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kPanelVectors = 4;
#else
constexpr int kVectorBytes = 16, kPanelVectors = 2;
#endif
#if defined(__F16C__) && !defined(PK_EMULATE_AVX512_BF16)
#define PK_HAS_F16C
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr int kPanel = kPanelVectors * kLanes<T>;  // columns of a full panel

// The integer type as wide as T: its bits, its masks, its shuffles.
template <class T>
struct BitsOf {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x + 0 would turn -0 into 0
}
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V not_above_zero(V x) {
  return V{} < x ? V{} : x;  // NaN stays NaN
}

// Storage types that arithmetic doesn't know.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if !defined(__AVX512F__) && !defined(PK_HAS_F16C)
inline float to_float(Float16 x) {
  // Shift the mantissa into place and let one multiplication fix the exponent, subnormals included.
  uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  float value = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
  if ((x.bits & 0x7c00u) == 0x7c00u) value = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

// Rounds to nearest even.
inline void from_float(float x, Float16* to) {
  uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu, half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, the adder rounds at the right bit
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}
#endif

// kLanes<Acc> consecutive elements of T as a vector of Acc.
inline Vec<float> load_as(const float* p) { return load(p); }
inline Vec<double> load_as(const double* p) { return load(p); }
inline Vec<float> load_as(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__) && !defined(PK_EMULATE_AVX512_BF16)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half half;
  __builtin_memcpy(&half, p, sizeof half);
  return bit_cast<Vec<float>>(__builtin_convertvector(half, Vec<uint32_t>) << 16);
#endif
}
inline Vec<float> load_as(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(PK_HAS_F16C)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = to_float(p[lane]);
  return v;
#endif
}

#if defined(__AVX512F__)
inline uint32_t first_lanes(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }
inline Vec<float> load_lanes(const float* p, uint32_t lanes) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
}
inline Vec<double> load_lanes(const double* p, uint32_t lanes) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p);
}
inline Vec<float> load_lanes(const BFloat16* p, uint32_t lanes) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
inline Vec<float> load_lanes(const Float16* p, uint32_t lanes) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
}
#endif

// The first `count` elements, zeros behind them; never reads past p + count.
template <class Acc, class T>
inline Vec<Acc> load_as(const T* p, int64_t count) {
  if (count >= kLanes<Acc>) return load_as(p);
#if defined(__AVX512F__)
  return load_lanes(p, first_lanes(count));
#else
  T padded[kLanes<Acc>] = {};
  for (int64_t lane = 0; lane < count; ++lane) padded[lane] = p[lane];
  return load_as(padded);
#endif
}

inline void store_as(float* p, Vec<float> v) { store(p, v); }
inline void store_as(double* p, Vec<double> v) { store(p, v); }
// To nearest even, in the upper half of each lane; the lower half is left over.
inline Vec<uint32_t> round_to_bfloat16(Vec<float> v) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v);
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1) : bits | 0x400000u;
}
inline void store_as(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  const Half half = __builtin_convertvector(round_to_bfloat16(v) >> 16, Half);
  __builtin_memcpy(p, &half, sizeof half);
#endif
}
inline void store_as(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PK_HAS_F16C)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) from_float(v[lane], p + lane);
#endif
}
// The first `count` lanes.
template <class V, class T>
inline void store_as(T* p, V v, int64_t count) {
  constexpr int64_t kCount = sizeof(V) / sizeof(v[0]);
  if (count >= kCount) return store_as(p, v);
  T all[kCount];
  store_as(all, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = all[lane];
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

// body(Constant<0>{}), body(Constant<1>{}), ... Arrays indexed like this live in registers; GCC unrolls
// ordinary loops too late for that.
template <int kCount, int kFirst = 0, class Body>
PK_INLINE void unrolled(Body&& body) {
  if constexpr (kFirst < kCount) {
    body(Constant<kFirst>{});
    unrolled<kCount, kFirst + 1>(body);
  }
}

// Calls body with the number of vectors in `columns` as a compile-time constant, 1 to kPanelVectors.
template <class T, class Body>
inline void with_vectors(int64_t columns, Body&& body) {
  switch (columns / kLanes<T>) {
    case 1:
      return body(Constant<1>{});
    case 2:
      return body(Constant<2>{});
    case 3:
      if constexpr (kPanelVectors >= 3) return body(Constant<3>{});
      break;
    case 4:
      if constexpr (kPanelVectors >= 4) return body(Constant<4>{});
      break;
  }
}

// Lanes of a and b in turns, from the first lane on (kHigh = 0) or from the middle on (1).
template <class T, int kHigh>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  Vec<Bits<T>> order;
  for (int lane = 0; lane < kLanes<T>; ++lane)
    order[lane] = lane / 2 + kHigh * kLanes<T> / 2 + (lane % 2) * kLanes<T>;
  return __builtin_shuffle(a, b, order);
}

// Transposes a square block of vectors in place: log2(side) perfect shuffles.
template <class T>
inline void transpose(Vec<T>* block) {
  constexpr int kSide = kLanes<T>;
  for (int stage = 1; stage < kSide; stage *= 2) {
    Vec<T> shuffled[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide / 2; ++i) {
      shuffled[2 * i] = interleave<T, 0>(block[i], block[i + kSide / 2]);
      shuffled[2 * i + 1] = interleave<T, 1>(block[i], block[i + kSide / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) block[i] = shuffled[i];
  }
}

// Sums each of a square block of vectors over its lanes; lane i of the result is the sum of block[i].
template <class T>
inline Vec<T> sum_each(Vec<T>* block) {
  constexpr int kSide = kLanes<T>;
  for (int half = kSide / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      block[i] = interleave<T, 0>(block[i], block[i + half]) + interleave<T, 1>(block[i], block[i + half]);
  return block[0];
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
inline T max_of_lanes(Vec<T> v) {
  T highest = v[0];
  for (int lane = 1; lane < kLanes<T>; ++lane) highest = v[lane] > highest ? v[lane] : highest;
  return highest;
}
template <class T>
inline T sum_of_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace pk::cpu::PK_ISA
