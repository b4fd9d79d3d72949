// AVX2 with fused multiply-adds: vectors of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::avx2 {
constexpr int lanes = 8;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::avx2
#pragma GCC pop_options
#endif
