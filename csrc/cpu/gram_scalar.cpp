// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "gram.h"

namespace sparsebert::gram_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;
#include "vector.inl"
#include "gram.inl"
}  // namespace sparsebert::gram_scalar
