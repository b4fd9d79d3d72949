#include "scratch.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>

namespace sparsebert {
namespace {

constexpr std::align_val_t alignment{64};  // a cache line, and the widest vector

struct Free {
  void operator()(void* p) const { ::operator delete[](p, alignment); }
};

struct Buffer {
  std::unique_ptr<void, Free> data;
  std::size_t bytes = 0;
};

std::atomic<bool> poisoned{false};

Buffer& buffer_of(int use) {
  thread_local Buffer buffers[2];
  return buffers[use];
}

}  // namespace

void* scratch(std::size_t bytes, Scratch use) {
  Buffer& buffer = buffer_of(static_cast<int>(use));
  if (buffer.bytes < bytes) {
    buffer.data.reset();
    buffer.bytes = 0;
    buffer.data.reset(::operator new[](bytes, alignment));
    buffer.bytes = bytes;
  }
  // All bits set is a NaN of every width.
  if (scratch_is_poisoned()) std::memset(buffer.data.get(), 0xff, buffer.bytes);
  return buffer.data.get();
}

void trim_scratch() {
  for (int use = 0; use < 2; ++use) {
    if (buffer_of(use).bytes > kept_bytes) buffer_of(use) = Buffer{};
  }
}

void poison_scratch(bool on) { poisoned.store(on); }
bool scratch_is_poisoned() { return poisoned.load(std::memory_order_relaxed); }

}  // namespace sparsebert
