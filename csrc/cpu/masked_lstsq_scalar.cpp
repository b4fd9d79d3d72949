// The portable kernel: vectors of two doubles, which the compiler lowers to whatever its baseline has.
#include "masked_lstsq.h"

namespace sparsebert::masked_lstsq_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_width = 2;
#include "vector.inl"
#include "masked_lstsq.inl"
}  // namespace sparsebert::masked_lstsq_scalar
