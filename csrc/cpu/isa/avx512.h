// AVX-512 as of Skylake: vectors of 16 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")
#define SPARSEBERT_COMPRESS 1
namespace sparsebert::avx512 {
constexpr int lanes = 16;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx512
#undef SPARSEBERT_COMPRESS
#pragma GCC pop_options
#endif
