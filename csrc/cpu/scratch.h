// Working memory: kept from call to call, one buffer a thread and use.
#pragma once

#include <cstddef>

namespace sparsebert {

// The thread that calls an operation holds one buffer for the whole call while it also runs tasks of it.
enum class Scratch : int { call, task };

// At least `bytes` bytes, aligned to 64, valid until this thread's next request for the same use. Contents are
// undefined, and NaN (as float and as double) when poisoned. Throws std::bad_alloc.
void* scratch(std::size_t bytes, Scratch use = Scratch::call);

// Frees what this thread holds beyond `kept_bytes` a use. What prunes needs large buffers once, so it does that when it is
// done; workers do it before they sleep. What trains or classifies is called again and again and does not.
constexpr std::size_t kept_bytes = 8 << 20;
void trim_scratch();

// For tests: fill working memory with NaN before every use, so that reading what was not written shows.
void poison_scratch(bool on);
bool scratch_is_poisoned();

}  // namespace sparsebert
