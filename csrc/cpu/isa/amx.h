// The tile registers of AMX, for bf16 and for bytes, beside the dot products of AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi2,avx2,fma,popcnt")
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
#define SPARSEBERT_TILES 2
#define SPARSEBERT_DOT(sum, bytes, weights) _mm512_dpbusd_epi32(sum, bytes, weights)
#define SPARSEBERT_DOT_PAIRS(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
namespace sparsebert::amx {
constexpr int lanes = 16;
constexpr int registers = 32;
typedef __m512i Register;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::amx
#undef SPARSEBERT_TILES
#undef SPARSEBERT_DOT
#undef SPARSEBERT_DOT_PAIRS
#pragma GCC pop_options
#endif
