// The portable kernel: vectors of four floats, which the compiler lowers to whatever its baseline has (SSE2, NEON, or
// single floats).
#include "masked_matmul.h"

namespace sparsebert::masked_matmul_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;
constexpr int values_a_word = 1;
constexpr int word_group = 1;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "masked_matmul.inl"
#include "masked_matmul_sparse.inl"

const MaskedMatmulKernel kernel = {values_a_word, word_group,   tile_rows,     tile_columns,    0.35,      pack,
                                   multiply,      panel_tokens, sparse_floats, multiply_sparse, count_kept};
}  // namespace sparsebert::masked_matmul_scalar

// bf16 tiles in plain C++, for reference.
#define SPARSEBERT_TILES 0
#define SPARSEBERT_MATRICES 1
namespace sparsebert::masked_matmul_scalar_tiled {
constexpr int lanes = 16;
constexpr int tile_rows = 32;
constexpr int tile_vectors = 2;
constexpr int values_a_word = 2;
constexpr int word_group = 16;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "tile.inl"
#include "masked_matmul.inl"

const MaskedMatmulKernel kernel = {values_a_word, word_group, tile_rows, tile_columns, 0.0,     pack,
                                   multiply,      0,          nullptr,   nullptr,      count_kept};
}  // namespace sparsebert::masked_matmul_scalar_tiled
