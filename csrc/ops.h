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

// How many columns of every `width` consecutive ones a row may lose; width 0: any.
struct Banks {
  std::int64_t width;
  std::int64_t removals;
};

// Exact optimal brain surgeon: the order in which groups of `group` consecutive rows lose their columns, at each step
// the open column p of lowest score, the sum over the group's rows of w_p^2 / [H^-1]_pp, of equals the lower one.
//   weight   [rows, n_in] row-major, rows a multiple of group
//   inverse  [n_in, n_in], H^-1, symmetric
//   steps    at most n_in, and at most n_in / width * removals with banks
//   order    [rows / group, steps], columns; losses [rows / group, steps], the scores when they went
// A trace whose inverse loses its positive diagonal to rounding ends with losses of NaN. Results do not depend on
// `threads` (>= 1). Throws std::bad_alloc; works in 8 * n_in^2 bytes a thread, about.
void obs_prune(const double* weight, std::int64_t rows, std::int64_t n_in, const double* inverse, std::int64_t group,
               Banks banks, std::int64_t steps, Isa isa, int threads, std::int32_t* order, double* losses);

// Which weights an obs_sweep removes. m = 0: of each block of columns, over all rows together, the removals[block] sets
// of `group` consecutive rows and one column with the lowest sums of scores. m > 0: n of m consecutive columns stay, in
// each row; where `shared`, out of the 4 that `group` rows share.
struct SweepPattern {
  std::int64_t group;
  std::int64_t n;
  std::int64_t m;
  bool shared;
  const std::int64_t* removals;  // [ceil(n_in / block)], each at most rows / group times the block's columns
};

// Columns left to right, each removal compensated in the columns to its right; score (w_j / U_jj)^2, H^-1 = Uᵀ U.
//   weight  [rows, n_in] row-major, rows a multiple of group
//   factor  [n_in, n_in], Uᵀ: lower triangular; only that half is read
//   block   columns whose masks are chosen together, at least 1; a multiple of m where m > 0
//   pruned  [rows, n_in], written whole; must not overlap weight
// Results do not depend on `threads` (>= 1). Throws std::bad_alloc; works in about 8 * rows * n_in bytes.
void obs_sweep(const double* weight, std::int64_t rows, std::int64_t n_in, const double* factor,
               const SweepPattern& pattern, std::int64_t block, Isa isa, int threads, double* pruned);

}  // namespace sparsebert
