#if defined(__x86_64__)
#include "sparse_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace sparsebert::sparse_matmul_avx512 {
constexpr int lanes = 16;
constexpr int widest_rows = 4;
constexpr int widest_groups = 4;
#include "vector.inl"
#include "panel.inl"
#include "sparse_matmul.inl"
}  // namespace sparsebert::sparse_matmul_avx512
#pragma GCC pop_options
#endif
