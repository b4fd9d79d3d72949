// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "masked_matmul.h"

namespace sparsebert::masked_matmul_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;
constexpr int values_a_word = 1;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "masked_matmul.inl"
#include "masked_matmul_sparse.inl"

const MaskedMatmulKernel kernel = {values_a_word, tile_rows,     tile_columns,   pack,           multiply,
                                   panel_tokens,  sparse_floats, multiply_sparse, count_kept};
}  // namespace sparsebert::masked_matmul_scalar
