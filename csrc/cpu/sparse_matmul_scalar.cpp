// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "sparse_matmul.h"

namespace sparsebert::sparse_matmul_scalar {
constexpr int lanes = 4;
constexpr int widest_rows = 4;
constexpr int widest_groups = 4;
#include "vector.inl"
#include "panel.inl"
#include "sparse_matmul.inl"
}  // namespace sparsebert::sparse_matmul_scalar

// bf16 tiles in plain C++, for reference.
#define SPARSEBERT_TILES 0
namespace sparsebert::sparse_matmul_scalar_tiled {
constexpr int lanes = 16;
#include "vector.inl"
#include "panel.inl"
#include "tile.inl"
#include "sparse_matmul_tiled.inl"
}  // namespace sparsebert::sparse_matmul_scalar_tiled
