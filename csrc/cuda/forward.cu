// The forward kernels that are compiled, one line for each tile. A few seconds; for one architecture, for
// example:
//   nvcc -cubin -arch=sm_80 -std=c++17 -O3 -Icsrc csrc/cuda/forward.cu
// Without --use_fast_math: where an approximation will do, the kernel says so itself.
#include "cuda/forward.cuh"
#include "cuda/forward.h"

namespace pk::cuda {
namespace {

template <class Tile, bool kHasScore>
ForwardKernel compiled() {
  return {Tile::kDim,     Tile::kBlockM,      Tile::kBlockN,
          Tile::kThreads, Tile::kSharedBytes, attention_forward<Tile, kHasScore>};
}

// Head dim; rows, keys of a block; warps over rows, over keys; stages; whether Q stays in registers. By the
// model of benchmarks/sass: no spills in the loop without masks, two blocks or eight warps on a processor.
template <class Element, bool kHasScore>
const ForwardKernel kManyRows[] = {
    compiled<ForwardTile<Element, 32, 128, 64, 4, 1, 2, true>, kHasScore>(),
    compiled<ForwardTile<Element, 64, 128, 64, 4, 1, 2, true>, kHasScore>(),
    compiled<ForwardTile<Element, 96, 128, 64, 4, 1, 1, false>, kHasScore>(),
    compiled<ForwardTile<Element, 128, 128, 64, 4, 1, 1, false>, kHasScore>(),
    compiled<ForwardTile<Element, 192, 128, 64, 8, 1, 1, true>, kHasScore>(),
    compiled<ForwardTile<Element, 256, 128, 64, 8, 1, 1, false>, kHasScore>(),
    compiled<ForwardTile<Element, 256, 64, 64, 4, 1, 1, false>, kHasScore>(),  // 99 KiB: sm_86, sm_89, sm_120
};

// Decode: memory binds, so the options cost nothing and four warps share a few rows.
template <class Element>
const ForwardKernel kForFewRows[] = {
    compiled<ForwardTile<Element, 32, kFewRows, 64, 1, 4, 2, true>, true>(),
    compiled<ForwardTile<Element, 64, kFewRows, 64, 1, 4, 2, true>, true>(),
    compiled<ForwardTile<Element, 96, kFewRows, 64, 1, 4, 2, true>, true>(),
    compiled<ForwardTile<Element, 128, kFewRows, 64, 1, 4, 2, true>, true>(),
    compiled<ForwardTile<Element, 192, kFewRows, 64, 1, 4, 1, true>, true>(),
    compiled<ForwardTile<Element, 256, kFewRows, 64, 1, 4, 1, false>, true>(),
};

template <int kTiles>
const ForwardKernel* serving(const ForwardKernel (&kernels)[kTiles], int dim, int shared_limit) {
  for (const ForwardKernel& kernel : kernels) {
    if (dim <= kernel.dim && kernel.shared_bytes <= shared_limit) return &kernel;
  }
  return nullptr;
}

template <class Element>
const ForwardKernel* forward_kernel(int dim, int64_t rows, bool has_score, int shared_limit) {
  if (rows <= kFewRows) return serving(kForFewRows<Element>, dim, shared_limit);
  return has_score ? serving(kManyRows<Element, true>, dim, shared_limit)
                   : serving(kManyRows<Element, false>, dim, shared_limit);
}

}  // namespace

const ForwardKernel* forward_kernel(DType dtype, int dim, int64_t rows, bool has_score, int shared_limit) {
  return dtype == DType::kFloat16 ? forward_kernel<__half>(dim, rows, has_score, shared_limit)
                                  : forward_kernel<__nv_bfloat16>(dim, rows, has_score, shared_limit);
}

CombineKernel combine_kernel(DType dtype) {
  return dtype == DType::kFloat16 ? combine_splits<__half> : combine_splits<__nv_bfloat16>;
}

}  // namespace pk::cuda
