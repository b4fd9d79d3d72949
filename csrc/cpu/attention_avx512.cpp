#include "attention.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::attention_avx512 {
constexpr int lanes = 16;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"
#include "attention.inl"

const AttentionKernel kernel = {floats, attend, attend_backward};
}  // namespace sparsebert::attention_avx512
#pragma GCC pop_options
#endif
