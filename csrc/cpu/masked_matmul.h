// What the driver (masked_matmul.cpp) and the kernels (masked_matmul.inl) share.
//
// A product sums over words. A word is a float, or a pair of bf16 if the kernel multiplies bf16. Both operands come in
// panels of `width` rows or columns of the result, with one word of each side by side: [panels][words][width], with
// zeros past the last row, column and value.
#pragma once

#include "../ops.h"

namespace sparsebert {

// A matrix [rows, cols], and how its values are changed before they are multiplied.
struct MatmulSource {
  const void* values;   // floats, or bf16
  bool bf16;
  bool round;           // round floats to the nearest bf16
  std::int64_t rows;
  std::int64_t cols;
  const MaskedWeight* mask;  // values that it does not keep become zero; or null
};

struct MatmulPanels {
  MatmulSource source;
  bool across;         // words run down the source's columns, and a panel is a few columns; else along rows
  std::int64_t width;  // the kernel's tile_rows, tile_columns or panel_tokens
  bool grouped;        // words are in the kernel's runs: panels of tile_rows, if word_run is above 1
  std::int64_t words;
  float* panels;       // [ceil(rows or cols / width)][words][width], aligned to 64 bytes
};

// out = left rightᵀ, [rows, columns]; the pointers that are not null decide what is computed from a sum.
struct MatmulJob {
  const float* left;    // panels of tile_rows
  MatmulPanels right;   // panels of tile_columns; if `panels` is null, each task packs what it needs
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;   // words whose part of a panel of columns stays in the second-level cache
  bool bf16;            // `out` is bf16, else floats
  void* out;            // [rows, columns] or null
  const float* bias;    // [columns] or null
  const MaskedWeight* weight;  // or null; if given, the product is this weight's gradient G, and it goes to:
  float* d_weight;             // [rows, columns] or null, G where the weight is kept, else 0
  float* d_scores;             // [rows / score_rows, columns] or null, G * weight summed over rows that share a score
};

// Tiles of rows and panels of columns that a task covers; its rows share no score with other tasks.
struct MatmulBlock {
  std::int64_t tile, tiles;
  std::int64_t panel, panels;
};

struct MaskedMatmulKernel {
  int values_a_word;  // 1: floats; 2: bf16
  int word_run;       // both operands have whole runs of this many words; above 1, panels of tile_rows are
                      // [panels][words / word_run][width][word_run] instead
  int tile_rows;
  int tile_columns;
  double sparse_below;  // from 128 tokens on, multiplying only kept weights is faster if their share is below this
  // Packs words `begin` to `end` of panels `first` to `last`, from `out` on, with panels `stride` floats apart.
  void (*pack)(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
               float* out, std::int64_t stride);
  // `work` holds `depth` words of the right panels, unless they are packed already, then a block's sums between two
  // depths.
  void (*multiply)(const MatmulJob& job, const MatmulBlock& block, float* work);
  // Computes columns `first` to `last` of out from the kept weights only; job.left is in panels of `panel_tokens`. Null
  // if words are pairs.
  int panel_tokens;
  std::int64_t (*sparse_floats)(const MatmulJob& job, std::int64_t columns);  // floats of `work`
  void (*multiply_sparse)(const MatmulJob& job, std::int64_t first, std::int64_t last, float* work);
  // The number of kept weights in a row.
  std::int64_t (*count_kept)(const MaskedWeight& mask, std::int64_t row);
};


}  // namespace sparsebert
