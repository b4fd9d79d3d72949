#if defined(__x86_64__)
#include "sparse_encoder.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::sparse_encoder_avx512 {
constexpr int lanes = 16;
#include "vector.inl"
#include "panel.inl"
#include "sparse_encoder.inl"
}  // namespace sparsebert::sparse_encoder_avx512
#pragma GCC pop_options
#endif
