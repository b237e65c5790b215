// All kernels of one instruction set. CMake compiles this file once per set, with PK_ISA as its name.
#include "kernels.h"

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "probe.h"
#include "rotation.h"

#define PK_STRINGIFY(x) #x
#define PK_NAME(x) PK_STRINGIFY(x)

namespace pk::cpu::PK_ISA {

template <class Mode, class T>
struct Table {
  using Acc = typename Mode::Acc;

  static bool decodes(int64_t rows) { return rows <= kDecodeRows && rows <= kPanel<Acc>; }
  static int64_t slot_bytes(const Attention& p, int64_t rows) {
    return slot_elements<Acc>(p, rows) * static_cast<int64_t>(sizeof(Acc));
  }
  static int64_t forward_scratch(const Attention& p, int64_t rows) {
    return decodes(rows) ? decode_scratch_bytes<Acc, T>(p) : forward_scratch_bytes<Mode, T>(p, rows);
  }
  static void run_forward(const Attention& p, const RowBlock& block, KeyRange range, char* scratch,
                          char* slot) {
    const auto run = decodes(block.rows) ? decode<Acc, T> : forward<Mode, T>;
    run(p, block, range, scratch, slot);
  }

  static constexpr Kernels kKernels = {
      PK_NAME(PK_ISA),       kPanel<Acc>,       slot_bytes,
      forward_scratch,       run_forward,       combine<Acc, T>,
      packed_bytes<Mode>,    slab_bytes<Acc>,   backward_scratch_bytes<Mode, T>,
      pack_queries<Mode, T>, backward<Mode, T>, reduce<Acc, T>,
      rotate<Acc, T>,
  };
};

const Kernels* kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &Table<Plain<float>, float>::kKernels;
    case DType::kBFloat16:
      return &Table<BFloat16Mode, BFloat16>::kKernels;
    case DType::kFloat16:
      return &Table<Plain<float>, Float16>::kKernels;
    case DType::kFloat64:
      return &Table<Plain<double>, double>::kKernels;
  }
  return nullptr;
}

extern const Internals kInternals;
const Internals kInternals = {
    apply<float, exp2_of<float>>,
    apply<double, exp2_of<double>>,
    apply<float, tanh_of<float>>,
    apply<double, tanh_of<double>>,
    matmul,
    fma_loop,
    read_loop,
};

}  // namespace pk::cpu::PK_ISA
