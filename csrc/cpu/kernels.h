// What one instruction set offers: the passes that the driver runs item by item. Sizes in bytes.
#pragma once

#include <cstdint>

#include "../attention.h"

namespace pk::cpu {

constexpr int kMaxSplits = 32;

// One example: a batch entry, or a sequence of the packed form.
struct Sequence {
  int64_t index;
  int64_t queries, keys;
  int64_t first_query_row, first_key_row;  // 0 outside the packed form
  int64_t q_offset;
};

// Query rows that share key head `kv_head`: row r is query r / group of head kv_head * group + r % group.
struct RowBlock {
  Sequence sequence;
  int64_t kv_head;
  int64_t first_row, rows;
};

struct KeyRange {
  int64_t begin, end;
};

// A run of equally long buffers, one per split.
struct Slots {
  char* data;
  int64_t stride;
  int count;
};

// The first 2 `pairs` channels of x (batch, length, heads, channels) turned, pair by pair, by the angles of
// their rows, or back; the others copied.
struct Rotation {
  int64_t length, heads, channels, pairs;
  View x;
  void* out;                    // contiguous
  const void *cos, *sin;        // (length, pairs) of accumulators
  int64_t angles_batch_stride;  // 0: the same for all
  bool interleaved;             // pairs are channels 2 i and 2 i + 1, else i and i + pairs
  bool inverse;
};

struct Kernels {
  const char* isa;
  int64_t panel;  // rows that combine and reduce finish per call

  // Partial result of a row block over a range of keys.
  int64_t (*slot_bytes)(const Attention&, int64_t rows);
  int64_t (*forward_scratch_bytes)(const Attention&, int64_t rows);
  void (*forward)(const Attention&, const RowBlock&, KeyRange, char* scratch, char* slot);
  void (*combine)(const Attention&, const RowBlock&, int64_t panel, Slots);

  // Queries and output gradients in operand order, shared by all key ranges of a row block; then dk and dv of
  // a range, written once, and its share of dq, added up by reduce.
  int64_t (*packed_bytes)(const Attention&, int64_t rows);
  int64_t (*slab_bytes)(const Attention&, int64_t rows);
  int64_t (*backward_scratch_bytes)(const Attention&, int64_t rows);
  void (*pack_queries)(const Attention&, const AttentionGradient&, const RowBlock&, int64_t panel,
                       char* packed);
  void (*backward)(const Attention&, const AttentionGradient&, const RowBlock&, KeyRange, const char* packed,
                   char* scratch, char* slab);
  void (*reduce)(const Attention&, const AttentionGradient&, const RowBlock&, int64_t panel, Slots);

  // Rows [begin, end) of batch * length.
  void (*rotate)(const Rotation&, int64_t begin, int64_t end);
};

// Single steps, for tests and probes.
struct Internals {
  void (*exp2)(const float* x, float* y, int64_t count);
  void (*exp2_double)(const double* x, double* y, int64_t count);
  void (*tanh)(const float* x, float* y, int64_t count);
  void (*tanh_double)(const double* x, double* y, int64_t count);
  // c (rows x columns) = a (rows x depth) b (depth x columns), all row-major and contiguous, through packing
  // and tiles.
  void (*matmul)(DType dtype, const void* a, const void* b, float* c, int64_t rows, int64_t columns,
                 int64_t depth);
  // Arithmetic of the micro-kernel on registers alone: returns the floating-point operations done.
  double (*fma_loop)(DType dtype, int64_t iterations);
  // Reads every byte once; the sum keeps the compiler honest.
  uint64_t (*read_loop)(const char* data, int64_t bytes);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels* (*kernels)(DType);
  const Internals* internals;
  bool (*pays)() = [] { return true; };  // whether it may be chosen where no other is named
};

// The compiled instruction sets, best last; a null name ends the list.
extern const InstructionSet kInstructionSets[];
// The best one that this processor runs, or the one that PERCEIVER_KERNELS_ISA names.
const InstructionSet& instruction_set();

}  // namespace pk::cpu
