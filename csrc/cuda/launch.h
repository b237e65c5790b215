// From a problem to running kernels. No torch and no CUDA here.
#pragma once

#include <cstdint>

#include "attention.h"

namespace pk::cuda {

// Null is success; anything else says what went wrong, with the shapes, and holds until the thread's next
// call.
using Failure = const char*;

// What the choice of a kernel depends on: a GPU's architecture, 90 for compute capability 9.0, and the bytes
// of shared memory that a block may have there.
struct Kind {
  int arch, shared_limit;
};

// What a plan needs to know of a GPU: shared memory in bytes.
struct Device {
  int processors, shared_per_block, shared_per_processor, arch;
};

// Where to run: `device` must be the current one.
struct Target {
  int device;
  Kind kind;
  void* stream;
};

// How a kernel cuts a problem up, which the number of splits or runs follows from.
struct Tile {
  int block_m, block_n;  // packed rows, keys
  int threads, shared_bytes;
  int tile_bytes, slab_floats;  // of the backward's workspace, per block of rows
};

// Where several splits leave their results before they are merged; null for one.
struct Parts {
  int splits;
  float* outs;  // (splits, batch, heads, queries, value_dim); packed (splits, heads, queries, value_dim)
  float* lses;  // without value_dim
};

// The backward's: count_row_tiles() of each. Multiples of 16 bytes.
struct Workspace {
  int runs;      // of keys, which are summed up in order
  void* tiles;   // (all row tiles, tile_bytes)
  float* slabs;  // (runs, all row tiles, slab_floats)
};

// How many GPUs there are. Fails where there is none, or no driver.
Failure count_devices(int* count);

// The current one. Fails where the kernels can't run: no driver, one that is too old, or no code for this
// GPU.
Failure find_device(Device* device);

// The tile of the kernel for the longer head dim and, forward, the packed rows of a key head; has_score: soft
// cap or dropout. Fails where none fits.
Failure find_forward_tile(DType dtype, int64_t dim, int64_t rows, bool has_score, const Kind& kind,
                          Tile* tile);
Failure find_backward_tile(DType dtype, int64_t dim, bool has_score, const Kind& kind, Tile* tile);
int64_t count_row_tiles(const Attention& problem, int block_m);

// The problem's rows of 16-bit numbers begin at multiples of 16 bytes; key_mask and the forward's lse are
// contiguous.
Failure attention_forward(const Attention& problem, const Parts& parts, const Target& target);
Failure attention_backward(const Attention& problem, const AttentionGradient& gradient,
                           const Workspace& workspace, const Target& target);

}  // namespace pk::cuda
