// What the driver (sparse_matmul.cpp) and the kernels (sparse_matmul_<isa>.cpp) share: one job, and two kinds of task.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Tokens are cut into panels of `width`; a panel is a copy of its tokens' inputs with the token innermost, so that one
// kept weight meets `width` tokens with plain vector loads:  panels[panel][n_in][width].
struct SparseMatmulJob {
  const float* x;           // [tokens, n_in], from the first token of the first panel here
  float* y;                 // [tokens, n_out], likewise
  float* panels;            // [n_panels, n_in, width], aligned to 64 bytes; tokens past the last one are zeros
  std::int64_t tokens;      // tokens in these panels; only the last panel may be partly filled
  CsrMatrix w;
  const float* bias;        // [n_out] or null
  Activation activation;
  int width_vectors;        // width in vectors of the kernel's ISA, 1 to its max_width_vectors
  std::int64_t pack_rows;   // inputs that one packing task transposes, a multiple of 16
  std::int64_t block_rows;  // outputs that one compute task covers
  bool poison;              // fill the tile with NaN first
};

// Outputs computed before they are transposed into y: four cache lines of it a token, and a tile of 16 KB at most,
// which leaves the inputs most of a first-level cache.
constexpr int tile_rows = 64;

// Accumulators that a row's products go to in turn: enough independent sums to keep two multiply-adds a cycle busy in a
// narrow panel, few enough that four vectors of each fit the 16 registers of AVX2. The same for every width and ISA, so
// that a token's result depends on neither its panel's width nor, where there is a fused multiply-add, on the ISA.
constexpr int chains = 3;

struct SparseMatmulKernel {
  int lanes;              // floats in a vector
  int max_width_vectors;  // vectors in the widest panel
  void (*pack)(const SparseMatmulJob& job, std::int64_t panel, std::int64_t part);
  void (*compute)(const SparseMatmulJob& job, std::int64_t panel, std::int64_t block);
};

namespace sparse_matmul_scalar { extern const SparseMatmulKernel kernel; }
#if defined(__x86_64__)
namespace sparse_matmul_avx2 { extern const SparseMatmulKernel kernel; }
namespace sparse_matmul_avx512 { extern const SparseMatmulKernel kernel; }
#endif

}  // namespace sparsebert
