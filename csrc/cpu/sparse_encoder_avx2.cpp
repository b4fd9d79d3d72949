#if defined(__x86_64__)
#include "sparse_encoder.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::sparse_encoder_avx2 {
constexpr int lanes = 8;
#include "vector.inl"
#include "panel.inl"
#include "sparse_encoder.inl"
}  // namespace sparsebert::sparse_encoder_avx2
#pragma GCC pop_options
#endif
