#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "scratch.h"

namespace sparsebert {
namespace {

// How long an idle worker, or a caller whose last tasks are running elsewhere, looks before it gives up its core. Long
// enough to bridge the gap between two calls in a row, short beside a scheduler tick.
constexpr std::chrono::microseconds spin_time{30};
// How long a caller then lets others run in between before it sleeps: a task takes less, unless its worker was put aside
// for another process.
constexpr std::chrono::microseconds yield_time{1000};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// True as soon as ready() is, false when spin_time has passed.
template <typename Ready>
bool spin_until(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + spin_time;
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      relax();
    }
    if (std::chrono::steady_clock::now() > deadline) return false;
  }
}

// The tasks that one thread begins with.
struct alignas(64) Share {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
};

struct Worker {
  Share share;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> asleep{false};
  std::thread::native_handle_type thread{};
  int shunned_cpu = -1;  // the core it was last told to keep off
};

// Workers that a process keeps at most: more than one a core only share it.
int most_workers() {
  static const int most = std::max(64, 4 * static_cast<int>(std::thread::hardware_concurrency())) - 1;
  return most;
}

// Keeps a worker off the core its caller runs on. Left alone, Linux may wake it right there, where it waits behind the
// caller until the next load balancing, some milliseconds; a job is over by then. It stays free among the other cores.
void keep_off([[maybe_unused]] Worker& worker, [[maybe_unused]] int cpu) {
#if defined(__linux__)
  if (cpu < 0 || worker.shunned_cpu == cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  if (CPU_COUNT(&allowed) < 2) return;
  CPU_CLR(cpu, &allowed);
  if (pthread_setaffinity_np(worker.thread, sizeof allowed, &allowed) == 0) worker.shunned_cpu = cpu;
#endif
}

// Lets a worker run on every core that the process may use.
void let_anywhere([[maybe_unused]] Worker& worker) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (worker.shunned_cpu < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  if (pthread_setaffinity_np(worker.thread, sizeof allowed, &allowed) == 0) worker.shunned_cpu = -1;
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

class Pool {
 public:
  // False, with nothing done, when another job is running.
  bool run(std::int64_t n_tasks, int threads, Task fn, const void* context) {
    if (busy_.exchange(true)) return false;
    const int wanted = static_cast<int>(std::min<std::int64_t>(threads, n_tasks)) - 1;
    helpers_ = std::min(wanted, grow(wanted));
    fn_ = fn;
    context_ = context;
    // Neighbouring tasks, which often touch the same data, go to one thread, and those of a like place among the tasks
    // of several jobs in a row to the same one: what it wrote is still in its own cache. On some processors a line of
    // another core's costs as much as one from memory.
    for (int i = 0; i <= helpers_; ++i) {
      share(i).next.store(n_tasks * i / (helpers_ + 1), std::memory_order_relaxed);
      share(i).end = n_tasks * (i + 1) / (helpers_ + 1);
    }
    open_.store(true);
    generation_.fetch_add(1);
    const int cpu = current_cpu();
    for (int i = 0; i < helpers_; ++i) {
      keep_off(*workers_[i], cpu);
      rouse(*workers_[i]);
    }
    work(0);
    // A worker that arrives from here on finds the job closed; those inside are waited for, as they use the context.
    open_.store(false);
    wait_for_workers();
    busy_.store(false);
    return true;
  }

 private:
  // The share of the thread `own`, 0 being the caller, then what others have left of theirs.
  void work(int own) {
    for (int i = 0; i <= helpers_; ++i) {
      Share& from = share((own + i) % (helpers_ + 1));
      for (;;) {
        const std::int64_t task = from.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= from.end) break;
        fn_(context_, task);
      }
    }
  }

  void wait_for_workers() {
    const auto empty = [this] { return inside_.load() == 0; };
    const auto deadline = std::chrono::steady_clock::now() + yield_time;
    while (!spin_until(empty)) {
      if (std::chrono::steady_clock::now() < deadline) {
        std::this_thread::yield();
        continue;
      }
      // The core that is given up here is one that a worker may need: other processes have the rest.
      for (int i = 0; i < helpers_; ++i) let_anywhere(*workers_[i]);
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      left_.wait(lock, empty);
      waiting_.store(false);
    }
  }

  // A worker counts down, then looks whether the caller sleeps; the caller says so, then counts: one of them sees.
  void leave() {
    if (inside_.fetch_sub(1) != 1 || !waiting_.load()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    left_.notify_one();
  }

  Share& share(int i) { return i == 0 ? share_ : workers_[static_cast<std::size_t>(i - 1)]->share; }

  static void rouse(Worker& worker) {
    if (!worker.asleep.load()) return;
    const std::lock_guard<std::mutex> lock(worker.mutex);
    worker.wake.notify_one();
  }

  void sleep_until_changed(Worker& worker, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(worker.mutex);
    worker.asleep.store(true);
    worker.wake.wait(lock, [&] { return generation_.load() != seen; });
    worker.asleep.store(false);
  }

  void live(Worker& worker, int index) {
    std::uint64_t seen = 0;
    for (;;) {
      if (!spin_until([&] { return generation_.load() != seen; })) {
        trim_scratch();
        sleep_until_changed(worker, seen);
      }
      seen = generation_.load();
      // We enter, then look; the caller closes, then counts. Both orders are sequentially consistent, so either the
      // caller sees us inside or we see the job closed.
      inside_.fetch_add(1);
      if (open_.load() && index < helpers_) work(index + 1);
      leave();
    }
  }

  // Tries to have `wanted` workers and returns how many there are. A process at its limit of threads or memory gets
  // fewer, and the same results.
  int grow(int wanted) {
    wanted = std::min(wanted, most_workers());
    while (static_cast<int>(workers_.size()) < wanted && start_worker()) {
    }
    return static_cast<int>(workers_.size());
  }

  bool start_worker() {
    // Signals belong to the threads of the program, so a worker starts with them blocked, but for those that its own
    // faults raise: blocked, they would end the process before a handler could say anything.
    sigset_t all, before;
    sigfillset(&all);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS}) sigdelset(&all, own);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = false;
    try {
      const int index = static_cast<int>(workers_.size());
      workers_.reserve(workers_.size() + 1);
      auto worker = std::make_unique<Worker>();
      std::thread thread([this, index, &worker = *worker] { live(worker, index); });
      worker->thread = thread.native_handle();
      thread.detach();
      workers_.push_back(std::move(worker));
      started = true;
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  std::atomic<bool> busy_{false};               // a caller is in run(); it alone touches what is not atomic
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<std::uint64_t> generation_{0};    // counts jobs; a change wakes the workers
  std::atomic<bool> open_{false};               // the fields below hold a job that may be joined
  std::atomic<int> inside_{0};                  // workers between entering and leaving
  std::mutex mutex_;                            // of the caller that sleeps until they are none
  std::condition_variable left_;
  std::atomic<bool> waiting_{false};
  Share share_;                                 // the caller's; a worker has its own
  Task fn_ = nullptr;
  const void* context_ = nullptr;
  int helpers_ = 0;
};

// Never destroyed: its workers live until the process ends.
std::atomic<Pool*> current_pool{nullptr};

// The workers of the parent do not exist in the child, and its locks may be held by threads that are gone.
void forget_pool() { current_pool.store(nullptr); }

Pool* get_pool() {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
  Pool* pool = current_pool.load();
  if (pool != nullptr || !registered) return pool;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || current_pool.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

}  // namespace

void parallel_for(std::int64_t n_tasks, int threads, Task fn, const void* context) noexcept {
  Pool* pool = threads > 1 && n_tasks > 1 ? get_pool() : nullptr;
  if (pool != nullptr && pool->run(n_tasks, threads, fn, context)) return;
  for (std::int64_t i = 0; i < n_tasks; ++i) fn(context, i);
}

}  // namespace sparsebert
