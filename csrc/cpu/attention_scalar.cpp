// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "attention.h"

namespace sparsebert::attention_scalar {
constexpr int lanes = 4;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"
#include "attention.inl"

const AttentionKernel kernel = {floats, attend, attend_backward};
}  // namespace sparsebert::attention_scalar
