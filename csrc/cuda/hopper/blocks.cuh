// How keys and values get into shared memory, and who waits for whom there.
#pragma once

#include <cstdint>

#include "cuda/copy.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/work.cuh"

namespace pk::cuda::hopper {

// Barriers of two kinds of slots, kSlots of each, that two warps of copiers fill and warp groups of consumers
// read. A slot is full when it may be read, which each consumer waits for by itself, empty when it may be
// overwritten. Number 0 is the block's; kNext is the first that is left for other purposes.
template <int kSlots, int kConsumers>
struct SlotBarriers {
  static constexpr int kCopiers = kGroup / 2, kReaders = kGroup * kConsumers;
  static constexpr int kFullThreads = kCopiers + kGroup, kEmptyThreads = kCopiers + kReaders;
  static constexpr int kNext = 1 + 2 * kSlots * (kConsumers + 1);
  static_assert(kNext < 16, "the hardware's");

  __device__ static int full(int kind, int slot, int consumer) {
    return 1 + (kind * kSlots + slot) * kConsumers + consumer;
  }
  __device__ static int empty(int kind, int slot) { return full(2, 0, 0) + kind * kSlots + slot; }

  // A copier's: what it has copied to this slot may be read.
  __device__ __forceinline__ static void fill(int kind, int slot) {
    wait_for_own_copies();
    publish();
#pragma unroll
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      arrive<kFullThreads>(full(kind, slot, consumer));
    }
  }
};

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
