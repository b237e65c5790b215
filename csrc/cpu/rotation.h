// Rotary embedding: one pass over the rows of a tensor.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace pk::cpu::PK_ISA {

// a, b = a cos - b sin, a sin + b cos for the pairs from i on.
template <class Acc>
inline void turn(const Rotation& r, const Acc* cos, const Acc* sin, int64_t i, Vec<Acc>* a, Vec<Acc>* b) {
  const Vec<Acc> c = load_as<Acc>(cos + i, r.pairs - i);
  Vec<Acc> s = load_as<Acc>(sin + i, r.pairs - i);
  if (r.inverse) s = -s;
  const Vec<Acc> turned = *a * c - *b * s;
  *b = *a * s + *b * c;
  *a = turned;
}

template <class Acc, class T>
inline void rotate_head(const Rotation& r, const T* x, const Acc* cos, const Acc* sin, T* out) {
  constexpr int kStep = kLanes<Acc>;
  const int64_t turned = 2 * r.pairs;
  for (int64_t i = 0; i < r.pairs; i += kStep) {
    if (r.interleaved) {
      Vec<Bits<Acc>> even;
      for (int lane = 0; lane < kStep; ++lane) even[lane] = 2 * lane;
      const int64_t at = 2 * i, rest = turned - at;
      const Vec<Acc> low = load_as<Acc>(x + at, rest), high = load_as<Acc>(x + at + kStep, rest - kStep);
      Vec<Acc> a = __builtin_shuffle(low, high, even), b = __builtin_shuffle(low, high, even + 1);
      turn(r, cos, sin, i, &a, &b);
      store_as(out + at, interleave<Acc, 0>(a, b), rest);
      store_as(out + at + kStep, interleave<Acc, 1>(a, b), rest - kStep);
    } else {
      const int64_t rest = r.pairs - i;
      Vec<Acc> a = load_as<Acc>(x + i, rest), b = load_as<Acc>(x + r.pairs + i, rest);
      turn(r, cos, sin, i, &a, &b);
      store_as(out + i, a, rest);
      store_as(out + r.pairs + i, b, rest);
    }
  }
  __builtin_memcpy(out + turned, x + turned, (r.channels - turned) * sizeof(T));
}

template <class Acc, class T>
void rotate(const Rotation& r, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / r.length, at = row % r.length;
    const int64_t angles = batch * r.angles_batch_stride + at * r.pairs;
    const T* x = static_cast<const T*>(r.x.data) + batch * r.x.batch_stride + at * r.x.row_stride;
    T* out = static_cast<T*>(r.out) + row * r.heads * r.channels;
    for (int64_t head = 0; head < r.heads; ++head)
      rotate_head<Acc, T>(r, x + head * r.x.head_stride, static_cast<const Acc*>(r.cos) + angles,
                          static_cast<const Acc*>(r.sin) + angles, out + head * r.channels);
  }
}

}  // namespace pk::cpu::PK_ISA
