// What the driver (dropout.cpp) and the kernels (dropout.inl) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Values per block. A block uses 16 neighbouring counters with eight random numbers each: value i uses number i / 16 of
// counter i % 16.
constexpr std::int64_t dropout_block = 128;

struct DropoutKernel {
  // Computes blocks `first` to `last` of n values.
  void (*drop)(const void* x, std::int64_t n, bool bf16, const Dropout& dropout, std::int64_t first, std::int64_t last,
               void* y);
};


}  // namespace sparsebert
