// masked_lstsq on a GPU: one thread block per group of rows that share a support. The contract is that of ops.h, with
// all pointers on the device.
//
// The support S has k columns, the group g rows. H_SS = L Lᵀ is factored one panel of columns after the other
// (left-looking): a panel is gathered from H, reduced by the panels to its left, factored, and stored for good. The
// right-hand sides are further rows below H_SS, so the same steps turn t_S into t_S L⁻ᵀ. The back substitution then
// goes through the panels from right to left.
//
// Layout of a system, in doubles: the panels, [columns of a panel][rows from its diagonal down]; 1 / L_ii; the columns
// of S as int32. Threads take neighbouring rows, so that a column of a panel is read as one stream.
#pragma once

#include <cmath>

#include "layout.h"

namespace sparsebert::cuda {

constexpr int panel = 16;             // columns of a panel; also the sums that a thread holds in registers
constexpr int lstsq_threads = 192;    // of a thread block at most
constexpr int lstsq_resident = 384;   // on a multiprocessor at once: 170 registers each, 128 would spill on sm_90a
constexpr int complement_rows = 8;    // rows for which one read of H serves

struct MaskedLstsqJob {
  const double* target;  // [rows, n_in]
  const double* h;       // [n_in, n_in]
  std::int64_t n_in;
  RowGroups groups;      // as in ops.h; the mask's bytes are 0 or 1
  bool complement;
  double* v;             // [rows, n_in]
  std::int64_t* failed;  // [groups.count]
};

// Variables of a thread block that are in shared memory wherever the system is.
struct MaskedLstsqShared {
  std::int32_t counts[lstsq_threads];  // columns of S that each thread found
  std::int32_t failed;                 // the first pivot that is not above 0, or -1
};

// The shape of a system. Rows and columns are filled up to whole panels with zeros, which stay zero.
struct System {
  std::int64_t k;
  std::int64_t g;
};

SPARSEBERT_BOTH std::int64_t padded(const System& s) { return round_up(s.k, panel); }
SPARSEBERT_BOTH std::int64_t panels(const System& s) { return padded(s) / panel; }

// Rows of the first panel. 2 more than a multiple of 4, so that columns begin on 16 bytes, as panels and systems do,
// and so that threads that read one row of neighbouring columns meet in a bank of shared memory in pairs at most.
SPARSEBERT_BOTH std::int64_t all_rows(const System& s) { return padded(s) + round_up(s.g + 2, 4) - 2; }

SPARSEBERT_BOTH std::int64_t panel_rows(const System& s, std::int64_t p) { return all_rows(s) - p * panel; }
SPARSEBERT_BOTH std::int64_t panel_begin(const System& s, std::int64_t p) {
  return panel * (p * all_rows(s) - panel * (p * (p - 1) / 2));
}

// Where element (row, col) of L is; right-hand side i is row padded(s) + i. Above the diagonal only within a panel.
SPARSEBERT_BOTH std::int64_t place(const System& s, std::int64_t row, std::int64_t col) {
  const std::int64_t p = col / panel;
  return panel_begin(s, p) + (col - p * panel) * panel_rows(s, p) + row - p * panel;
}

SPARSEBERT_BOTH std::int64_t inverse_begin(const System& s) { return panel_begin(s, panels(s)); }
SPARSEBERT_BOTH std::int64_t cols_begin(const System& s) { return inverse_begin(s) + padded(s); }
SPARSEBERT_BOTH std::int64_t system_doubles(const System& s) { return cols_begin(s) + padded(s) / 2; }

// How to launch groups with at most k columns and g rows. Systems are in shared memory if all of them fit, else in
// working memory, one for each thread block.
struct MaskedLstsqPlan {
  int threads;
  std::int64_t blocks;         // thread blocks; each takes every blocks-th group
  std::int64_t shared_doubles; // per thread block
  std::int64_t work_doubles;   // in all
};

// shared_bytes: what a thread block of the device may have. processors: multiprocessors of the device.
SPARSEBERT_BOTH MaskedLstsqPlan plan_masked_lstsq(std::int64_t k, std::int64_t g, std::int64_t count,
                                                  std::int64_t shared_bytes, std::int64_t processors) {
  const System largest{k, g};
  const std::int64_t doubles = system_doubles(largest);
  const int threads = all_rows(largest) > lstsq_threads / 2 ? lstsq_threads : lstsq_threads / 2;
  if (doubles * 8 + static_cast<std::int64_t>(sizeof(MaskedLstsqShared)) <= shared_bytes) {
    return {threads, smaller(count, 1LL << 30), doubles, 0};
  }
  const std::int64_t blocks = smaller(count, processors * (lstsq_resident / threads));
  return {threads, blocks, 0, blocks * doubles};
}

// Columns that a thread looks at to find S.
SPARSEBERT_BOTH std::int64_t share_begin(std::int64_t n_in, int thread, int threads) { return n_in * thread / threads; }

// Fills shared.counts with the columns of S in each thread's share.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void count_columns(const ThreadBlock& block, const MaskedLstsqJob& job, const bool* mask,
                                     MaskedLstsqShared& shared) {
  block.each([&](int thread) {
    const std::int64_t end = share_begin(job.n_in, thread + 1, block.threads());
    std::int32_t count = 0;
    for (std::int64_t i = share_begin(job.n_in, thread, block.threads()); i < end; ++i) {
      count += mask[i] != job.complement;
    }
    shared.counts[thread] = count;
    if (thread == 0) shared.failed = -1;
  });
}

