// How work is split: by shape alone, never by the number of threads or by the other examples of the batch, so
// that neither can change a bit of the result.
#pragma once

#include <vector>

#include "kernels.h"

namespace pk::cpu {

struct Plan {
  struct Block {
    RowBlock rows;
    int64_t keys;            // keys [0, keys) have work
    int64_t keys_per_split;  // a multiple of the kernels' key block
    int splits;
  };
  std::vector<Block> blocks;
};

// Row blocks of at most kRowBlock query rows, each over the keys its sequence can see.
Plan plan_forward(const Attention& problem);
// One block for all query rows of a key head, over all keys: those that nobody sees get zero gradients.
Plan plan_backward(const Attention& problem);

}  // namespace pk::cpu
