// From a problem to running kernels. No torch and no CUDA here.
#pragma once

#include <cstdint>

#include "attention.h"

namespace pk::cuda {

// Null is success; anything else says what went wrong, with the shapes, and holds until the thread's next
// call.
using Failure = const char*;

// What a plan needs to know of a GPU: shared memory in bytes.
struct Device {
  int processors, shared_per_block, shared_per_processor;
};

// Where to run.
struct Target {
  int device;
  int shared_limit;  // bytes of shared memory that a block may have there
  void* stream;
};

// How a kernel cuts a problem up, which the number of splits follows from.
struct Tile {
  int block_m, block_n;  // packed rows, keys
  int threads, shared_bytes;
};

// Where several splits leave their results before they are merged; null for one.
struct Parts {
  int splits;
  float* outs;  // (splits, batch, heads, queries, value_dim); packed (splits, heads, queries, value_dim)
  float* lses;  // without value_dim
};

// Of the current one where index is negative. Fails where the kernels can't run: no driver, one that is too
// old, or no code for this GPU.
Failure find_device(int index, Device* device);

// Of the forward kernel for the longer head dim and the packed rows of a key head; has_score: soft cap or
// dropout. Fails where none fits.
Failure find_forward_tile(DType dtype, int64_t dim, int64_t rows, bool has_score, int64_t shared_limit,
                          Tile* tile);

// The problem's rows of 16-bit numbers begin at multiples of 16 bytes; key_mask and lse are contiguous.
Failure attention_forward(const Attention& problem, const Parts& parts, const Target& target);

}  // namespace pk::cuda
