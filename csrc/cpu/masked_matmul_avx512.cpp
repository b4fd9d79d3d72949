#if defined(__x86_64__)
#include <immintrin.h>

#include "masked_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")
#define SPARSEBERT_COMPRESS 1
namespace sparsebert::masked_matmul_avx512 {
constexpr int lanes = 16;
constexpr int tile_rows = 8;
constexpr int tile_vectors = 3;
constexpr int values_a_word = 1;
constexpr int word_group = 1;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "masked_matmul.inl"
#include "masked_matmul_sparse.inl"

const MaskedMatmulKernel kernel = {values_a_word, word_group,   tile_rows,     tile_columns,    0.35,      pack,
                                   multiply,      panel_tokens, sparse_floats, multiply_sparse, count_kept};
}  // namespace sparsebert::masked_matmul_avx512
#pragma GCC pop_options
#endif
