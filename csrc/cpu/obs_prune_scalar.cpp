// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "obs_prune.h"

namespace sparsebert::obs_prune_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int panel_vectors = 2;
#include "vector.inl"
#include "obs_prune.inl"
}  // namespace sparsebert::obs_prune_scalar
