// What the driver (masked_lstsq.cpp) and the kernels (masked_lstsq.inl) share: a job. A task is one group of
// rows.
#pragma once

#include "../ops.h"

namespace sparsebert {

struct MaskedLstsqJob {
  const double* target;  // [rows, n_in]
  const double* h;       // [n_in, n_in]
  std::int64_t n_in;
  RowGroups groups;
  bool complement;       // as in ops.h
  double* v;             // [rows, n_in]
};

struct MaskedLstsqKernel {
  // Doubles of working memory to solve for k columns and g rows.
  std::int64_t (*workspace)(std::int64_t k, std::int64_t g);
  // Writes the rows of v of one group. cols: its support S, increasing. Returns the group's value of `failed`, see
  // ops.h.
  std::int64_t (*solve)(const MaskedLstsqJob& job, const std::int32_t* cols, std::int64_t k, const std::int32_t* rows,
                        std::int64_t g, double* work);
};


}  // namespace sparsebert
