// The backward kernels for Hopper. Compiled for sm_90a alone:
//   nvcc -cubin -arch=sm_90a -std=c++17 -O3 -Icsrc csrc/cuda/hopper/backward.cu
#include "cuda/hopper/backward.cuh"

namespace pk::cuda::hopper {
namespace {

template <class Element, int kDim, bool kHasScore>
BackwardKernel compiled() {
  using Tile = BackwardTile<Element, kDim>;
  return {kDim,
          Tile::kBlockM,
          Tile::kBlockN,
          Tile::kThreads,
          Tile::kSharedBytes,
          Tile::kSlabThreads,
          Tile::Rows::kBytes,
          Tile::Rows::kNumbers,
          pack_rows<Tile>,
          attention_backward<Tile, kHasScore>,
          reduce_slabs<Tile>};
}

template <class Element, bool kHasScore>
const BackwardKernel kKernels[] = {compiled<Element, 64, kHasScore>(), compiled<Element, 128, kHasScore>()};

template <class Element>
const BackwardKernel* serving(int dim, bool has_score) {
  const int index = dim > 64;
  return has_score ? &kKernels<Element, true>[index] : &kKernels<Element, false>[index];
}

}  // namespace

const BackwardKernel* backward_kernel(DType dtype, int dim, bool has_score) {
  return dtype == DType::kFloat16 ? serving<__half>(dim, has_score) : serving<__nv_bfloat16>(dim, has_score);
}

}  // namespace pk::cuda::hopper
