// The forward kernels for Hopper. Compiled for sm_90a alone:
//   nvcc -cubin -arch=sm_90a -std=c++17 -O3 -Icsrc csrc/cuda/hopper/forward.cu
#include "cuda/hopper/forward.cuh"

namespace pk::cuda::hopper {
namespace {

template <class Element, int kDim, bool kHasScore>
ForwardKernel compiled() {
  using Tile = ForwardTile<Element, kDim>;
  return {kDim,           Tile::kBlockM,      Tile::kBlockN,
          Tile::kThreads, Tile::kSharedBytes, attention_forward<Tile, kHasScore>};
}

template <class Element, bool kHasScore>
const ForwardKernel kKernels[] = {compiled<Element, 64, kHasScore>(), compiled<Element, 128, kHasScore>()};

template <class Element>
const ForwardKernel* serving(int dim, bool has_score) {
  const int index = dim > 64;
  return has_score ? &kKernels<Element, true>[index] : &kKernels<Element, false>[index];
}

}  // namespace

const ForwardKernel* forward_kernel(DType dtype, int dim, bool has_score) {
  return dtype == DType::kFloat16 ? serving<__half>(dim, has_score) : serving<__nv_bfloat16>(dim, has_score);
}

}  // namespace pk::cuda::hopper
