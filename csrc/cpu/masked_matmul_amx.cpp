#if defined(__x86_64__)
#include <immintrin.h>

#include "masked_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#define SPARSEBERT_TILES 2
#define SPARSEBERT_MATRICES 1
namespace sparsebert::masked_matmul_amx {
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

// Sparse weights are multiplied as if dense, until measurements show from which sparsity on this stops paying.
const MaskedMatmulKernel kernel = {values_a_word, word_group, tile_rows, tile_columns, 0.0,     pack,
                                   multiply,      0,          nullptr,   nullptr,      count_kept};
}  // namespace sparsebert::masked_matmul_amx
#pragma GCC pop_options
#endif
