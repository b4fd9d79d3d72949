#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>

namespace sparsebert {
namespace {

constexpr std::align_val_t alignment{64};  // a cache line, and the widest vector

struct Free {
  void operator()(float* p) const { ::operator delete[](p, alignment); }
};

struct Buffer {
  std::unique_ptr<float, Free> data;
  std::size_t size = 0;  // floats
};

std::atomic<bool> poisoned{false};

}  // namespace

float* scratch(std::size_t count) {
  thread_local Buffer buffer;
  if (buffer.size < count) {
    buffer.data.reset();
    buffer.size = 0;
    buffer.data.reset(static_cast<float*>(::operator new[](count * sizeof(float), alignment)));
    buffer.size = count;
  }
  if (scratch_is_poisoned()) {
    std::fill_n(buffer.data.get(), buffer.size, std::numeric_limits<float>::quiet_NaN());
  }
  return buffer.data.get();
}

void poison_scratch(bool on) { poisoned.store(on); }
bool scratch_is_poisoned() { return poisoned.load(std::memory_order_relaxed); }

}  // namespace sparsebert
