#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <array>
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

// How long an idle worker, or a caller whose last tasks are running on other threads, spins before it gives up its
// core. Long enough to bridge the gap between two consecutive calls, short compared with a scheduler tick.
constexpr std::chrono::microseconds spin_time{30};
// How long a caller then yields between spins before it sleeps: a task takes less, unless its worker was preempted by
// another process.
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

// Max number of workers that a process keeps: more than one per core only share it.
int most_workers() {
  static const int most = std::max(64, 4 * static_cast<int>(std::thread::hardware_concurrency())) - 1;
  return most;
}

// Keeps a worker off the core that its caller runs on. Otherwise Linux may wake it on that core, where it waits behind
// the caller until the next load balancing, some milliseconds later; a job is over by then. The worker may use all
// other cores.
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

// Workers in all pools.
std::atomic<int> worker_count{0};

// Whether this thread runs a task.
thread_local bool in_task = false;

// The workers of one caller at a time.
class Pool {
 public:
  // Returns false and does nothing if it has a caller.
  bool run(std::int64_t n_tasks, int threads, Task fn, const void* context) {
    if (busy_.exchange(true)) return false;
    const int wanted = static_cast<int>(std::min<std::int64_t>(threads, n_tasks)) - 1;
    helpers_ = std::min(wanted, grow(wanted));
    fn_ = fn;
    context_ = context;
    // Neighbouring tasks often touch the same data, so they go to one thread. In consecutive jobs, tasks at a similar
    // place go to the same thread, because the data that it wrote is still in its own cache. On some processors a line
    // from another core's cache costs as much as one from memory.
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
    // A worker that arrives after this finds the job closed; workers inside are waited for, as they use the context.
    open_.store(false);
    wait_for_workers();
    busy_.store(false);
    return true;
  }

 private:
  // Runs the share of the thread `own` (0: the caller), then tasks that are left of the others' shares.
  void work(int own) {
    in_task = true;
    for (int i = 0; i <= helpers_; ++i) {
      Share& from = share((own + i) % (helpers_ + 1));
      for (;;) {
        const std::int64_t task = from.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= from.end) break;
        fn_(context_, task);
      }
    }
    in_task = false;
  }

  void wait_for_workers() {
    const auto empty = [this] { return inside_.load() == 0; };
    const auto deadline = std::chrono::steady_clock::now() + yield_time;
    while (!spin_until(empty)) {
      if (std::chrono::steady_clock::now() < deadline) {
        std::this_thread::yield();
        continue;
      }
      // The caller gives up its core here; a worker may need it, as other processes may use the other cores.
      for (int i = 0; i < helpers_; ++i) let_anywhere(*workers_[i]);
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      left_.wait(lock, empty);
      waiting_.store(false);
    }
  }

  // A worker lowers `inside_`, then reads `waiting_`; the caller sets `waiting_`, then reads `inside_`. So at least one
  // of them sees the other's change.
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
      // The worker enters, then reads `open_`; the caller closes the job, then counts the workers inside. Both orders
      // are sequentially consistent, so either the caller sees the worker inside, or the worker sees the job closed.
      inside_.fetch_add(1);
      if (open_.load() && index < helpers_) work(index + 1);
      leave();
    }
  }

  // Starts workers until there are `wanted`, and returns how many there are. A process at its limit of threads or
  // memory gets fewer workers, and the same results.
  int grow(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
      if (worker_count.fetch_add(1) < most_workers() && start_worker()) continue;
      worker_count.fetch_sub(1);
      break;
    }
    return static_cast<int>(workers_.size());
  }

  bool start_worker() {
    // Signals are for the program's own threads, so a worker starts with signals blocked, except those that its own
    // faults raise: if these were blocked, a fault would end the process before a handler could report it.
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

  std::atomic<bool> busy_{false};               // a caller is in run(); only it writes fields that are not atomic
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<std::uint64_t> generation_{0};    // counts jobs; a change wakes the workers
  std::atomic<bool> open_{false};               // workers may join the job that the fields below hold
  std::atomic<int> inside_{0};                  // number of workers between entering and leaving
  std::mutex mutex_;                            // for the caller that sleeps until none is inside
  std::condition_variable left_;
  std::atomic<bool> waiting_{false};
  Share share_;                                 // the caller's; a worker has its own
  Task fn_ = nullptr;
  const void* context_ = nullptr;
  int helpers_ = 0;
};

// Cores that callers at once may use together, beyond what the first of them asks for.
std::atomic<int> cores{static_cast<int>(std::thread::hardware_concurrency())};

// The pools of callers at once.
class Pools {
 public:
  // Returns false and does nothing if no core or no pool is left.
  bool run(std::int64_t n_tasks, int threads, Task fn, const void* context) {
    threads = static_cast<int>(std::min<std::int64_t>(threads, n_tasks));
    const int others = running_.fetch_add(threads);
    const int left = others == 0 ? threads : std::min(threads, cores.load() - others);
    const bool done = left > 1 && std::any_of(pools_.begin(), pools_.end(), [&](Pool& pool) {
      return pool.run(n_tasks, left, fn, context);
    });
    running_.fetch_sub(threads);
    return done;
  }

 private:
  std::array<Pool, 16> pools_;
  std::atomic<int> running_{0};  // threads that the callers have asked for
};

// Never destroyed: its workers live until the process ends.
std::atomic<Pools*> current_pools{nullptr};

// The parent's workers do not exist in the child, and its locks may be held by threads that no longer exist.
void forget_pools() {
  current_pools.store(nullptr);
  worker_count.store(0);
}

Pools* get_pools() {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_pools) == 0;
  Pools* pools = current_pools.load();
  if (pools != nullptr || !registered) return pools;
  Pools* fresh = new (std::nothrow) Pools;
  if (fresh == nullptr || current_pools.compare_exchange_strong(pools, fresh)) return fresh;
  delete fresh;
  return pools;
}

}  // namespace

void share_cores(int n) { cores.store(n); }

void parallel_for(std::int64_t n_tasks, int threads, Task fn, const void* context) noexcept {
  Pools* pools = threads > 1 && n_tasks > 1 && !in_task ? get_pools() : nullptr;
  if (pools != nullptr && pools->run(n_tasks, threads, fn, context)) return;
  for (std::int64_t i = 0; i < n_tasks; ++i) fn(context, i);
}

}  // namespace sparsebert
