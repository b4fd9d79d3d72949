// Hands the groups of rows of an obs_prune to threads; the arithmetic is in obs_prune_*.inl.
#include "obs_prune.h"

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

// Removals that wait for the next base. A step reads half of them on average and, spread over the wait, half of the
// base and writes it back: 64 balances the two at 768 columns, where they take 0.4 MB of a 1 MB second-level cache, and
// is within 5 % of the best at 384 and 1536.
constexpr std::int64_t deferred = 64;

const ObsPruneKernel& kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return obs_prune_avx512::kernel;
  if (isa == Isa::avx2) return obs_prune_avx2::kernel;
#endif
  return obs_prune_scalar::kernel;
}

struct TraceRun {
  TraceJob job;
  const ObsPruneKernel* kernel;
  std::int64_t groups;
  std::int64_t bytes;
  char* memory;  // `bytes` a worker
  std::atomic<std::int64_t>* next;
};

// One task a thread, which takes groups until none is left: memory is then one piece a thread, had before any starts.
void trace_worker(const void* context, std::int64_t worker) {
  const TraceRun& run = *static_cast<const TraceRun*>(context);
  for (std::int64_t group; (group = run.next->fetch_add(1)) < run.groups;) {
    run.kernel->trace(run.job, group, run.memory + worker * run.bytes);
  }
}

}  // namespace

void obs_prune(const double* weight, std::int64_t rows, std::int64_t n_in, const double* inverse, std::int64_t group,
               Banks banks, std::int64_t steps, Isa isa, int threads, std::int32_t* order, double* losses) {
  const ObsPruneKernel& kernel = kernel_for(isa);
  const TraceJob job{weight, inverse, n_in, group, banks, steps, deferred, order, losses};
  const std::int64_t groups = rows / group;
  const std::int64_t workers = std::min<std::int64_t>(threads, groups);
  const std::int64_t bytes = kernel.trace_bytes(job);
  std::atomic<std::int64_t> next{0};
  const TraceRun run{job, &kernel, groups, bytes,
                     static_cast<char*>(scratch(static_cast<std::size_t>(workers * bytes))), &next};
  parallel_for(workers, threads, trace_worker, &run);
}

}  // namespace sparsebert
