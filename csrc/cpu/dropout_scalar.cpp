// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "dropout.h"

namespace sparsebert::dropout_scalar {
constexpr int lanes = 4;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"
#include "dropout.inl"

const DropoutKernel kernel = {drop};
}  // namespace sparsebert::dropout_scalar
