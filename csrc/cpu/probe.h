// Single steps of the kernels for tests, and what the machine could do at best: multiply-adds on registers,
// reads.
#pragma once

#include "softmax.h"

namespace pk::cpu::PK_ISA {

template <class T>
inline Vec<T> exp2_of(Vec<T> x) {
  return exp2_vec<T>(x);
}
template <class T>
inline Vec<T> tanh_of(Vec<T> x) {
  return tanh_vec<T>(x);
}
template <class T, Vec<T> (*kFunction)(Vec<T>)>
void apply(const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    store_as(y + i, kFunction(load_as<T>(x + i, count - i)), count - i);
}

template <class Mode, class T>
void matmul_as(const T* a, const T* b, float* c, int64_t rows, int64_t columns, int64_t depth) {
  using Operand = typename Mode::Operand;
  const int64_t depth_steps = steps<Mode>(depth);
  Operand* packed_a = new Operand[rows * depth_steps + kPackSlack];
  Operand* packed_b = new Operand[depth_steps * kPanel<float> + kPackSlack];
  const T** pointers = new const T*[rows > depth ? rows : depth];
  float tile[Mode::kRows * kPanel<float>];
  [[maybe_unused]] const typename Mode::Session session;
  for (int64_t r = 0; r < rows; ++r) pointers[r] = a + r * depth;
  pack_channel_steps<Mode, T>(pointers, rows, depth, packed_a);
  for (int64_t k = 0; k < depth; ++k) pointers[k] = b + k * columns;
  for (int64_t column = 0; column < columns; column += kPanel<float>) {
    const int64_t count = columns - column < kPanel<float> ? columns - column : kPanel<float>;
    const int64_t width = round_up(count, kLanes<float>);
    pack_row_steps<Mode, T>(pointers, depth, column, count, width, packed_b);
    for (int64_t row = 0; row < rows; row += Mode::kRows) {
      const int64_t tile_rows = rows - row < Mode::kRows ? rows - row : Mode::kRows;
      multiply<Update::kStore>(Product<Mode>{packed_a + row * depth_steps, depth_steps, depth_steps, 1,
                                             packed_b, width, depth_steps, tile, width},
                               tile_rows, width);
      for (int64_t r = 0; r < tile_rows; ++r)
        for (int64_t x = 0; x < count; ++x) c[(row + r) * columns + column + x] = tile[r * width + x];
    }
  }
  delete[] pointers;
  delete[] packed_b;
  delete[] packed_a;
}

void matmul(DType dtype, const void* a, const void* b, float* c, int64_t rows, int64_t columns,
            int64_t depth) {
  const auto run = [&](auto mode, auto element) {
    using T = decltype(element);
    matmul_as<decltype(mode), T>(static_cast<const T*>(a), static_cast<const T*>(b), c, rows, columns, depth);
  };
  if (dtype == DType::kFloat32) run(Plain<float>{}, float{});
  if (dtype == DType::kFloat16) run(Plain<float>{}, Float16{});
  if (dtype == DType::kBFloat16) run(BFloat16Mode{}, BFloat16{});
}

// Hides a register from the compiler, so that it neither folds nor drops the arithmetic around it.
template <class V>
inline void opaque(V& v) {
#if defined(__x86_64__) && !defined(PK_EMULATE_AVX512_BF16)
  __asm__ volatile("" : "+x"(v));
#elif defined(__aarch64__) && !defined(PK_EMULATE_AVX512_BF16)
  __asm__ volatile("" : "+w"(v));
#else  // the emulated set's vectors are wider than a register
  __asm__ volatile("" : "+m"(v));
#endif
}

template <class Mode>
inline double fma_loop_as(int64_t iterations) {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  constexpr int kChains = kTileRows * kPanelVectors;
  Vec<Acc> acc[kChains] = {};
  Vec<Operand> b = {};  // zeros: no overflow, no subnormal numbers
  opaque(b);
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 32
    for (int x = 0; x < kChains; ++x) {
      acc[x] = Mode::multiply_add(b, b, acc[x]);
      opaque(acc[x]);
    }
  return 2.0 * kLanes<Acc> * Mode::kPack * kChains * static_cast<double>(iterations);
}

#ifdef PK_AMX
template <>
inline double fma_loop_as<BFloat16Tiles>(int64_t iterations) {
  const TileSession session;
  for (int64_t i = 0; i < iterations; ++i)
    unrolled<4>([](auto tile) { tile_multiply_add<tile, 4 + tile / 2, 6 + tile % 2>(); });
  return 2.0 * 4 * kTileSide * kTileSide * kTileSide * BFloat16Tiles::kPack * static_cast<double>(iterations);
}
#endif

double fma_loop(DType dtype, int64_t iterations) {
  switch (dtype) {
    case DType::kFloat64:
      return fma_loop_as<Plain<double>>(iterations);
    case DType::kBFloat16:
      return fma_loop_as<BFloat16Mode>(iterations);
    default:
      return fma_loop_as<Plain<float>>(iterations);
  }
}

uint64_t read_loop(const char* data, int64_t bytes) {
  constexpr int kStreams = 8;
  Vec<uint64_t> sum[kStreams] = {};
  int64_t i = 0;
  for (; i + kStreams * kVectorBytes <= bytes; i += kStreams * kVectorBytes)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      Vec<uint64_t> v;
      __builtin_memcpy(&v, data + i + s * kVectorBytes, sizeof v);
      sum[s] += v;
    }
  for (int s = 1; s < kStreams; ++s) sum[0] += sum[s];
  uint64_t total = 0;
  for (int lane = 0; lane < kLanes<uint64_t>; ++lane) total += sum[0][lane];
  return total;
}

}  // namespace pk::cpu::PK_ISA
