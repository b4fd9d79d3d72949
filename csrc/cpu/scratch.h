// Working memory: kept from call to call, one buffer a thread and use.
#pragma once

#include <cstddef>

namespace sparsebert {

// The thread that calls an operation holds one buffer for the whole call while it also runs tasks of it.
enum class Scratch : int { call, task };

// At least `bytes` bytes, aligned to 64, valid until this thread's next request for the same use. Contents are
// undefined, and NaN (as float and as double) when poisoned. Throws std::bad_alloc.
void* scratch(std::size_t bytes, Scratch use = Scratch::call);

// For tests: fill working memory with NaN before every use, so that reading what was not written shows.
void poison_scratch(bool on);
bool scratch_is_poisoned();

}  // namespace sparsebert
