// Chooses the kernel of linears in int8, and the panels they share with the float32 kernels.
#include "sparse_matmul.h"

#define SPARSEBERT_KERNEL "../sparse_matmul_int8.inl"
#include "isa/int8.h"

namespace sparsebert {

PanelShape panel_shape(const Int8Kernel& kernel, std::int64_t tokens) {
  const std::int64_t width = std::int64_t{4} * kernel.lanes;
  return {tokens, ceil_div(tokens, width), 4, kernel.lanes};
}

const Int8Kernel& int8_kernel(Isa isa, std::int64_t tokens, const Int8Sizes& sizes) {
  // Weights are read and spread anew for each panel, which costs as much as some 16 tokens.
  const auto cost = [tokens](const Int8Kernel& kernel) {
    const PanelShape shape = panel_shape(kernel, tokens);
    return shape.panels * (shape.width() + 16);
  };
  const Int8Kernel& wide = int8_kernel_for(isa, false);
  const Int8Kernel& half = int8_kernel_for(isa, true);
  if (isa == Isa::amx && 2 * sizes.tall_entries > sizes.entries) {
    // Measured: a panel in tiles costs less than one in half vectors from some 140 kept columns a row on, and always
    // less than two.
    return tokens <= panel_shape(half, tokens).width() && sizes.entries < 140 * sizes.rows ? half : wide;
  }
  return cost(half) < cost(wide) ? half : wide;
}

std::int64_t count_clipped(const PanelShape& shape, const std::uint8_t* bytes, std::int64_t n) {
  const std::int64_t width = shape.width();
  std::int64_t count = 0;
  for (std::int64_t t = 0; t < shape.tokens; ++t) {
    const std::int64_t lane = t % width, place = lane / 4 % (width / 16) * 16 + lane / (width / 4) * 4 + lane % 4;
    const std::uint8_t* from = bytes + t / width * n * width + place;  // see epilogue.inl
    for (std::int64_t k = 0; k < n; ++k) count += from[k * width] == 0 || from[k * width] == 255;
  }
  return count;
}

Isa floats_beside(const Int8Kernel& kernel) {
  return kernel.lanes == 16 ? Isa::avx512 : kernel.lanes == 8 ? Isa::avx2 : Isa::scalar;
}

}  // namespace sparsebert
