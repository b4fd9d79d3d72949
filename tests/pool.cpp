// Uses the pool of worker threads from several callers at once, for ThreadSanitizer. Prints how many tasks ran; exits
// with 1 if one did not run exactly once.
#include "../csrc/cpu/threads.h"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../csrc/cpu/scratch.h"

namespace {

std::atomic<long> ran{0};

// Every task writes to its own place without an atomic: two threads at one place, or a result that is read before its
// task has ended, is a race.
bool each_runs_once(std::int64_t tasks, int threads) {
  std::vector<int> times(static_cast<std::size_t>(tasks), 0);
  sparsebert::parallel(tasks, threads, [&](std::int64_t i) {
    auto* memory = static_cast<float*>(sparsebert::scratch(4096, sparsebert::Scratch::task));
    memory[i % 1024] = 1.0f;
    ++times[static_cast<std::size_t>(i)];
    if (i % 7 == 0) sparsebert::parallel(3, threads, [](std::int64_t) { ++ran; });  // from inside a task: runs here
    ++ran;
  });
  for (const int count : times) {
    if (count != 1) return false;
  }
  return true;
}

bool a_failure_is_thrown_once_all_are_done(int threads) {
  std::atomic<int> done{0};
  try {
    sparsebert::parallel(64, threads, [&](std::int64_t i) {
      ++done;
      if (i % 16 == 3) throw std::runtime_error("task");
    });
  } catch (const std::runtime_error&) {
    return done == 64;
  }
  return false;
}

}  // namespace

int main() {
  std::atomic<bool> right{true};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&right, caller] {
      for (int round = 0; round < 200; ++round) {
        const int threads = 1 + (round + caller) % 5;
        if (!each_runs_once(1 + round % 37, threads) || !a_failure_is_thrown_once_all_are_done(threads)) right = false;
        if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // the workers fall asleep
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%ld tasks\n", ran.load());
  return right ? 0 : 1;
}
