// What happens between the two matrix products, in scalars: visibility, softcap, dropout. Shared by host and
// device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PK_HOST_DEVICE inline
#endif

namespace pk {

// How many of the first `keys` keys query i may see: j is visible iff j <= q_offset + i.
PK_HOST_DEVICE int64_t visible_keys(int64_t q_offset, int64_t i, int64_t keys) {
  int64_t visible = q_offset + i + 1;
  return visible < 0 ? 0 : visible < keys ? visible : keys;
}

// d/dx of y = softcap * tanh(x / softcap), from y. Works on vectors of numbers too.
template <class Number, class Scalar>
PK_HOST_DEVICE Number softcap_grad(Number y, Scalar inverse_softcap) {
  Number t = y * inverse_softcap;
  return 1 - t * t;
}

// First word of Philox4x32-10 (Salmon et al., SC 2011) at counter (b, h, i, j).
PK_HOST_DEVICE uint32_t philox(uint64_t seed, uint32_t b, uint32_t h, uint32_t i, uint32_t j) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t product0 = uint64_t{0xD2511F53u} * b;
    uint64_t product1 = uint64_t{0xCD9E8D57u} * i;
    uint32_t next_b = static_cast<uint32_t>(product1 >> 32) ^ h ^ key0;
    uint32_t next_i = static_cast<uint32_t>(product0 >> 32) ^ j ^ key1;
    h = static_cast<uint32_t>(product1);
    j = static_cast<uint32_t>(product0);
    b = next_b;
    i = next_i;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return b;
}

// An entry is kept iff its philox word is at least this.
PK_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  double threshold = dropout_p * 4294967296.0;
  return threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 4294967295u;
}

}  // namespace pk