template <typename ThreadBlock>
SPARSEBERT_KERNEL void list_columns(const ThreadBlock& block, const MaskedLstsqJob& job, const bool* mask,
                                    const MaskedLstsqShared& shared, std::int32_t* cols) {
  block.each([&](int thread) {
    std::int64_t at = 0;
    for (int t = 0; t < thread; ++t) at += shared.counts[t];
    const std::int64_t end = share_begin(job.n_in, thread + 1, block.threads());
    for (std::int64_t i = share_begin(job.n_in, thread, block.threads()); i < end; ++i) {
      if (mask[i] != job.complement) cols[at++] = static_cast<std::int32_t>(i);
    }
  });
}

// The 16 elements from `from` on, which is on 16 bytes: half as many loads as one by one.
SPARSEBERT_KERNEL void load_panel_row(const double* from, double (&to)[panel]) {
#pragma unroll
  for (int c = 0; c < panel; c += 2) {
#if defined(__CUDA_ARCH__)
    const double2 two = *reinterpret_cast<const double2*>(from + c);
    to[c] = two.x, to[c + 1] = two.y;
#else
    to[c] = from[c], to[c + 1] = from[c + 1];
#endif
  }
}

// Element (row, col) of the system before it is factored.
SPARSEBERT_KERNEL double given(const MaskedLstsqJob& job, const System& s, const std::int32_t* cols,
                               const std::int32_t* rows, std::int64_t row, std::int64_t col) {
  if (col >= s.k) return 0.0;
  if (row >= padded(s)) return job.target[rows[row - padded(s)] * job.n_in + cols[col]];
  if (row >= s.k) return 0.0;
  // Of H only i <= j may be read. Within the panel of the diagonal, col may be above row.
  const std::int64_t i = row < col ? cols[row] : cols[col];
  const std::int64_t j = row < col ? cols[col] : cols[row];
  return job.h[i * job.n_in + j];
}

// Gathers panel p, and takes away the products of the panels to its left.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void reduce_panel(const ThreadBlock& block, const MaskedLstsqJob& job, const System& s,
                                    double* system, const std::int32_t* cols, const std::int32_t* rows,
                                    std::int64_t p) {
  block.each([&](int thread) {
    const std::int64_t first = p * panel;
    for (std::int64_t row = first + thread; row < padded(s) + s.g; row += block.threads()) {
      double sums[panel];
#pragma unroll
      for (int c = 0; c < panel; ++c) sums[c] = given(job, s, cols, rows, row, first + c);
      for (std::int64_t q = 0; q < p; ++q) {
        const double* column = system + panel_begin(s, q);
        const std::int64_t step = panel_rows(s, q);
        for (int j = 0; j < panel; ++j, column += step) {
          const double own = column[row - q * panel];
          double others[panel];
          load_panel_row(column + (p - q) * panel, others);
#pragma unroll
          for (int c = 0; c < panel; ++c) sums[c] -= own * others[c];
        }
      }
      double* to = system + place(s, row, first);
#pragma unroll
      for (int c = 0; c < panel; ++c) to[c * panel_rows(s, p)] = sums[c];
    }
  });
}

