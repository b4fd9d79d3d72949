#if defined(__x86_64__)
#include "admm_prune.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::admm_prune_avx2 {
constexpr int lanes = 8;
constexpr int tile_rows = 4;
constexpr int tile_width = 3;
#include "vector.inl"
#include "admm_prune.inl"
}  // namespace sparsebert::admm_prune_avx2
#pragma GCC pop_options
#endif
