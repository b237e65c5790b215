// Runs a plan: items in waves whose workspace stays bounded, each item on whichever thread is free, results
// merged in the order of the keys.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "plan.h"

namespace pk::cpu {
namespace {

constexpr int64_t kWaveBytes = 32 << 20;

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// body(item, thread) for every item in [0, items), each taken by the next free thread.
template <class Body>
void for_each(const ThreadPool& pool, int64_t items, const Body& body) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t items;
    const Body* body;
  } context;
  context.items = items;
  context.body = &body;
  const int threads = static_cast<int>(items < pool.threads ? items : pool.threads);
  const auto run = [](void* opaque, int thread) {
    Context* c = static_cast<Context*>(opaque);
    for (int64_t item; (item = c->next.fetch_add(1, std::memory_order_relaxed)) < c->items;)
      (*c->body)(item, thread);
  };
  if (threads <= 1)
    run(&context, 0);
  else
    pool.run(threads, &context, run);
}

// Blocks [first, end) of a plan whose buffers fit into one wave, and the flat lists of what there is to do
// for them.
struct Wave {
  struct Unit {
    const Plan::Block* block;
    int64_t index;   // split or panel
    int64_t offset;  // of the block's buffers
  };
  std::vector<Unit> splits, panels;
  int64_t bytes = 0;

  // block_bytes(block): what the block needs of the wave's buffer.
  template <class BlockBytes>
  size_t fill(const Plan& plan, size_t first, int64_t panel, const BlockBytes& block_bytes) {
    splits.clear();
    panels.clear();
    bytes = 0;
    size_t i = first;
    for (; i < plan.blocks.size(); ++i) {
      const Plan::Block& block = plan.blocks[i];
      const int64_t needed = block_bytes(block);
      if (i > first && bytes + needed > kWaveBytes) break;
      for (int64_t s = 0; s < block.splits; ++s) splits.push_back({&block, s, bytes});
      for (int64_t x = 0; x * panel < block.rows.rows; ++x) panels.push_back({&block, x, bytes});
      bytes += needed;
    }
    return i;
  }
};

KeyRange range_of(const Plan::Block& block, int64_t split) {
  const int64_t begin = split * block.keys_per_split, end = begin + block.keys_per_split;
  return {begin, end < block.keys ? end : block.keys};
}

int64_t largest(const Plan& plan, const Attention& p, int64_t (*bytes)(const Attention&, int64_t)) {
  int64_t most = 0;
  for (const Plan::Block& block : plan.blocks) {
    const int64_t needed = align(bytes(p, block.rows.rows));
    most = needed > most ? needed : most;
  }
  return most;
}

}  // namespace

void attention_forward(const Attention& p, const ThreadPool& pool) {
  const Kernels& kernels = *instruction_set().kernels(p.dtype);
  const Plan plan = plan_forward(p);
  const int64_t scratch_bytes = largest(plan, p, kernels.forward_scratch_bytes);
  const Buffer scratch = allocate(scratch_bytes * pool.threads);
  const auto slot_bytes = [&](const Plan::Block& block) {
    return align(kernels.slot_bytes(p, block.rows.rows));
  };

  Wave wave;
  for (size_t next = 0; next < plan.blocks.size();) {
    next = wave.fill(plan, next, kernels.panel,
                     [&](const Plan::Block& block) { return slot_bytes(block) * block.splits; });
    const Buffer slots = allocate(wave.bytes);
    for_each(pool, wave.splits.size(), [&](int64_t item, int thread) {
      const Wave::Unit& unit = wave.splits[item];
      kernels.forward(p, unit.block->rows, range_of(*unit.block, unit.index),
                      scratch.get() + thread * scratch_bytes,
                      slots.get() + unit.offset + unit.index * slot_bytes(*unit.block));
    });
    for_each(pool, wave.panels.size(), [&](int64_t item, int) {
      const Wave::Unit& unit = wave.panels[item];
      kernels.combine(p, unit.block->rows, unit.index,
                      {slots.get() + unit.offset, slot_bytes(*unit.block), unit.block->splits});
    });
  }
}

void attention_backward(const Attention& p, const AttentionGradient& gradient, const ThreadPool& pool) {
  const Kernels& kernels = *instruction_set().kernels(p.dtype);
  const Plan plan = plan_backward(p);
  const int64_t scratch_bytes = largest(plan, p, kernels.backward_scratch_bytes);
  const Buffer scratch = allocate(scratch_bytes * pool.threads);
  const auto packed_bytes = [&](const Plan::Block& block) {
    return align(kernels.packed_bytes(p, block.rows.rows));
  };
  const auto slab_bytes = [&](const Plan::Block& block) {
    return align(kernels.slab_bytes(p, block.rows.rows));
  };

  Wave wave;
  for (size_t next = 0; next < plan.blocks.size();) {
    next = wave.fill(plan, next, kernels.panel, [&](const Plan::Block& block) {
      return packed_bytes(block) + slab_bytes(block) * block.splits;
    });
    const Buffer buffer = allocate(wave.bytes);
    for_each(pool, wave.panels.size(), [&](int64_t item, int) {
      const Wave::Unit& unit = wave.panels[item];
      kernels.pack_queries(p, gradient, unit.block->rows, unit.index, buffer.get() + unit.offset);
    });
    for_each(pool, wave.splits.size(), [&](int64_t item, int thread) {
      const Wave::Unit& unit = wave.splits[item];
      const char* packed = buffer.get() + unit.offset;
      kernels.backward(
          p, gradient, unit.block->rows, range_of(*unit.block, unit.index), packed,
          scratch.get() + thread * scratch_bytes,
          buffer.get() + unit.offset + packed_bytes(*unit.block) + unit.index * slab_bytes(*unit.block));
    });
    for_each(pool, wave.panels.size(), [&](int64_t item, int) {
      const Wave::Unit& unit = wave.panels[item];
      kernels.reduce(p, gradient, unit.block->rows, unit.index,
                     {buffer.get() + unit.offset + packed_bytes(*unit.block), slab_bytes(*unit.block),
                      unit.block->splits});
    });
  }
}

}  // namespace pk::cpu
