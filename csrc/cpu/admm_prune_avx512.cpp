#if defined(__x86_64__)
#include "admm_prune.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::admm_prune_avx512 {
constexpr int lanes = 16;
constexpr int tile_rows = 8;
constexpr int tile_width = 3;
#include "vector.inl"
#include "admm_prune.inl"
}  // namespace sparsebert::admm_prune_avx512
#pragma GCC pop_options
#endif
