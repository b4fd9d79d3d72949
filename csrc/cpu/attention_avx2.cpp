#include "attention.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::attention_avx2 {
constexpr int lanes = 8;
#include "vector.inl"
#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"
#include "attention.inl"

const AttentionKernel kernel = {floats, attend, attend_backward};
}  // namespace sparsebert::attention_avx2
#pragma GCC pop_options
#endif
