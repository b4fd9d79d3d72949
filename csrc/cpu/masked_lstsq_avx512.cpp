#if defined(__x86_64__)
#include "masked_lstsq.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::masked_lstsq_avx512 {
constexpr int lanes = 16;
constexpr int tile_rows = 8;
constexpr int tile_width = 3;
#include "vector.inl"
#include "masked_lstsq.inl"
}  // namespace sparsebert::masked_lstsq_avx512
#pragma GCC pop_options
#endif
