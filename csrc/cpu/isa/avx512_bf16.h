// AVX-512 with dot products of bf16.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,avx2,fma,popcnt")
#define SPARSEBERT_TILES 1
namespace sparsebert::avx512_bf16 {
constexpr int lanes = 16;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx512_bf16
#undef SPARSEBERT_TILES
#pragma GCC pop_options
#endif