// Factors the diagonal of panel p. Returns false if a pivot is not above 0, which shared.failed then names.
template <typename ThreadBlock>
SPARSEBERT_KERNEL bool factor_diagonal(const ThreadBlock& block, const System& s, double* system, std::int64_t p,
                                       MaskedLstsqShared& shared) {
  double* corner = system + panel_begin(s, p);
  const std::int64_t step = panel_rows(s, p);
  const std::int64_t filled = smaller(panel, s.k - p * panel);
  for (int c = 0; c < filled; ++c) {
    // Column c is only read here, and scaled once all columns to its right are done: one barrier per column.
    block.each([&](int thread) {
      const double pivot = corner[c * step + c];
      if (!(pivot > 0.0)) {  // NaN included
        if (thread == 0) shared.failed = static_cast<std::int32_t>(p * panel + c);
        return;
      }
      const double inverse = 1.0 / pivot;
      for (int i = thread; i < panel * panel; i += block.threads()) {
        const int row = i % panel, col = i / panel;
        if (col > c && row >= col) {
          corner[col * step + row] -= corner[c * step + row] * (corner[c * step + col] * inverse);
        }
      }
    });
    if (shared.failed >= 0) return false;
  }
  double* inverses = system + inverse_begin(s) + p * panel;
  block.each([&](int thread) {
    for (int c = thread; c < panel; c += block.threads()) {
      inverses[c] = c < filled ? 1.0 / sqrt(corner[c * step + c]) : 0.0;
    }
  });
  block.each([&](int thread) {
    for (int i = thread; i < panel * panel; i += block.threads()) {
      const int row = i % panel, col = i / panel;
      corner[col * step + row] = row < col ? 0.0 : corner[col * step + row] * inverses[col];
    }
  });
  return true;
}

// x <- x L⁻ᵀ with the diagonal of panel p, for the rows below it.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void substitute(const ThreadBlock& block, const System& s, double* system, std::int64_t p) {
  block.each([&](int thread) {
    const double* corner = system + panel_begin(s, p);
    const double* inverses = system + inverse_begin(s) + p * panel;
    const std::int64_t step = panel_rows(s, p);
    for (std::int64_t row = (p + 1) * panel + thread; row < padded(s) + s.g; row += block.threads()) {
      double* at = system + place(s, row, p * panel);
      double x[panel];
#pragma unroll
      for (int c = 0; c < panel; ++c) x[c] = at[c * step];
#pragma unroll
      for (int c = 0; c < panel; ++c) {
        x[c] *= inverses[c];
#pragma unroll
        for (int d = c + 1; d < panel; ++d) x[d] -= x[c] * corner[c * step + d];
      }
#pragma unroll
      for (int c = 0; c < panel; ++c) at[c * step] = x[c];
    }
  });
}

// x <- x L⁻¹ in the right-hand sides: the columns of panel p, and their part in all columns to the left.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void back_substitute(const ThreadBlock& block, const System& s, double* system, std::int64_t p) {
  const double* corner = system + panel_begin(s, p);
  const double* inverses = system + inverse_begin(s) + p * panel;
  const std::int64_t step = panel_rows(s, p);
  const double* solved = system + place(s, padded(s), p * panel);
  block.each([&](int thread) {
    for (std::int64_t i = thread; i < s.g; i += block.threads()) {
      double* at = system + place(s, padded(s) + i, p * panel);
      double x[panel];
#pragma unroll
      for (int c = 0; c < panel; ++c) x[c] = at[c * step];
#pragma unroll
      for (int c = panel - 1; c >= 0; --c) {
        x[c] *= inverses[c];
#pragma unroll
        for (int d = 0; d < c; ++d) x[d] -= x[c] * corner[d * step + c];
      }
#pragma unroll
      for (int c = 0; c < panel; ++c) at[c * step] = x[c];
    }
  });
  const std::int64_t left = p * panel;
  block.each([&](int thread) {
    for (std::int64_t item = thread; item < s.g * left; item += block.threads()) {
      const std::int64_t i = item / left, col = item % left;
      double factor[panel];
      load_panel_row(system + place(s, p * panel, col), factor);
      double sum = 0.0;
#pragma unroll
      for (int c = 0; c < panel; ++c) sum += solved[c * step + i] * factor[c];
      system[place(s, padded(s) + i, col)] -= sum;
    }
  });
}

