// Chooses the kernel of attention beside linears in int8.
#include "sparse_encoder.h"

#define SPARSEBERT_KERNEL "../sparse_encoder_int8.inl"
#include "isa/int8.h"

namespace sparsebert {

const AttentionKernel<float>& int8_attention(Isa isa, int lanes) {
  const bool few = lanes < 16;
  return int8_kernel_for(isa, few);
}

}  // namespace sparsebert
