#if defined(__x86_64__)
#include "obs_prune.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::obs_prune_avx512 {
constexpr int lanes = 16;
constexpr int tile_rows = 8;
constexpr int panel_vectors = 3;
#include "vector.inl"
#include "obs_prune.inl"
}  // namespace sparsebert::obs_prune_avx512
#pragma GCC pop_options
#endif
