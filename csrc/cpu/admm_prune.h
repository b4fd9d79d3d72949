// What the driver (admm_prune.cpp) and the kernels (admm_prune.inl) share: one job, and three kinds of task.
#pragma once

#include "../ops.h"

namespace sparsebert {

struct AdmmPruneJob {
  AdmmState state;
  const bool* keep;           // [rows, n_in]
  float rho;
  float shrink;               // factor on U for the next iteration
  std::int64_t padded_n;      // n_in in whole panels
  bool dense;                 // Z is in `z`, else in the lists below it
  float* z;                   // [rows in whole blocks, n_in], zeros below the last row
  float* values;              // [rows, n_in], the kept values of each row, from the row's start on
  std::int32_t* cols;         // [rows, n_in], their columns
  std::int64_t* counts;       // [rows]
};

struct AdmmPruneKernel {
  // Computes Z of one block of rows, as a matrix or as lists.
  void (*project)(const AdmmPruneJob& job, std::int64_t block);
  // Computes U and B of one block of rows and one panel of eigenvectors.
  void (*update)(const AdmmPruneJob& job, std::int64_t block, std::int64_t panel);
  // Computes x and scores of one block of rows and one panel of columns.
  void (*expand)(const AdmmPruneJob& job, std::int64_t block, std::int64_t panel);
};


}  // namespace sparsebert
