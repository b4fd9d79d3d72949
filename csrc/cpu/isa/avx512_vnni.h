// AVX-512 with dot products of bytes; and the same with vectors of half the width, for few tokens.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,popcnt")
#define SPARSEBERT_DOT(sum, bytes, weights) _mm512_dpbusd_epi32(sum, bytes, weights)
#define SPARSEBERT_DOT_PAIRS(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
namespace sparsebert::avx512_vnni {
constexpr int lanes = 16;
constexpr int registers = 32;
typedef __m512i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx512_vnni
#undef SPARSEBERT_DOT
#undef SPARSEBERT_DOT_PAIRS
#define SPARSEBERT_DOT(sum, bytes, weights) _mm256_dpbusd_epi32(sum, bytes, weights)
#define SPARSEBERT_DOT_PAIRS(sum, a, b) _mm256_dpwssd_epi32(sum, a, b)
namespace sparsebert::avx512_vnni_half {
constexpr int lanes = 8;
constexpr int registers = 32;
typedef __m256i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx512_vnni_half
#undef SPARSEBERT_DOT
#undef SPARSEBERT_DOT_PAIRS
#pragma GCC pop_options
#endif
