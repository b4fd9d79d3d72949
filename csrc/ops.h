// Every operation of the compiled core, in plain C++: no Python and no tensor library in here.
// Callers have checked shapes and index bounds; nothing below checks them again.
#pragma once

#include <cstdint>

namespace sparsebert {

// Slowest first, in the order of sparsebert.environment.ISAS.
enum class Isa : int { scalar, avx2, avx512 };

enum class Activation : int { none, gelu };  // gelu: 0.5 v (1 + erf(v / sqrt(2))), the exact form

// A sparse matrix W [n_out, n_in], one list of kept columns a row.
struct CsrMatrix {
  const std::int32_t* row_ptr;  // [n_out + 1], elements; starts at 0, never decreases, ends at nnz
  const std::uint16_t* cols;    // [nnz], column indices below n_in; any order within a row
  const float* values;          // [nnz]
  std::int64_t n_in;            // columns, at most 65536
  std::int64_t n_out;           // rows
};

// y = activation(x Wᵀ + bias), float32 accumulation.
//   x     [tokens, n_in] row-major floats, any number of tokens from 0; needs no alignment beyond a float's
//   bias  [n_out] floats, or null for none
//   y     [tokens, n_out] row-major floats, written whole; must not overlap x
// A token's result depends on no other token, nor on their number, nor on `threads` (>= 1); avx2 and avx512 give the
// same bits. Throws std::bad_alloc when the packed copy of x, at most max(threads MiB, n_in * 256 B), cannot be had.
void sparse_matmul(const float* x, std::int64_t tokens, const CsrMatrix& w, const float* bias, Activation activation,
                   Isa isa, int threads, float* y);

// sums[c] = sum over tokens of w (values - shift)[c]: the difference float32, the product and the sum float64.
//   values   [tokens, n] row-major floats; tokens and n from 1
//   weights  [tokens] floats of at least 0, or null for ones
//   shift    [n] floats
//   sums     [n] doubles, written whole: not finite where a value is not
// The result does not depend on `threads` (>= 1). Throws std::bad_alloc when 64 n doubles cannot be had.
void token_sums(const float* values, std::int64_t tokens, std::int64_t n, const float* weights, const float* shift,
                Isa isa, int threads, double* sums);

// Running sums over tokens, of x and y less their shifts.
struct GramSums {
  double* x;   // [n_in], sum of w x
  double* xx;  // [n_in, n_in], sum of w x_i x_j for i <= j; what lies below the diagonal may change too
  double* y;   // [n_y], sum of w y
  double* yx;  // [n_y, n_in], sum of w y_i x_j
};

// Adds a batch to the sums: products in float32, summed in float32 over at most 256 consecutive tokens and in float64
// from there on. Returns false, with nothing added, where a sum of w x or w y is not finite.
//   x, y     [tokens, n_in], [tokens, n_y] row-major floats; tokens and n from 1; without a y, it and what belongs to
//            it are null
//   shift_x, shift_y  [n_in], [n_y] floats
//   weights  [tokens] floats of at least 0, or null for ones
// The result does not depend on `threads` (>= 1); avx2 and avx512 give the same bits. Throws std::bad_alloc, with
// nothing added, when the packed copy of x and y, at most max(4 MiB, n_in + n_y + 192 KiB) and a tenth, cannot be had.
bool gram(const float* x, std::int64_t n_in, const float* shift_x, const float* y, std::int64_t n_y,
          const float* shift_y, const float* weights, std::int64_t tokens, Isa isa, int threads, const GramSums& sums);

}  // namespace sparsebert
