#if defined(__x86_64__)
#include "gram.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::gram_avx2 {
constexpr int lanes = 8;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 3;
#include "vector.inl"
#include "gram.inl"
}  // namespace sparsebert::gram_avx2
#pragma GCC pop_options
#endif
