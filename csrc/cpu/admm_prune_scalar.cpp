// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has.
#include "admm_prune.h"

namespace sparsebert::admm_prune_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_width = 2;
#include "vector.inl"
#include "admm_prune.inl"
}  // namespace sparsebert::admm_prune_scalar
