// The sweep over the columns of one chunk of rows, written once for every vector width. Included after vector.inl, by
// its rules. Rows are lanes: a tile is `tile_rows` columns of W by one panel of rows.

namespace {

struct Sweep {
  std::int64_t first, end;  // columns of the block
  std::int64_t rows, panels;
  const double* weight;  // [rows, n_in], of the chunk
  double* pruned;        // likewise
  double* errors;        // [panels, n_in, panel], the negated e
  double* columns;       // [panels, block, panel], the block of W
  double* scores;        // [panels, block, panel]
  double* gone;          // [panels, block, panel], 1 where the weight is removed, else 0
  double* sums;          // [m]
  double* factor;        // [block, sweep_depth], the part of the factor in use
};

inline Sweep view(const SweepJob& job, std::int64_t chunk, std::int64_t block) {
  Sweep s;
  s.first = block * job.block;
  s.end = s.first + job.block < job.n_in ? s.first + job.block : job.n_in;
  const std::int64_t row = chunk * job.chunk_rows;
  s.rows = job.rows - row < job.chunk_rows ? job.rows - row : job.chunk_rows;
  s.panels = (s.rows + panel - 1) / panel;
  s.weight = job.weight + row * job.n_in;
  s.pruned = job.pruned + row * job.n_in;
  s.errors = job.errors + chunk * job.chunk_panels * panel * job.n_in;
  const std::int64_t offset = chunk * job.chunk_panels * panel * job.block;
  s.columns = job.columns + offset;
  s.scores = job.scores + offset;
  s.gone = job.gone + offset;
  s.sums = job.sums + chunk * job.pattern.m;
  s.factor = job.factors + chunk * job.block * sweep_depth;
  return s;
}

template <int cols>
inline void load_tile(const double* from, f64 (&tile)[cols][panel_vectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < cols; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < panel_vectors; ++n) tile[i][n] = load(from + i * panel + n * f64_lanes);
  }
}

// Adds the changes by `depth` removals to `cols` columns of one panel. factor: row i holds column i's factors for their
// errors.
template <int cols>
inline void apply_tile(const double* factor, std::int64_t stride, const double* errors, std::int64_t depth,
                       double* columns) {
  f64 acc[cols][panel_vectors];
  load_tile(columns, acc);
  multiply_tile<double, cols, panel_vectors>(factor, stride, 1, errors, panel, depth, acc);
#pragma GCC unroll 16
  for (int i = 0; i < cols; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < panel_vectors; ++n) store(columns + i * panel + n * f64_lanes, acc[i][n]);
  }
}

// The same on `count` columns.
inline void apply(const double* factor, std::int64_t stride, const double* errors, std::int64_t depth,
                  std::int64_t count, double* columns) {
  std::int64_t c = 0;
  for (; c + tile_rows <= count; c += tile_rows) {
    apply_tile<tile_rows>(factor + c * stride, stride, errors, depth, columns + c * panel);
  }
  for (; c + 4 <= count; c += 4) apply_tile<4>(factor + c * stride, stride, errors, depth, columns + c * panel);
  for (; c < count; ++c) apply_tile<1>(factor + c * stride, stride, errors, depth, columns + c * panel);
}

// Scores of columns [first, last): (w / U_jj)^2.
inline void score(const SweepJob& job, const double* columns, std::int64_t first, std::int64_t last,
                  std::int64_t origin, double* scores) {
  for (std::int64_t c = first; c < last; ++c) {
    const double pivot = job.factor[c * job.n_in + c];
    for (int n = 0; n < panel_vectors; ++n) {
      const std::int64_t at = (c - origin) * panel + n * f64_lanes;
      const f64 e = load(columns + at) / pivot;
      store(scores + at, e * e);
    }
  }
}

// Gives every row of a group the sum of the group's scores.
void sum_groups(const SweepJob& job, const Sweep& s) {
  for (std::int64_t row = 0; row < s.rows; row += job.pattern.group) {
    for (std::int64_t c = 0; c < s.end - s.first; ++c) {
      double sum = 0.0;
      for (std::int64_t r = row; r < row + job.pattern.group; ++r) {
        sum += s.scores[(r / panel * job.block + c) * panel + r % panel];
      }
      for (std::int64_t r = row; r < row + job.pattern.group; ++r) {
        s.scores[(r / panel * job.block + c) * panel + r % panel] = sum;
      }
    }
  }
}

