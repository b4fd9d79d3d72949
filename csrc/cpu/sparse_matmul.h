// What the drivers (sparse_matmul.cpp, sparse_encoder.cpp) and the kernels (sparse_matmul_<isa>.cpp) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Tokens are cut into panels of `width`, the token innermost, so that one kept weight meets `width` tokens with plain
// vector loads: [n_panels][n][width], aligned to 64 bytes. The width is one to a few vectors of the kernel's ISA; only
// the last panel may be partly filled.
struct PanelShape {
  std::int64_t tokens;
  std::int64_t panels;
  int width_vectors;
  int lanes;
  std::int64_t width() const { return std::int64_t{width_vectors} * lanes; }
};

// [tokens, n] row-major float32 and the same in panels of float or Bf16.
template <typename T>
struct TransposeJob {
  PanelShape shape;
  float* rows;
  T* panels;  // tokens past the last one: zeros after packing
  std::int64_t n;
  std::int64_t part;  // of n, what one task moves, a multiple of 16
};

// Panels of x -> panels of y.
template <typename T>
struct LinearJob {
  PanelShape shape;
  const Linear* linear;
  const T* x;
  T* y;
  bool add;           // y += linear(x), without activation
  std::int64_t unit;  // blocks of rows, or groups, that one task covers
};

template <typename T>
struct SparseMatmulKernel {
  int lanes;          // tokens in a vector
  int widest_rows;    // vectors in the widest panel for a matrix in rows of their own
  int widest_groups;  // and for one in groups or tiles, at most as many
  int task_panels;    // panels that a task of multiply covers, where there are as many
  void (*pack)(const TransposeJob<T>& job, std::int64_t panel, std::int64_t part);
  void (*unpack)(const TransposeJob<T>& job, std::int64_t panel, std::int64_t part);
  // Of these panels, and one part of the rows; `work` is work_bytes(job) of working memory.
  void (*multiply)(const LinearJob<T>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void* work);
  std::int64_t (*work_bytes)(const LinearJob<T>& job);
  // So many times saturated_flops operations, as fast as the instructions go: from registers, or tiles in the cache.
  float (*saturate)(std::int64_t steps);
  std::int64_t saturated_flops;
};

namespace sparse_matmul_scalar { extern const SparseMatmulKernel<float> kernel; }
namespace sparse_matmul_scalar_tiled { extern const SparseMatmulKernel<Bf16> kernel; }
#if defined(__x86_64__)
namespace sparse_matmul_avx2 { extern const SparseMatmulKernel<float> kernel; }
namespace sparse_matmul_avx512 { extern const SparseMatmulKernel<float> kernel; }
namespace sparse_matmul_avx512_bf16 { extern const SparseMatmulKernel<Bf16> kernel; }
namespace sparse_matmul_amx { extern const SparseMatmulKernel<Bf16> kernel; }
#endif

// The kernel for so many tokens, and how they are cut: as few panels as the widest for rows or for `groups` allows, then
// all as narrow as that number allows. 65 tokens make two panels of 48 (three vectors of 16), not one of 64 and one of 16 that would read
// every weight for a single token.
template <typename T>
const SparseMatmulKernel<T>& sparse_matmul_kernel(Isa isa, std::int64_t tokens);
template <typename T>
PanelShape panel_shape(const SparseMatmulKernel<T>& kernel, std::int64_t tokens, bool groups);

// One linear layer on all panels. Throws std::bad_alloc when the working memory cannot be had.
template <typename T>
void run_linear(const SparseMatmulKernel<T>& kernel, const PanelShape& shape, const Linear& linear, const T* x, T* y,
                bool add, int threads);

}  // namespace sparsebert
