// Cuts the values into tasks; the arithmetic is in dropout.inl.
#include "dropout.h"

#include <algorithm>

#include "threads.h"

#define SPARSEBERT_KERNEL "../dropout.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Blocks per task: 128 KB of floats.
constexpr std::int64_t task_blocks = 256;

}  // namespace

void dropout(const void* x, std::int64_t n, bool bf16, const Dropout& dropped, cpu::Context context, void* y) {
  const DropoutKernel& kernel = kernel_for(context.isa);
  const std::int64_t blocks = (n + dropout_block - 1) / dropout_block;
  parallel((blocks + task_blocks - 1) / task_blocks, context.threads, [&](std::int64_t task) {
    kernel.drop(x, n, bf16, dropped, task * task_blocks, std::min((task + 1) * task_blocks, blocks), y);
  });
}

}  // namespace sparsebert
