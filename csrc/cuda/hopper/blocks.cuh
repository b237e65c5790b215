// How keys and values get into shared memory.
#pragma once

#include <cstdint>

#include "cuda/copy.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/work.cuh"

namespace pk::cuda::hopper {

// 64 threads that copy one block of keys' (or values') rows after another; those that nobody sees are zeros.
// kUnrolled rows of a thread at a time, as many as it has registers for.
template <class Keys, int kUnrolled>
class BlockCopier {
 public:
  __device__ BlockCopier(const Example& example, const View& view, int dim, int thread, int first_key)
      : copier_(thread),
        next_(
            at<uint16_t>(view, example.batch, example.kv_head, example.first_key + first_key + copier_.row) +
            copier_.column),
        row_stride_(view.row_stride),
        dim_(dim) {}

  template <class Arguments>
  __device__ __forceinline__ void copy(uint32_t tile, const Arguments& arguments, const Example& example,
                                       int first_key) {
#pragma unroll kUnrolled
    for (int step = 0; step < copier_.kSteps; ++step) {
      const bool there = is_there(arguments, example, first_key + copier_.row + step * copier_.kRowStep);
#pragma unroll
      for (int panel = 0; panel < Keys::kCount; ++panel) {
        copier_.copy_row(tile + panel * Keys::kPanelBytes, step, next_ + panel * 64, dim_ - panel * 64,
                         there);
      }
      next_ += copier_.kRowStep * row_stride_;
    }
  }

 private:
  const Copier<64, Keys::kRowCount, kGroup / 2> copier_;
  const uint16_t* next_;
  const int64_t row_stride_;
  const int dim_;
};

}  // namespace pk::cuda::hopper
