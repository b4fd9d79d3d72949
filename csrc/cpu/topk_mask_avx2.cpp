#if defined(__x86_64__)
#include "topk_mask.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::topk_mask_avx2 {
constexpr int lanes = 8;
#include "vector.inl"
#include "topk_mask.inl"
}  // namespace sparsebert::topk_mask_avx2
#pragma GCC pop_options
#endif
