// Chooses the kernel of linears in int8, and the panels they share with the float32 kernels.
#include "sparse_matmul.h"

#define SPARSEBERT_KERNEL "../sparse_matmul_int8.inl"
#include "isa/int8.h"

namespace sparsebert {

PanelShape panel_shape(const Int8Kernel& kernel, std::int64_t tokens) {
  const std::int64_t width = std::int64_t{4} * kernel.lanes;
  return {tokens, (tokens + width - 1) / width, 4, kernel.lanes};
}

const Int8Kernel& int8_kernel(Isa isa, std::int64_t tokens) {
  // Weights are read and spread anew for each panel, which costs as much as some 16 tokens.
  const auto cost = [tokens](const Int8Kernel& kernel) {
    const PanelShape shape = panel_shape(kernel, tokens);
    return shape.panels * (shape.width() + 16);
  };
  const Int8Kernel& wide = int8_kernel_for(isa, false);
  const Int8Kernel& half = int8_kernel_for(isa, true);
  return cost(half) < cost(wide) ? half : wide;
}

Isa floats_beside(const Int8Kernel& kernel) {
  return kernel.lanes == 16 ? Isa::avx512 : kernel.lanes == 8 ? Isa::avx2 : Isa::scalar;
}

}  // namespace sparsebert
