// Hands the groups of a masked_lstsq to the threads; the arithmetic is in masked_lstsq.inl.
#include "masked_lstsq.h"

#include <algorithm>
#include <cstddef>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../masked_lstsq.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Solves a group of rows; returns the result of MaskedLstsqKernel::solve.
std::int64_t solve(const MaskedLstsqKernel& kernel, const MaskedLstsqJob& job, std::int64_t group) {
  const RowGroups& groups = job.groups;
  const std::int32_t* rows = groups.rows + groups.row_ptr[group];
  const std::int64_t g = groups.row_ptr[group + 1] - groups.row_ptr[group];
  const bool* mask = groups.mask + rows[0] * job.n_in;
  const bool wanted = !job.complement;
  const std::int64_t k = std::count(mask, mask + job.n_in, wanted);
  const auto doubles = static_cast<std::size_t>(kernel.workspace(k, g));
  auto* work = static_cast<double*>(
      scratch(doubles * sizeof(double) + static_cast<std::size_t>(k) * sizeof(std::int32_t), Scratch::task));
  auto* cols = reinterpret_cast<std::int32_t*>(work + doubles);
  std::int32_t* end = cols;
  for (std::int64_t i = 0; i < job.n_in; ++i) {
    if (mask[i] == wanted) *end++ = static_cast<std::int32_t>(i);
  }
  return kernel.solve(job, cols, k, rows, g, work);
}

}  // namespace

void masked_lstsq(const double* target, const double* h, std::int64_t n_in, const RowGroups& groups, bool complement,
                  cpu::Context context, double* v, std::int64_t* failed) {
  const MaskedLstsqKernel& kernel = kernel_for(context.isa);
  const MaskedLstsqJob job{target, h, n_in, groups, complement, v};
  parallel(groups.count, context.threads, [&](std::int64_t group) { failed[group] = solve(kernel, job, group); });
}

}  // namespace sparsebert
