// What the driver (gram.cpp) and the kernels (gram.inl) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Number of tokens whose products are summed in float32 before the sum continues in float64.
constexpr std::int64_t gram_depth = 256;

// One part of a sum over tokens: partial[c] = sum of w (values - shift)[c], float64.
struct TokenSumsJob {
  const float* values;   // [tokens, n]
  const float* weights;  // [tokens] or null for ones
  const float* shift;    // [n]
  std::int64_t tokens;
  std::int64_t n;
  std::int64_t part_tokens;
  double* partial;       // [parts, n]
};

// Values [tokens, n] and their packed copy, centred and scaled by the square roots of the weights. The columns are cut
// into panels of the kernel's width. A panel holds its columns of one token side by side, so that both operands of a
// tile step through it: panels[ceil(n / width)][tokens][width], zeros past the last column.
struct GramOperand {
  const float* values;  // [tokens, n], starting at the first packed token
  const float* shift;   // [n]
  float* panels;        // aligned to 64 bytes
  std::int64_t n;
};

struct GramPackJob {
  GramOperand operand;
  const float* roots;        // [tokens], square roots of the weights, or null for ones
  float* partial;            // [parts, n], sums over each part's tokens of w (values - shift)
  std::int64_t tokens;
  std::int64_t part_tokens;  // tokens that one packing task covers, few enough for a float32 sum
  bool keep;                 // write the packed copy, not only the sums
};

// sums[i][j] += sum over the packed tokens of rows[i] columns[j], for one block of i and one of j.
struct GramBlock {
  const float* rows;     // panels, starting at the block's first, each [tokens, width]
  const float* columns;  // likewise
  std::int64_t tokens;
  std::int64_t n_rows;     // of the block, whose last panel may be partly filled
  std::int64_t n_columns;
  bool upper;              // rows and columns are the same block, and only i <= j is needed; entries below may change
  double* sums;            // at the block's first entry
  std::int64_t stride;     // doubles from one row of sums to the next
};

struct GramKernel {
  int width;  // columns per panel
  void (*token_sums)(const TokenSumsJob& job, std::int64_t part);
  void (*pack)(const GramPackJob& job, std::int64_t part);
  void (*multiply)(const GramBlock& block);
};


}  // namespace sparsebert
