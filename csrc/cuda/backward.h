// What the backward kernels are given. No torch and no CUDA here.
//
// Three launches, in this order, all with the same arguments:
//   pack        rows of query and dout to tiles as they lie in shared memory, with two numbers per row
//   attention   dk and dv; into float slabs, one for each run of keys, what its keys give to dq
//   reduce      dq, the sum of the slabs in the order of the runs
// Nothing needs to be zeroed before: each kernel writes all that a later one reads, and dq, dk, dv in full.
#pragma once

#include <cstdint>

#include "attention.h"

namespace pk::cuda {

// One call, as every block sees it. Rows of query, key, value, out, dout and of the gradients begin at
// multiples of 16 bytes, dim and value_dim are multiples of 8, keys + queries and group * queries are less
// than 2^31. Packed (cu_seqlens), queries and keys are those of the longest sequences.
struct BackwardArguments {
  View query, key, value, out, dout;
  View lse, dlse;  // float; dlse.data may be null
  View dquery, dkey, dvalue;
  int32_t kv_heads, group;  // group: query heads of a key head
  int32_t queries, keys, dim, value_dim;

  // Key j is visible to query i iff key_mask[j] (where given) and j <= q_offset + i.
  int64_t q_offset;
  const int64_t* q_offsets;  // (batch,), replaces q_offset
  const uint8_t* key_mask;   // (batch, keys), or (all keys,) packed
  int64_t key_mask_batch_stride;
  const int64_t* cu_seqlens_q;  // (batch + 1,)
  const int64_t* cu_seqlens_k;

  // exp(score) = 2^(exponent * x) with x = q . k, or softcap * tanh(q . k * capped_scale) where softcap > 0.
  float exponent;  // of either sign
  float scale;     // of dq and dk
  float softcap, capped_scale;

  const int64_t* dropout_seed;  // the seed and what key 0 is called in the counter; null: no dropout
  uint32_t dropout_threshold;
  float keep_factor;  // 1 / (1 - dropout_p)

  // Workspace: multiples of 16 bytes, contents free. row_tiles are those of a key head: packed, of all
  // sequences, each of which may waste a part of one.
  int32_t row_tiles, runs;
  void* tiles;   // (all tiles, tile_bytes)
  float* slabs;  // (runs, all tiles, slab_floats)
};

// The compiled kernels of a tile.
struct BackwardKernel {
  int dim;               // the longest head dim that they serve, of queries or of values
  int block_m, block_n;  // packed rows (row r is query r / group of head r % group) and keys of a tile
  int threads, shared_bytes;
  int row_threads;  // of a block of pack and of reduce; no dynamic shared memory
  int tile_bytes, slab_floats;

  void (*pack)(BackwardArguments);       // grid: ceil(group * queries / block_m) * batch * kv_heads
  void (*attention)(BackwardArguments);  // grid: runs * batch * kv_heads
  void (*reduce)(BackwardArguments);     // grid: as pack's
};

// The one to take, null beyond a head dim of 256. has_score: softcap or dropout. runs: from 1 to
// ceil(keys / block_n), a matter of filling the device and of memory; more only leave blocks idle.
const BackwardKernel* backward_kernel(DType dtype, int dim, bool has_score);

// For Hopper, whose own instructions it needs, up to a head dim of 128.
namespace hopper {
const BackwardKernel* backward_kernel(DType dtype, int dim, bool has_score);
}

}  // namespace pk::cuda
