// Working memory, kept from call to call: one buffer per thread and use.
#pragma once

#include <cstddef>

namespace sparsebert {

// A thread that calls an operation holds one buffer (`call`) for the whole call, and needs a second one (`task`) when
// it runs tasks of the operation.
enum class Scratch : int { call, task };

// At least `bytes` bytes, aligned to 64, valid until this thread's next request for the same use. The contents are
// undefined; if poisoned, they are NaN (as float and as double). Throws std::bad_alloc.
void* scratch(std::size_t bytes, Scratch use = Scratch::call);

// Frees this thread's buffers that are larger than `kept_bytes`. Pruning operations need large buffers only once, so
// they call this when they are done; workers call it before they sleep. Operations for training and classifying are
// called again and again and do not call it. Smaller buffers are kept: to get 19 MB anew and touch them costs 10 ms, a
// third of a sweep of 3072 x 768.
constexpr std::size_t kept_bytes = std::size_t{64} << 20;
void trim_scratch();

// For tests: fills working memory with NaN before every use, so that a read of unwritten memory shows.
void poison_scratch(bool on);
bool scratch_is_poisoned();

}  // namespace sparsebert
