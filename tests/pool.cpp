// Uses the pool of worker threads from several callers at once, for ThreadSanitizer. Prints how many tasks ran; exits
// with 1 if one did not run exactly once, with 2 or 3 if calls at once do not share the cores.
#include "../csrc/cpu/threads.h"

#include <atomic>
#include <chrono>
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

// Whether the two tasks of a call run at the same time while another call is running.
bool two_calls_have_threads_of_their_own() {
  std::atomic<bool> over{false};
  std::atomic<int> begun{0}, met{0};
  std::thread other([&] {
    sparsebert::parallel(2, 2, [&](std::int64_t) {
      ++begun;
      while (!over) std::this_thread::yield();
    });
  });
  while (begun < 2) std::this_thread::yield();
  sparsebert::parallel(2, 2, [&](std::int64_t) {
    ++met;
    for (int i = 0; i < 2000 && met < 2; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (met == 2) ++ran;
  });
  over = true;
  other.join();
  return ran.exchange(0) == 2;
}

// Whether a call takes only the cores that others leave: none here.
bool a_call_beside_others_is_alone_without_cores() {
  sparsebert::share_cores(2);
  std::atomic<bool> over{false}, alone{true};
  std::atomic<int> begun{0};
  std::thread other([&] {
    sparsebert::parallel(2, 2, [&](std::int64_t) {
      ++begun;
      while (!over) std::this_thread::yield();
    });
  });
  while (begun < 2) std::this_thread::yield();
  const auto caller = std::this_thread::get_id();
  sparsebert::parallel(8, 2, [&](std::int64_t) {
    if (std::this_thread::get_id() != caller) alone = false;
  });
  over = true;
  other.join();
  return alone;
}

}  // namespace

int main() {
  sparsebert::share_cores(8);
  if (!two_calls_have_threads_of_their_own()) return 2;
  if (!a_call_beside_others_is_alone_without_cores()) return 3;
  sparsebert::share_cores(8);
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
