// Small pools of worker threads, one for each caller at once. They do not use OpenMP, because a process that also holds
// PyTorch would then hold two OpenMP run-times, each with its own spinning workers on the same cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace sparsebert {

using Task = void (*)(const void* context, std::int64_t task);

// Runs fn(context, i) once for every i in [0, n_tasks), on at most `threads` threads including the caller, and returns
// when all are done. Each thread begins with a share of neighbouring tasks, which it takes in order, one at a time;
// then it takes tasks that are left of the other shares. fn must not throw.
// While other threads are in this function, a call uses as many threads as they leave of the cores (share_cores), and
// the caller runs all its tasks alone if they leave one or none; so it does if called from inside a task. In a child
// process after fork new workers are started on first use. A process keeps at most 63 workers, or 4 per core minus 1 if
// that is more, whatever `threads` is. A thread that waits longer than some microseconds gives up its core.
void parallel_for(std::int64_t n_tasks, int threads, Task fn, const void* context) noexcept;

// The same for any callable fn(i), which may throw: once all tasks are done or have failed, the first exception is
// thrown here.
template <typename Fn>
void parallel(std::int64_t n_tasks, int threads, const Fn& fn) {
  struct Run {
    const Fn* fn;
    mutable std::atomic<bool> failed{false};
    mutable std::exception_ptr fault{};
  } run{&fn};
  parallel_for(
      n_tasks, threads,
      [](const void* context, std::int64_t i) {
        const Run& run = *static_cast<const Run*>(context);
        try {
          (*run.fn)(i);
        } catch (...) {
          if (!run.failed.exchange(true)) run.fault = std::current_exception();
        }
      },
      &run);
  if (run.fault) std::rethrow_exception(run.fault);
}

// Sets the number of cores that calls at once may use together; at first all cores of the machine.
void share_cores(int n);

}  // namespace sparsebert
