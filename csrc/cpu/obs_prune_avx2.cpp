#if defined(__x86_64__)
#include "obs_prune.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::obs_prune_avx2 {
constexpr int lanes = 8;
constexpr int tile_rows = 4;
constexpr int panel_vectors = 3;
#include "vector.inl"
#include "obs_prune.inl"
}  // namespace sparsebert::obs_prune_avx2
#pragma GCC pop_options
#endif
