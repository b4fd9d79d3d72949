// What the driver (obs_prune.cpp) and the kernels (obs_prune.inl) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

// One trace per group of rows. A removal is a rank-1 downdate of the inverse by v vᵀ, v = column p / sqrt(pivot). The
// downdates are deferred: the current inverse is `base` minus the v vᵀ so far. After `deferred` removals a new base is
// written on the columns that are still open, as one product of matrices. The first base is the shared inverse.
struct TraceJob {
  const double* weight;   // [groups * group, n_in]
  const double* inverse;  // [n_in, n_in], symmetric
  std::int64_t n_in;
  std::int64_t group;     // rows that lose their columns together
  Banks banks;
  std::int64_t steps;
  std::int64_t deferred;
  std::int32_t* order;    // [groups, steps]
  double* losses;         // [groups, steps]
};

// The weights removed from a block whose mask is chosen over all rows: those of lower score, and those of equal score
// up to this index.
struct Threshold {
  double score;
  std::int64_t index;  // group * columns of the block + column in it
};

// Depth of the sweep's products with the errors of earlier blocks: a panel's errors of 128 columns take 24 KB of a
// first-level cache, and the 128 x 128 factors that all panels use stay in the second level.
constexpr std::int64_t sweep_depth = 128;

// Rows are cut into chunks, and the rows of a chunk into panels, with the row innermost.
struct SweepJob {
  const double* weight;  // [rows, n_in]
  const double* factor;  // [n_in, n_in], Uᵀ: row j holds column j's factors for earlier columns' errors
  double* pruned;        // [rows, n_in]
  std::int64_t rows;
  std::int64_t n_in;
  SweepPattern pattern;
  std::int64_t block;
  std::int64_t chunk_rows;     // a multiple of the pattern's group
  std::int64_t chunk_panels;
  double* errors;              // [chunks, chunk_panels, n_in, panel]
  double* columns;             // [chunks, chunk_panels, block, panel], like the next two
  double* scores;
  double* gone;
  double* sums;                // [chunks, m]
  double* factors;             // [chunks, block, sweep_depth]
  const Threshold* threshold;  // of the block to sweep; unused with N:M
};

struct ObsPruneKernel {
  // Bytes of working memory that one trace needs, a multiple of 64.
  std::int64_t (*trace_bytes)(const TraceJob& job);
  void (*trace)(const TraceJob& job, std::int64_t group, void* memory);
  std::int64_t panel;  // rows per panel
  void (*reach_block)(const SweepJob& job, std::int64_t chunk, std::int64_t block);
  void (*sweep_block)(const SweepJob& job, std::int64_t chunk, std::int64_t block);
};


}  // namespace sparsebert
