// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "topk_mask.h"

namespace sparsebert::topk_mask_scalar {
constexpr int lanes = 4;
#include "vector.inl"
#include "topk_mask.inl"
}  // namespace sparsebert::topk_mask_scalar
