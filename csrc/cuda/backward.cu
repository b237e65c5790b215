// The backward kernels that are compiled, one line for each tile. For one architecture, for example:
//   nvcc -cubin -arch=sm_80 -std=c++17 -O3 -Icsrc csrc/cuda/backward.cu
// Without --use_fast_math: where an approximation will do, the kernel says so itself.
#include "cuda/backward.h"

#include "cuda/backward.cuh"

namespace pk::cuda {
namespace {

template <class Tile, bool kHasScore>
BackwardKernel compiled() {
  return {Tile::kDim,         Tile::kBlockM,
          Tile::kBlockN,      Tile::kThreads,
          Tile::kSharedBytes, Tile::kThreads,
          Tile::Rows::kBytes, Tile::Rows::kNumbers,
          pack_rows<Tile>,    attention_backward<Tile, kHasScore>,
          reduce_slabs<Tile>};
}

// Head dim; rows of a tile; 16-key tiles of a warp, warps over keys, roles; rows at a time; warps over rows
// for dq; whether K and V stay in registers as left operands. By the model of benchmarks/sass: no spills in
// the loop without masks, 8 warps on a processor.
template <class Element, bool kHasScore>
const BackwardKernel kKernels[] = {
    compiled<BackwardTile<Element, 32, kHasScore ? 64 : 128, 2, 4, 1, 32, kHasScore ? 2 : 4, true>,
             kHasScore>(),
    compiled<BackwardTile<Element, 64, 64, 2, 4, 1, 32, 2, false>, kHasScore>(),
    compiled<BackwardTile<Element, 96, 64, 1, 8, 1, 32, 4, true>, kHasScore>(),
    compiled<BackwardTile<Element, 128, 64, 2, 4, 2, kHasScore ? 32 : 64, 2, false>, kHasScore>(),
    compiled<BackwardTile<Element, 192, 64, 1, 4, 2, 64, 2, true>, kHasScore>(),
    compiled<BackwardTile<Element, 256, 32, 1, 4, 2, 32, 1, false>, kHasScore>(),
};

template <class Element, bool kHasScore>
const BackwardKernel* serving(int dim) {
  for (const BackwardKernel& kernel : kKernels<Element, kHasScore>) {
    if (dim <= kernel.dim) return &kernel;
  }
  return nullptr;
}

template <class Element>
const BackwardKernel* backward_kernel(int dim, bool has_score) {
  return has_score ? serving<Element, true>(dim) : serving<Element, false>(dim);
}

}  // namespace

const BackwardKernel* backward_kernel(DType dtype, int dim, bool has_score) {
  return dtype == DType::kFloat16 ? backward_kernel<__half>(dim, has_score)
                                  : backward_kernel<__nv_bfloat16>(dim, has_score);
}

}  // namespace pk::cuda