template <typename ThreadBlock>
SPARSEBERT_KERNEL void write_direct(const ThreadBlock& block, const MaskedLstsqJob& job, const System& s,
                                    const double* system, const std::int32_t* cols, const std::int32_t* rows) {
  block.each([&](int thread) {
    for (std::int64_t item = thread; item < s.g * s.k; item += block.threads()) {
      const std::int64_t i = item / s.k, col = item % s.k;
      job.v[rows[i] * job.n_in + cols[col]] = system[place(s, padded(s) + i, col)];
    }
  });
}

// v = t - cᵀ H_S:, and exactly 0 on S.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void write_complement(const ThreadBlock& block, const MaskedLstsqJob& job, const System& s,
                                        const double* system, const std::int32_t* cols, const std::int32_t* rows) {
  block.each([&](int thread) {
    for (std::int64_t first = 0; first < s.g; first += complement_rows) {
      const std::int64_t count = smaller(complement_rows, s.g - first);
      for (std::int64_t col = thread; col < job.n_in; col += block.threads()) {
        double sums[complement_rows] = {};
        for (std::int64_t i = 0; i < s.k; ++i) {
          const double h = job.h[cols[i] * job.n_in + col];
          const double* c = system + place(s, padded(s) + first, i);
#pragma unroll
          for (int r = 0; r < complement_rows; ++r) {
            if (r < count) sums[r] += c[r] * h;
          }
        }
#pragma unroll
        for (int r = 0; r < complement_rows; ++r) {
          if (r >= count) break;
          const std::int64_t at = rows[first + r] * job.n_in + col;
          job.v[at] = job.target[at] - sums[r];
        }
      }
    }
  });
  block.each([&](int thread) {
    for (std::int64_t item = thread; item < s.g * s.k; item += block.threads()) {
      job.v[rows[item / s.k] * job.n_in + cols[item % s.k]] = 0.0;
    }
  });
}

// Solves one group, in memory that has room for its system and begins on 16 bytes.
template <typename ThreadBlock>
SPARSEBERT_KERNEL void solve_group(const ThreadBlock& block, const MaskedLstsqJob& job, std::int64_t group,
                                   MaskedLstsqShared& shared, double* system) {
  const std::int32_t* rows = job.groups.rows + job.groups.row_ptr[group];
  const bool* mask = job.groups.mask + rows[0] * job.n_in;
  count_columns(block, job, mask, shared);
  System s{0, job.groups.row_ptr[group + 1] - job.groups.row_ptr[group]};
  for (int t = 0; t < block.threads(); ++t) s.k += shared.counts[t];
  auto* cols = reinterpret_cast<std::int32_t*>(system + cols_begin(s));
  list_columns(block, job, mask, shared, cols);

  bool positive = true;
  for (std::int64_t p = 0; p < panels(s) && positive; ++p) {
    reduce_panel(block, job, s, system, cols, rows, p);
    positive = factor_diagonal(block, s, system, p, shared);
    if (positive) substitute(block, s, system, p);
  }
  if (positive) {
    for (std::int64_t p = panels(s) - 1; p >= 0; --p) back_substitute(block, s, system, p);
    if (job.complement) {
      write_complement(block, job, s, system, cols, rows);
    } else {
      write_direct(block, job, s, system, cols, rows);
    }
  }
  // The last step of a group: the next one writes `shared` and `system` again.
  block.each([&](int thread) {
    if (thread == 0) job.failed[group] = shared.failed;
  });
}

// Doubles of working memory for a launch on the current device: `plan_masked_lstsq` with the device's figures. Each of
// the next two returns a cudaError_t, 0 for success.
int masked_lstsq_work(std::int64_t k, std::int64_t g, std::int64_t count, std::int64_t* doubles);

// Runs a job on a stream, without waiting for it. k, g: the largest support and the most rows of a group. work: on the
// device, as many doubles as `masked_lstsq_work` says; null for none.
int masked_lstsq(const MaskedLstsqJob& job, std::int64_t k, std::int64_t g, double* work, void* stream);

}  // namespace sparsebert::cuda
