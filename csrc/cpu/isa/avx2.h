// AVX2 with fused multiply-adds: vectors of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SPARSEBERT_MADD(a, b) _mm256_madd_epi16(a, b)
namespace sparsebert::avx2 {
constexpr int lanes = 8;
constexpr int registers = 16;
typedef __m256i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx2
#undef SPARSEBERT_MADD
#pragma GCC pop_options
#endif
