#if defined(__x86_64__)
#include "sparse_matmul.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sparsebert::sparse_matmul_avx2 {
constexpr int lanes = 8;
constexpr int widest_rows = 4;
// With four vectors a group would be multiplied in two halves, each with only half of the first-level cache's sets.
constexpr int widest_groups = 3;
#include "vector.inl"
#include "panel.inl"
#include "sparse_matmul.inl"
}  // namespace sparsebert::sparse_matmul_avx2
#pragma GCC pop_options
#endif
