// Working memory of a call: one buffer a calling thread, kept from call to call.
#pragma once

#include <cstddef>

namespace sparsebert {

// At least `count` floats, aligned to 64 bytes, valid until this thread's next call. Contents are undefined, and NaN
// when poisoned. Throws std::bad_alloc.
float* scratch(std::size_t count);

// For tests: fill working memory with NaN before every use, so that reading what was not written shows.
void poison_scratch(bool on);
bool scratch_is_poisoned();

}  // namespace sparsebert
