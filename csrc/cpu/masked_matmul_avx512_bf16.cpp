#if defined(__x86_64__)
#include <immintrin.h>

#include "masked_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#define SPARSEBERT_TILES 1
namespace sparsebert::masked_matmul_avx512_bf16 {
constexpr int lanes = 16;
constexpr int tile_rows = 8;
constexpr int tile_vectors = 3;
constexpr int values_a_word = 2;
constexpr int word_group = 1;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "tile.inl"
#include "masked_matmul.inl"

// Sparse weights are multiplied as floats.
const MaskedMatmulKernel kernel = {values_a_word, word_group, tile_rows, tile_columns, 0.12,    pack,
                                   multiply,      0,          nullptr,   nullptr,      count_kept};
}  // namespace sparsebert::masked_matmul_avx512_bf16
#pragma GCC pop_options
#endif
