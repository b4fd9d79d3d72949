#if defined(__x86_64__)
#include "topk_mask.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::topk_mask_avx512 {
constexpr int lanes = 16;
#include "vector.inl"
#include "topk_mask.inl"
}  // namespace sparsebert::topk_mask_avx512
#pragma GCC pop_options
#endif
