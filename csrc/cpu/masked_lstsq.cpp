// Hands the groups of a masked_lstsq to the threads; the arithmetic is in masked_lstsq.inl.
#include "masked_lstsq.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

const MaskedLstsqKernel& kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return masked_lstsq_avx512::kernel;
  if (isa == Isa::avx2) return masked_lstsq_avx2::kernel;
#endif
  return masked_lstsq_scalar::kernel;
}

struct Run {
  MaskedLstsqJob job;
  const MaskedLstsqKernel* kernel;
  std::int64_t* failed;
  std::atomic<bool>* out_of_memory;
};

void solve_task(const void* context, std::int64_t group) {
  const Run& run = *static_cast<const Run*>(context);
  const RowGroups& groups = run.job.groups;
  const std::int32_t* rows = groups.rows + groups.row_ptr[group];
  const std::int64_t g = groups.row_ptr[group + 1] - groups.row_ptr[group];
  const bool* mask = groups.mask + rows[0] * run.job.n_in;
  const bool wanted = !run.job.complement;
  const std::int64_t k = std::count(mask, mask + run.job.n_in, wanted);
  const auto doubles = static_cast<std::size_t>(run.kernel->workspace(k, g));
  try {
    auto* work = static_cast<double*>(
        scratch(doubles * sizeof(double) + static_cast<std::size_t>(k) * sizeof(std::int32_t), Scratch::task));
    auto* cols = reinterpret_cast<std::int32_t*>(work + doubles);
    std::int32_t* end = cols;
    for (std::int64_t i = 0; i < run.job.n_in; ++i) {
      if (mask[i] == wanted) *end++ = static_cast<std::int32_t>(i);
    }
    run.failed[group] = run.kernel->solve(run.job, cols, k, rows, g, work);
  } catch (const std::bad_alloc&) {
    run.out_of_memory->store(true);
  }
}

}  // namespace

void masked_lstsq(const double* target, const double* h, std::int64_t n_in, const RowGroups& groups, bool complement,
                  Isa isa, int threads, double* v, std::int64_t* failed) {
  std::atomic<bool> out_of_memory{false};
  const Run run{{target, h, n_in, groups, complement, v}, &kernel_for(isa), failed, &out_of_memory};
  parallel_for(groups.count, threads, solve_task, &run);
  if (out_of_memory.load()) throw std::bad_alloc();
}

}  // namespace sparsebert
