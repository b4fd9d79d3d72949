// The removals of one group of rows, written once for every vector width. Included after vector.inl, by its rules.

namespace {

// Columns are stored at positions, in their original order. Positions are cut into panels of `panel`, so that the data
// of one panel is contiguous: removed[panel][deferred][panel], weight[panel][group][panel]. A position whose column may
// no longer be removed, or that only fills up the last panel, has the weight NaN in the group's first row. Its score is
// then NaN too, which is never the lowest.
struct Trace {
  double* base;     // [stride rows, stride], i <= j; unused until the first new base
  double* removed;  // the v of the removals since the base was written
  double* weight;
  double* pivots;   // [positions], diagonal of the current inverse
  double* column;   // [positions], one column of the base
  double* rows;     // [tile_rows, positions], rows of the next base, before the open columns are picked
  double* left;     // [deferred, tile_rows], the negated v at these rows
  double* factors;  // [max(deferred, group)]
  std::int32_t* columns;   // [positions], the original column of each
  std::int32_t* open;      // [positions]
  std::int32_t* run_ends;  // [positions]
  std::int32_t* lost;      // [banks], removals per bank

  std::int64_t stride;  // between rows of base; in the shared inverse it is n_in
  std::int64_t size;    // positions in use
  std::int64_t held;    // removals since the base was written
  bool shared;          // the base is still the inverse that was given
};

struct Lowest {
  f64 score[panel_vectors];
  i64 where[panel_vectors];  // panel of the score, per lane
};

inline std::int64_t panels_of(std::int64_t positions) { return (positions + panel - 1) / panel; }

template <typename T>
inline T* take(char*& memory, std::int64_t count) {
  T* taken = reinterpret_cast<T*>(memory);
  memory += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
  return taken;
}

// Cuts up the working memory of a trace; returns its end.
inline char* lay_out(const TraceJob& job, char* memory, Trace& trace) {
  const std::int64_t positions = panels_of(job.n_in) * panel;
  const std::int64_t later = job.steps > job.deferred ? job.n_in - job.deferred : 0;  // columns of the first new base
  // An odd number of cache lines between rows: a column then spreads over all sets of a cache.
  trace.stride = (panels_of(later) * panel + 7) / 8 * 8;
  if (trace.stride % 16 == 0) trace.stride += 8;
  trace.base = take<double>(memory, later * trace.stride + panel);
  trace.removed = take<double>(memory, positions * job.deferred);
  trace.weight = take<double>(memory, positions * job.group);
  trace.pivots = take<double>(memory, positions);
  trace.column = take<double>(memory, positions);
  trace.rows = take<double>(memory, positions * tile_rows + panel);
  trace.left = take<double>(memory, job.deferred * tile_rows);
  trace.factors = take<double>(memory, job.deferred > job.group ? job.deferred : job.group);
  trace.columns = take<std::int32_t>(memory, positions);
  trace.open = take<std::int32_t>(memory, positions);
  trace.run_ends = take<std::int32_t>(memory, positions);
  trace.lost = take<std::int32_t>(memory, job.banks.width > 0 ? job.n_in / job.banks.width : 0);
  return memory;
}

inline double& weight_at(const TraceJob& job, const Trace& trace, std::int64_t row, std::int64_t position) {
  return trace.weight[(position / panel * job.group + row) * panel + position % panel];
}

inline void close(const TraceJob& job, const Trace& trace, std::int64_t position) {
  weight_at(job, trace, 0, position) = __builtin_nan("");
}

inline void fill_last_panel(const TraceJob& job, const Trace& trace) {
  for (std::int64_t i = trace.size; i < panels_of(trace.size) * panel; ++i) {
    for (std::int64_t row = 0; row < job.group; ++row) weight_at(job, trace, row, i) = 0.0;
    close(job, trace, i);
    trace.pivots[i] = 1.0;
    trace.column[i] = 0.0;
  }
}

void start(const TraceJob& job, std::int64_t group, Trace& trace) {
  trace.size = job.n_in;
  trace.held = 0;
  trace.shared = true;
  const double* weight = job.weight + group * job.group * job.n_in;
  for (std::int64_t i = 0; i < job.n_in; ++i) {
    for (std::int64_t row = 0; row < job.group; ++row) weight_at(job, trace, row, i) = weight[row * job.n_in + i];
    trace.pivots[i] = job.inverse[i * job.n_in + i];
    trace.columns[i] = static_cast<std::int32_t>(i);
  }
  fill_last_panel(job, trace);
  if (job.banks.width > 0) {
    for (std::int64_t bank = 0; bank < job.n_in / job.banks.width; ++bank) trace.lost[bank] = 0;
  }
}

inline void compare(Lowest& lowest, std::int64_t p, int n, f64 squares, f64 pivots) {
  const f64 score = squares / pivots;
  const i64 below = score < lowest.score[n];
  lowest.score[n] = below ? score : lowest.score[n];
  lowest.where[n] = below ? i64{} + p : lowest.where[n];
}

inline void reset(Lowest& lowest) {
  for (int n = 0; n < panel_vectors; ++n) {
    lowest.score[n] = splat(__builtin_inf());
    lowest.where[n] = i64{};
  }
}

void score_all(const TraceJob& job, const Trace& trace, Lowest& lowest) {
  reset(lowest);
  for (std::int64_t p = 0; p < panels_of(trace.size); ++p) {
    for (int n = 0; n < panel_vectors; ++n) {
      const double* weight = trace.weight + p * job.group * panel + n * f64_lanes;
      f64 squares{};
      for (std::int64_t row = 0; row < job.group; ++row) {
        const f64 w = load(weight + row * panel);
        squares += w * w;
      }
      compare(lowest, p, n, squares, load(trace.pivots + p * panel + n * f64_lanes));
    }
  }
}

// The position of the lowest score, of equal ones the lower position; -1 if no score is below infinity.
inline std::int64_t position_of(const Lowest& lowest, double& score) {
  std::int64_t best = -1;
  score = __builtin_inf();
  for (int n = 0; n < panel_vectors; ++n) {
    for (int lane = 0; lane < f64_lanes; ++lane) {
      const double value = lowest.score[n][lane];
      const std::int64_t position = lowest.where[n][lane] * panel + n * f64_lanes + lane;
      if (value < score || (value == score && position < best)) {
        score = value;
        best = position;
      }
    }
  }
  return best;
}

// Counts a removal in its bank, and closes the bank's other columns if it may lose no more.
void count_in_bank(const TraceJob& job, Trace& trace, std::int64_t position) {
  if (job.banks.width == 0) return;
  const std::int64_t bank = trace.columns[position] / job.banks.width;
  if (++trace.lost[bank] < job.banks.removals) return;
  std::int64_t i = position;
  while (i > 0 && trace.columns[i - 1] / job.banks.width == bank) --i;
  for (; i < trace.size && trace.columns[i] / job.banks.width == bank; ++i) close(job, trace, i);
}

// Removes the column at `position`: appends its v to the others, and updates weights, pivots and scores.
void remove_column(const TraceJob& job, Trace& trace, std::int64_t position, Lowest& lowest) {
  const std::int64_t size = trace.size;
  if (trace.shared) {
    const double* row = job.inverse + position * job.n_in;
    for (std::int64_t i = 0; i < size; ++i) trace.column[i] = row[i];
  } else {
    const double* above = trace.base + position;
    for (std::int64_t i = 0; i < position; ++i) trace.column[i] = above[i * trace.stride];
    const double* row = trace.base + position * trace.stride;
    for (std::int64_t i = position; i < size; ++i) trace.column[i] = row[i];
  }
  const double* own = trace.removed + position / panel * job.deferred * panel + position % panel;
  for (std::int64_t k = 0; k < trace.held; ++k) trace.left[k] = -own[k * panel];
  const double scale = 1.0 / __builtin_sqrt(trace.pivots[position]);
  for (std::int64_t row = 0; row < job.group; ++row) {
    trace.factors[row] = weight_at(job, trace, row, position) * scale;
  }
  close(job, trace, position);
  count_in_bank(job, trace, position);

  reset(lowest);
  for (std::int64_t p = 0; p < panels_of(size); ++p) {
    double* removed = trace.removed + p * job.deferred * panel;
    f64 v[1][panel_vectors];
#pragma GCC unroll 8
    for (int n = 0; n < panel_vectors; ++n) v[0][n] = load(trace.column + p * panel + n * f64_lanes);
    multiply_tile<double, 1, panel_vectors>(trace.left, 0, 1, removed, panel, trace.held, v);
#pragma GCC unroll 8
    for (int n = 0; n < panel_vectors; ++n) {
      v[0][n] *= scale;
      store(removed + trace.held * panel + n * f64_lanes, v[0][n]);
      double* pivots = trace.pivots + p * panel + n * f64_lanes;
      const f64 pivot = load(pivots) - v[0][n] * v[0][n];
      store(pivots, pivot);
      double* weight = trace.weight + p * job.group * panel + n * f64_lanes;
      f64 squares{};
      for (std::int64_t row = 0; row < job.group; ++row) {
        const f64 w = load(weight + row * panel) - v[0][n] * trace.factors[row];
        store(weight + row * panel, w);
        squares += w * w;
      }
      compare(lowest, p, n, squares, pivot);
    }
  }
  ++trace.held;
}

// Writes a new base: the current inverse, on the open columns only. It is written in place, from the first row on: row
// i comes from row i or a later one, and all rows of a tile are read before any of them is written.
void rebase(const TraceJob& job, Trace& trace) {
  const double* old = trace.shared ? job.inverse : trace.base;
  const std::int64_t old_stride = trace.shared ? job.n_in : trace.stride;
  const std::int64_t old_panels = panels_of(trace.size);
  std::int64_t size = 0, runs = 0;
  for (std::int64_t i = 0; i < trace.size; ++i) {
    const double weight = weight_at(job, trace, 0, i);
    if (weight != weight) continue;
    if (size > 0 && trace.open[size - 1] != i - 1) trace.run_ends[runs++] = trace.open[size - 1] + 1;
    trace.open[size++] = static_cast<std::int32_t>(i);
  }
  if (size > 0) trace.run_ends[runs++] = trace.open[size - 1] + 1;

  const std::int64_t width = old_panels * panel;
  std::int64_t first_run = 0;
  for (std::int64_t i = 0; i < size; i += tile_rows) {
    const std::int64_t filled = size - i < tile_rows ? size - i : tile_rows;
    const double* source[tile_rows];
    for (int r = 0; r < tile_rows; ++r) {
      const std::int64_t position = trace.open[r < filled ? i + r : size - 1];
      source[r] = old + position * old_stride;
      const double* removed = trace.removed + position / panel * job.deferred * panel + position % panel;
      for (std::int64_t k = 0; k < trace.held; ++k) trace.left[k * tile_rows + r] = -removed[k * panel];
    }
    for (std::int64_t p = trace.open[i] / panel; p < old_panels; ++p) {
      f64 acc[tile_rows][panel_vectors];
      if ((p + 1) * panel <= old_stride) {
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
          for (int n = 0; n < panel_vectors; ++n) acc[r][n] = load(source[r] + p * panel + n * f64_lanes);
        }
      } else {
        for (int r = 0; r < tile_rows; ++r) {
          double values[panel] = {};
          for (std::int64_t j = p * panel; j < old_stride; ++j) values[j - p * panel] = source[r][j];
          for (int n = 0; n < panel_vectors; ++n) acc[r][n] = load(values + n * f64_lanes);
        }
      }
      multiply_tile<double, tile_rows, panel_vectors>(trace.left, 1, tile_rows,
                                                      trace.removed + p * job.deferred * panel, panel, trace.held, acc);
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < panel_vectors; ++n) store(trace.rows + r * width + p * panel + n * f64_lanes, acc[r][n]);
      }
    }
    while (trace.run_ends[first_run] <= trace.open[i]) ++first_run;
    for (std::int64_t r = 0; r < filled; ++r) {
      const double* from = trace.rows + r * width;
      double* to = trace.base + (i + r) * trace.stride;
      std::int64_t at = i;
      for (std::int64_t run = first_run; run < runs; ++run) {
        // Copies whole vectors: values copied too far are overwritten by the next run, or lie below the diagonal.
        const std::int64_t length = trace.run_ends[run] - trace.open[at];
        const double* begin = from + trace.open[at];
        for (std::int64_t j = 0; j < length; j += f64_lanes) store(to + at + j, load(begin + j));
        at += length;
      }
    }
  }

  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t position = trace.open[i];
    for (std::int64_t row = 0; row < job.group; ++row) {
      weight_at(job, trace, row, i) = weight_at(job, trace, row, position);
    }
    trace.pivots[i] = trace.pivots[position];
    trace.columns[i] = trace.columns[position];
  }
  trace.size = size;
  trace.held = 0;
  trace.shared = false;
  fill_last_panel(job, trace);
}

void trace_group(const TraceJob& job, std::int64_t group, void* memory) {
  Trace trace;
  lay_out(job, static_cast<char*>(memory), trace);
  start(job, group, trace);
  std::int32_t* order = job.order + group * job.steps;
  double* losses = job.losses + group * job.steps;
  Lowest lowest;
  score_all(job, trace, lowest);
  for (std::int64_t step = 0; step < job.steps; ++step) {
    if (trace.held == job.deferred) {
      rebase(job, trace);
      score_all(job, trace, lowest);
    }
    const std::int64_t position = position_of(lowest, losses[step]);
    if (position < 0) {
      // The inverse has lost its positive diagonal to rounding; the caller sees this from the NaN losses.
      for (; step < job.steps; ++step) {
        order[step] = 0;
        losses[step] = __builtin_nan("");
      }
      return;
    }
    order[step] = trace.columns[position];
    if (step + 1 == job.steps) return;
    remove_column(job, trace, position, lowest);
  }
}

std::int64_t trace_bytes(const TraceJob& job) {
  Trace trace;
  return lay_out(job, nullptr, trace) - static_cast<char*>(nullptr);
}

}  // namespace
