// What the driver (masked_matmul.cpp) and the kernels (masked_matmul_<isa>.cpp) share.
//
// A product sums over words: a float each, or a pair of bf16 where the kernel multiplies these. Both operands come in
// panels of `width` rows or columns of the result, one word of each side by side: [panels][words][width], with zeros
// past the last row, column and value.
#pragma once

#include "../ops.h"

namespace sparsebert {

// A matrix [rows, cols] as the floats that are multiplied.
struct MatmulSource {
  const void* values;   // floats, or bf16
  bool bf16;
  bool round;           // floats to the nearest bf16
  std::int64_t rows;
  std::int64_t cols;
  const MaskedWeight* mask;  // zero where it does not keep, or null
};

struct MatmulPanels {
  MatmulSource source;
  bool across;         // words go down the source's columns, and a panel is a few of these; else along its rows
  std::int64_t width;  // the kernel's tile_rows, tile_columns or panel_tokens
  bool grouped;        // words are in the kernel's groups: panels of tile_rows where word_group is above 1
  std::int64_t words;
  float* panels;       // [ceil(rows or cols / width)][words][width], aligned to 64 bytes
};

// out = left rightᵀ, [rows, columns]; what becomes of a sum depends on which of the pointers are not null.
struct MatmulJob {
  const float* left;    // panels of tile_rows
  MatmulPanels right;   // panels of tile_columns; packed where they are needed if `panels` is null
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;   // words whose part of a panel of columns stays in the second-level cache
  bool bf16;            // what `out` holds, or floats
  void* out;            // [rows, columns] or null
  const float* bias;    // [columns] or null
  const MaskedWeight* weight;  // of which `out` is the gradient, with:
  float* d_weight;             // [rows, columns] or null, out where it is kept, else 0
  float* d_scores;             // [rows / share, columns] or null, the sum over rows that share it of out * weight
};

// Tiles of rows and panels of columns that a task covers; its rows share no score with others.
struct MatmulBlock {
  std::int64_t tile, tiles;
  std::int64_t panel, panels;
};

struct MaskedMatmulKernel {
  int values_a_word;  // 1: floats; 2: bf16
  int word_group;     // words of both operands are whole groups of this; above 1, panels of tile_rows are
                      // [panels][words / word_group][width][word_group] instead
  int tile_rows;
  int tile_columns;
  double sparse_below;  // the share kept below which, from 128 tokens on, it is faster to multiply only what is kept
  // Panels `first` to `last` of words `begin` to `end`, one panel `stride` floats behind the other from `out` on.
  void (*pack)(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
               float* out, std::int64_t stride);
  // `work`: what of the right panels is not packed, `depth` words of them, then a block's sums between two depths.
  void (*multiply)(const MatmulJob& job, const MatmulBlock& block, float* work);
  // Columns `first` to `last` of out, by what is kept of their weights alone; job.left is in panels of `panel_tokens`.
  // Null where words are pairs.
  int panel_tokens;
  std::int64_t (*sparse_floats)(const MatmulJob& job, std::int64_t columns);  // of `work`
  void (*multiply_sparse)(const MatmulJob& job, std::int64_t first, std::int64_t last, float* work);
  // How many of a row's weights are kept.
  std::int64_t (*count_kept)(const MaskedWeight& mask, std::int64_t row);
};

namespace masked_matmul_scalar { extern const MaskedMatmulKernel kernel; }
namespace masked_matmul_scalar_tiled { extern const MaskedMatmulKernel kernel; }
#if defined(__x86_64__)
namespace masked_matmul_avx2 { extern const MaskedMatmulKernel kernel; }
namespace masked_matmul_avx512 { extern const MaskedMatmulKernel kernel; }
namespace masked_matmul_avx512_bf16 { extern const MaskedMatmulKernel kernel; }
namespace masked_matmul_amx { extern const MaskedMatmulKernel kernel; }
#endif

}  // namespace sparsebert