// Reaches a block: applies the removals of all earlier blocks to it. If its mask is chosen over all rows, also computes
// its scores.
void reach_block(const SweepJob& job, std::int64_t chunk, std::int64_t block) {
  const Sweep s = view(job, chunk, block);
  for (std::int64_t p = 0; p < s.panels; ++p) {
    double* columns = s.columns + p * job.block * panel;
    for (int lane = 0; lane < panel; ++lane) {
      const std::int64_t row = p * panel + lane;
      for (std::int64_t c = s.first; c < s.end; ++c) {
        columns[(c - s.first) * panel + lane] = row < s.rows ? s.weight[row * job.n_in + c] : 0.0;
      }
    }
  }
  const std::int64_t width = s.end - s.first;
  for (std::int64_t k = 0; k < s.first; k += sweep_depth) {
    const std::int64_t depth = k + sweep_depth < s.first ? sweep_depth : s.first - k;
    // Copied, because the factor's rows are often several whole KB apart, and 128 of them then fall on few sets of a
    // cache.
    for (std::int64_t c = 0; c < width; ++c) {
      const double* row = job.factor + (s.first + c) * job.n_in + k;
      for (std::int64_t i = 0; i < depth; ++i) s.factor[c * sweep_depth + i] = row[i];
    }
    for (std::int64_t p = 0; p < s.panels; ++p) {
      apply(s.factor, sweep_depth, s.errors + (p * job.n_in + k) * panel, depth, width,
            s.columns + p * job.block * panel);
    }
  }
  if (job.pattern.m > 0) return;
  for (std::int64_t p = 0; p < s.panels; ++p) {
    score(job, s.columns + p * job.block * panel, s.first, s.end, s.first, s.scores + p * job.block * panel);
  }
  if (job.pattern.group > 1) sum_groups(job, s);
}

// Marks the weights at or below the threshold as removed.
void choose_below(const SweepJob& job, const Sweep& s, std::int64_t chunk, std::int64_t p) {
  std::int64_t index[panel];  // of column 0 of the block at each row; for group = 1, the place in the row-major block
  for (int lane = 0; lane < panel; ++lane) {
    index[lane] = (chunk * job.chunk_rows + p * panel + lane) / job.pattern.group * (s.end - s.first);
  }
  for (std::int64_t c = 0; c < s.end - s.first; ++c) {
    for (int n = 0; n < panel_vectors; ++n) {
      const std::int64_t at = (p * job.block + c) * panel + n * f64_lanes;
      const f64 v = load(s.scores + at);
      const i64 first = load(index + n * f64_lanes) + c <= job.threshold->index;
      const i64 goes = (v < job.threshold->score) | ((v == job.threshold->score) & first);
      store(s.gone + at, goes ? splat(1.0) : f64{});
    }
  }
}

// In each row, marks all but the n highest of the m scores at `scores` as removed; of equal scores the lower column
// stays.
inline void choose_of_m(const SweepJob& job, const double* scores, double* gone) {
  for (int n = 0; n < panel_vectors; ++n) {
    for (std::int64_t j = 0; j < job.pattern.m; ++j) {
      const f64 own = load(scores + j * panel + n * f64_lanes);
      i64 rank{};  // minus the number of scores that come before
      for (std::int64_t k = 0; k < j; ++k) rank += load(scores + k * panel + n * f64_lanes) >= own;
      for (std::int64_t k = j + 1; k < job.pattern.m; ++k) rank += load(scores + k * panel + n * f64_lanes) > own;
      store(gone + j * panel + n * f64_lanes, rank <= -job.pattern.n ? splat(1.0) : f64{});
    }
  }
}

// For each group of v rows and the m columns from the block's column `c` on: the 4 columns with the highest sums stay,
// and of these n in each row. A sum that is NaN comes last, so that of any m columns exactly 4 have a rank below 4.
void choose_vnm(const SweepJob& job, const Sweep& s, std::int64_t c) {
  double* sums = s.sums;
  for (std::int64_t row = 0; row < s.rows; row += job.pattern.group) {
    for (std::int64_t j = 0; j < job.pattern.m; ++j) {
      sums[j] = 0.0;
      for (std::int64_t r = row; r < row + job.pattern.group; ++r) {
        const std::int64_t at = (r / panel * job.block + c + j) * panel + r % panel;
        sums[j] += s.scores[at];
        s.gone[at] = 1.0;
      }
      if (!(sums[j] >= 0.0)) sums[j] = -1.0;
    }
    std::int64_t shared[4];
    int found = 0;
    for (std::int64_t j = 0; j < job.pattern.m; ++j) {
      int rank = 0;
      for (std::int64_t k = 0; k < job.pattern.m; ++k) rank += sums[k] > sums[j] || (sums[k] == sums[j] && k < j);
      if (rank < 4) shared[found++] = c + j;
    }
    for (std::int64_t r = row; r < row + job.pattern.group; ++r) {
      const std::int64_t base = r / panel * job.block * panel + r % panel;
      for (int i = 0; i < found; ++i) {
        const double own = s.scores[base + shared[i] * panel];
        int rank = 0;
        for (int k = 0; k < found; ++k) {
          const double other = s.scores[base + shared[k] * panel];
          rank += other > own || (other == own && k < i);
        }
        if (rank < job.pattern.n) s.gone[base + shared[i] * panel] = 0.0;
      }
    }
  }
}

