// Cuts an iteration of admm_prune into tasks; the arithmetic is in admm_prune.inl.
#include "admm_prune.h"

#include <algorithm>
#include <cstddef>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../admm_prune.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Kept share above which Z Q is cheaper as a product of dense tiles than row by row from lists.
constexpr double dense_from = 0.35;

struct Run {
  AdmmPruneJob job;
  const AdmmPruneKernel* kernel;
  std::int64_t blocks;
};

void project_task(const void* context, std::int64_t task) {
  const Run& run = *static_cast<const Run*>(context);
  run.kernel->project(run.job, task);
}

// Consecutive tasks share a panel, so that it is read from memory once and then from the second-level cache.
void update_task(const void* context, std::int64_t task) {
  const Run& run = *static_cast<const Run*>(context);
  run.kernel->update(run.job, task % run.blocks, task / run.blocks);
}

void expand_task(const void* context, std::int64_t task) {
  const Run& run = *static_cast<const Run*>(context);
  run.kernel->expand(run.job, task % run.blocks, task / run.blocks);
}

}  // namespace

void admm_prune_step(const AdmmState& state, const bool* keep, float rho, float shrink, cpu::Context context) {
  const std::int64_t blocks = ceil_div(state.rows, admm_block_rows);
  const std::int64_t panels = ceil_div(state.n_in, admm_panel);
  const std::int64_t size = state.rows * state.n_in;
  const bool dense = static_cast<double>(std::count(keep, keep + size, true)) > dense_from * static_cast<double>(size);
  AdmmPruneJob job{state, keep, rho, shrink, panels * admm_panel, dense, nullptr, nullptr, nullptr, nullptr};
  if (dense) {
    job.z = static_cast<float*>(
        scratch(static_cast<std::size_t>(blocks * admm_block_rows * state.n_in) * sizeof(float)));
  } else {
    const auto n = static_cast<std::size_t>(size + 1);  // one past the end of the last list is written
    auto* at = static_cast<unsigned char*>(scratch(n * (sizeof(float) + sizeof(std::int32_t)) +
                                                   static_cast<std::size_t>(state.rows) * sizeof(std::int64_t)));
    job.counts = reinterpret_cast<std::int64_t*>(at);
    job.values = reinterpret_cast<float*>(job.counts + state.rows);
    job.cols = reinterpret_cast<std::int32_t*>(job.values + n);
  }
  const Run run{job, &kernel_for(context.isa), blocks};
  parallel_for(blocks, context.threads, project_task, &run);
  parallel_for(panels * blocks, context.threads, update_task, &run);
  parallel_for(panels * blocks, context.threads, expand_task, &run);
}

}  // namespace sparsebert
