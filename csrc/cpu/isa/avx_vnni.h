// AVX2 with dot products of bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define SPARSEBERT_DOT(sum, bytes, weights) _mm256_dpbusd_avx_epi32(sum, bytes, weights)
#define SPARSEBERT_DOT_PAIRS(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
namespace sparsebert::avx_vnni {
constexpr int lanes = 8;
constexpr int registers = 16;
typedef __m256i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx_vnni
#undef SPARSEBERT_DOT
#undef SPARSEBERT_DOT_PAIRS
#pragma GCC pop_options
#endif
