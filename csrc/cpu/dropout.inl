// The arithmetic of dropout, written once for every vector width. Compiled by isa/floats.h.

#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"

namespace {

// Computes one whole block, whose index is `block`.
template <typename T>
inline void drop_block(const T* x, const Dropout& dropout, std::int64_t block, T* y) {
  constexpr int counters = 16;
  const float scale = dropout.scale();
  const auto high = static_cast<std::uint32_t>(block >> 28);
  for (int c = 0; c < counters; c += lanes) {
    const Draws draws = draw(dropout.seed, static_cast<std::uint32_t>(block * counters) + c, high, 0);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const f32 kept = load_value(x + i * counters + c) * scale;
      store_value(y + i * counters + c, draws.at_least(i, dropout.limit) ? kept : f32{});
    }
  }
}

template <typename T>
void drop_blocks(const T* x, std::int64_t n, const Dropout& dropout, std::int64_t first, std::int64_t last, T* y) {
  for (; first < last; ++first) {
    const std::int64_t at = first * dropout_block;
    if (at + dropout_block <= n) {
      drop_block(x + at, dropout, first, y + at);
    } else {
      T values[dropout_block] = {};
      copy(x + at, values, n - at);
      drop_block(values, dropout, first, values);
      copy(values, y + at, n - at);
    }
  }
}

void drop(const void* x, std::int64_t n, bool bf16, const Dropout& dropout, std::int64_t first, std::int64_t last,
          void* y) {
  if (bf16) {
    drop_blocks(static_cast<const Bf16*>(x), n, dropout, first, last, static_cast<Bf16*>(y));
  } else {
    drop_blocks(static_cast<const float*>(x), n, dropout, first, last, static_cast<float*>(y));
  }
}

}  // namespace

const DropoutKernel kernel = {drop};
