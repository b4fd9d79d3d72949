// AVX-512 as of Skylake: vectors of 16 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")
#define SPARSEBERT_COMPRESS 1
#define SPARSEBERT_MADD(a, b) _mm512_madd_epi16(a, b)
namespace sparsebert::avx512 {
constexpr int lanes = 16;
constexpr int registers = 32;
typedef __m512i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx512
#undef SPARSEBERT_MADD
#undef SPARSEBERT_COMPRESS
#pragma GCC pop_options
#endif