// Sweeps columns of one panel from `column` on, whose masks are decided, in registers: applies the removals from column
// `begin` on, then the removals of these columns from left to right.
template <int cols>
inline void sweep_tile(const SweepJob& job, double* errors, std::int64_t begin, std::int64_t column,
                       const double* gone, double* columns) {
  f64 acc[cols][panel_vectors];
  load_tile(columns, acc);
  const double* factor = job.factor + column * job.n_in;
  multiply_tile<double, cols, panel_vectors>(factor + begin, job.n_in, 1, errors + begin * panel, panel, column - begin,
                                             acc);
#pragma GCC unroll 16
  for (int i = 0; i < cols; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < panel_vectors; ++n) {
      const std::int64_t at = i * panel + n * f64_lanes;
      const i64 goes = load(gone + at) != 0.0;
      const f64 e = goes ? -(acc[i][n] / factor[i * job.n_in + column + i]) : f64{};
      store(columns + at, goes ? f64{} : acc[i][n]);
      store(errors + column * panel + at, e);
#pragma GCC unroll 16
      for (int right = i + 1; right < cols; ++right) acc[right][n] += e * factor[right * job.n_in + column + i];
    }
  }
}

inline void sweep_columns(const SweepJob& job, double* errors, std::int64_t first, std::int64_t last,
                          std::int64_t origin, const double* gone, double* columns) {
  std::int64_t c = first;
  for (; c + tile_rows <= last; c += tile_rows) {
    const std::int64_t at = (c - origin) * panel;
    sweep_tile<tile_rows>(job, errors, first, c, gone + at, columns + at);
  }
  for (; c + 4 <= last; c += 4) {
    const std::int64_t at = (c - origin) * panel;
    sweep_tile<4>(job, errors, first, c, gone + at, columns + at);
  }
  for (; c < last; ++c) {
    const std::int64_t at = (c - origin) * panel;
    sweep_tile<1>(job, errors, first, c, gone + at, columns + at);
  }
}

// Sweeps the block that was reached: chooses its mask (N:M, V:N:M), or takes it from the threshold.
void sweep_block(const SweepJob& job, std::int64_t chunk, std::int64_t block) {
  const Sweep s = view(job, chunk, block);
  const std::int64_t together = job.pattern.shared ? s.panels : 1;  // panels whose masks are chosen together
  const std::int64_t step = job.pattern.m > 0 ? job.pattern.m : s.end - s.first;
  for (std::int64_t p = 0; p < s.panels; p += together) {
    for (std::int64_t c = s.first; c < s.end; c += step) {
      for (std::int64_t q = p; q < p + together; ++q) {
        if (job.pattern.m == 0) {
          choose_below(job, s, chunk, q);
          continue;
        }
        double* columns = s.columns + q * job.block * panel;
        double* scores = s.scores + q * job.block * panel;
        apply(job.factor + c * job.n_in + s.first, job.n_in, s.errors + (q * job.n_in + s.first) * panel, c - s.first,
              step, columns + (c - s.first) * panel);
        score(job, columns, c, c + step, s.first, scores);
        const std::int64_t at = (c - s.first) * panel;
        if (!job.pattern.shared) choose_of_m(job, scores + at, s.gone + q * job.block * panel + at);
      }
      if (job.pattern.shared) choose_vnm(job, s, c - s.first);
      for (std::int64_t q = p; q < p + together; ++q) {
        sweep_columns(job, s.errors + q * job.n_in * panel, c, c + step, s.first, s.gone + q * job.block * panel,
                      s.columns + q * job.block * panel);
      }
    }
  }
  for (std::int64_t row = 0; row < s.rows; ++row) {
    const double* columns = s.columns + row / panel * job.block * panel + row % panel;
    for (std::int64_t c = s.first; c < s.end; ++c) s.pruned[row * job.n_in + c] = columns[(c - s.first) * panel];
  }
}

}  // namespace
