#if defined(__x86_64__)
#include <immintrin.h>

#include "sparse_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,avx2,fma,popcnt")
#define SPARSEBERT_TILES 1
namespace sparsebert::sparse_matmul_avx512_bf16 {
constexpr int lanes = 16;
#include "vector.inl"
#include "panel.inl"
#include "tile.inl"
#include "sparse_matmul_tiled.inl"
}  // namespace sparsebert::sparse_matmul_avx512_bf16
#pragma GCC pop_options
#endif
