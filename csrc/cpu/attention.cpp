// A task is a head of a sequence; the arithmetic is in attention.inl.
#include "attention.h"

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../attention.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Calls task(number, working memory) for every head of every sequence.
template <typename Task>
void for_heads(const Attention& job, const AttentionKernel& kernel, bool backward, int threads, const Task& task) {
  if (job.tokens == 0) return;
  const auto bytes = static_cast<std::size_t>(kernel.floats(job, backward)) * sizeof(float);
  parallel(job.sequences * job.heads, threads, [&](std::int64_t number) {
    task(number, static_cast<float*>(scratch(bytes, Scratch::task)));
  });
}

}  // namespace

void attention(const Attention& job, cpu::Context context, void* out, float* stats) {
  const AttentionKernel& kernel = kernel_for(context.isa);
  for_heads(job, kernel, false, context.threads,
            [&](std::int64_t task, float* work) { kernel.attend(job, task, work, out, stats); });
}

void attention_backward(const Attention& job, const float* stats, const void* d_out, cpu::Context context, void* dq,
                        void* dk, void* dv) {
  const AttentionKernel& kernel = kernel_for(context.isa);
  for_heads(job, kernel, true, context.threads, [&](std::int64_t task, float* work) {
    kernel.attend_backward(job, task, work, stats, d_out, dq, dk, dv);
  });
}

}  // namespace sparsebert
