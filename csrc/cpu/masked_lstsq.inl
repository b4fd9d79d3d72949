// The arithmetic of masked_lstsq, written once for every vector width. Compiled by isa/floats.h.
// Each group solves A x = b with A = H on its support. The factor U of A = Uᵀ U, upper triangular, is computed one row
// tile after the other, each from all rows above it (left-looking). The products of a tile never leave the registers.
// The right-hand sides are treated as further columns of A, so the same code turns them into U⁻ᵀ b. All padding is zero
// and stays zero.

typedef Vector<double>::type f64;

namespace {

// A tile of sums: as many as the registers hold beside their operands.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int tile_width = lanes == 4 ? 2 : 3;
constexpr int vector_size = Vector<double>::size;
constexpr int panel = tile_width * vector_size;
static_assert(panel % tile_rows == 0, "the rows of a tile are columns of one panel");

// Everything is cut into panels of `panel` columns, row after row within a panel, so that each panel is read as one
// stream whatever k is.
struct System {
  std::int64_t k;   // columns of the support
  double* u;        // panel p of U: rows 0 to (p + 1) panel, at panel_of(p)
  double* b;        // panels of right-hand sides, each [padded_k, panel]
  double* inverse;  // [padded_k], 1 / U_ii
};

inline std::int64_t padded(std::int64_t k) { return ceil_div(k, panel) * panel; }
inline std::int64_t panel_of(std::int64_t p) { return p * (p + 1) / 2 * (panel * panel); }

std::int64_t workspace(std::int64_t k, std::int64_t g) {
  return panel_of(ceil_div(k, panel)) + ceil_div(g, panel) * padded(k) * panel + padded(k);
}

// acc <- U⁻ᵀ acc for one tile's rows. triangle: U on the tile's diagonal, with rows `step` apart.
template <int width>
inline void substitute(const double* triangle, std::int64_t step, const double* inverse, f64 (&acc)[tile_rows][width]) {
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n) acc[i][n] *= inverse[i];
#pragma GCC unroll 8
    for (int r = i + 1; r < tile_rows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < width; ++n) acc[r][n] -= acc[i][n] * triangle[i * step + r];
    }
  }
}

// acc = c - aᵀ b over the `depth` rows above a tile: a and b point at row 0, c at the tile in b's panel.
template <int width>
inline void remainder(const double* a, const double* b, std::int64_t depth, const double* c,
                      f64 (&acc)[tile_rows][width]) {
  multiply_tile<double, tile_rows, width>(a, 1, panel, b, panel, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n) acc[i][n] = load(c + i * panel + n * vector_size) - acc[i][n];
  }
}

template <int width>
inline void store_tile(double* c, const f64 (&acc)[tile_rows][width]) {
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n) store(c + i * panel + n * vector_size, acc[i][n]);
  }
}

// Computes rows [row, row + tile_rows) of U in the panel that holds their diagonal. Returns -1, or the failing pivot.
std::int64_t diagonal_tile(const System& s, std::int64_t row) {
  double* above = s.u + panel_of(row / panel);
  double* c = above + row * panel;
  const std::int64_t first = row % panel;  // column of the tile's first diagonal element in the panel
  f64 acc[tile_rows][tile_width] = {};
  remainder(above + first, above, row, c, acc);
  store_tile(c, acc);
  double triangle[tile_rows * tile_rows];
  for (int i = 0; i < tile_rows; ++i) {
    for (int j = i; j < tile_rows; ++j) triangle[i * tile_rows + j] = c[i * panel + first + j];
  }
  for (int i = 0; i < tile_rows; ++i) {
    if (row + i >= s.k) {
      s.inverse[row + i] = 0.0;
      continue;
    }
    const double pivot = triangle[i * tile_rows + i];
    if (!(pivot > 0.0)) return row + i;  // NaN included
    const double inverse = 1.0 / __builtin_sqrt(pivot);
    s.inverse[row + i] = inverse;
    for (int j = i + 1; j < tile_rows; ++j) triangle[i * tile_rows + j] *= inverse;
    for (int r = i + 1; r < tile_rows; ++r) {
      for (int j = r; j < tile_rows; ++j) {
        triangle[r * tile_rows + j] -= triangle[i * tile_rows + r] * triangle[i * tile_rows + j];
      }
    }
  }
  substitute(triangle, tile_rows, s.inverse + row, acc);
  store_tile(c, acc);
  return -1;
}

// Computes rows [row, row + panel) of one panel to the right of their diagonal, or of right-hand sides.
template <int width>
void panel_rows(const System& s, std::int64_t row, double* right) {
  const double* above = s.u + panel_of(row / panel);
  for (std::int64_t i = row; i < row + panel && i < s.k; i += tile_rows) {
    const double* a = above + (i - row);
    double* c = right + i * panel;
    f64 acc[tile_rows][width] = {};
    remainder(a, right, i, c, acc);
    substitute(a + i * panel, panel, s.inverse + i, acc);
    store_tile(c, acc);
  }
}

// x <- U⁻¹ x in one panel of right-hand sides, last rows first.
template <int width>
void back_substitute(const System& s, double* x) {
  for (std::int64_t i = (ceil_div(s.k, tile_rows) - 1) * tile_rows; i >= 0; i -= tile_rows) {
    f64 acc[tile_rows][width] = {};
    for (std::int64_t j = i + tile_rows; j < s.k;) {
      const std::int64_t p = j / panel;
      const std::int64_t end = (p + 1) * panel < s.k ? (p + 1) * panel : s.k;
      multiply_tile<double, tile_rows, width>(s.u + panel_of(p) + i * panel + j % panel, panel, 1, x + j * panel,
                                              panel, end - j, acc);
      j = end;
    }
    const double* triangle = s.u + panel_of(i / panel) + i * panel + i % panel;
#pragma GCC unroll 8
    for (int r = tile_rows - 1; r >= 0; --r) {
#pragma GCC unroll 4
      for (int n = 0; n < width; ++n) {
        f64 sum = load(x + (i + r) * panel + n * vector_size) - acc[r][n];
        sum *= s.inverse[i + r];
        store(x + (i + r) * panel + n * vector_size, sum);
#pragma GCC unroll 8
        for (int above = 0; above < r; ++above) acc[above][n] += sum * triangle[above * panel + r];
      }
    }
  }
}

// Calls fn.run<width>() with the number of vectors that `columns` columns of a panel take.
template <int width, typename Fn>
inline void with_width(std::int64_t columns, const Fn& fn) {
  if constexpr (width > 1) {
    if (columns <= (width - 1) * vector_size) return with_width<width - 1>(columns, fn);
  }
  fn.template run<width>();
}

struct PanelRows {
  const System& s;
  std::int64_t row;
  double* right;
  template <int width>
  void run() const { panel_rows<width>(s, row, right); }
};

struct BackSubstitute {
  const System& s;
  double* x;
  template <int width>
  void run() const { back_substitute<width>(s, x); }
};

// Copies rows [row, row + panel) of H on the support, from the diagonal on; reads only H's upper triangle.
void gather(const MaskedLstsqJob& job, const System& s, const std::int32_t* cols, std::int64_t row) {
  const std::int64_t panels = ceil_div(s.k, panel);
  for (std::int64_t i = row; i < row + panel; ++i) {
    const double* from = job.h + (i < s.k ? cols[i] : 0) * job.n_in;
    for (std::int64_t p = row / panel; p < panels; ++p) {
      double* to = s.u + panel_of(p) + i * panel;
      const std::int32_t* here = cols + p * panel;
      if (p > row / panel && (p + 1) * panel <= s.k) {
        // A whole panel: by far the most common case, and a loop that the compiler can unroll.
        for (std::int64_t j = 0; j < panel; ++j) to[j] = from[here[j]];
      } else {
        for (std::int64_t j = 0; j < panel; ++j) {
          const std::int64_t col = p * panel + j;
          to[j] = i <= col && col < s.k ? from[here[j]] : 0.0;
        }
      }
    }
  }
}

// v = t - cᵀ H_S: for some rows of one panel of solutions c, on `width` vectors of columns from `col` on.
constexpr int update_rows = 4;
template <int width>
inline void update(const MaskedLstsqJob& job, const System& s, const std::int32_t* cols, const double* c,
                   const std::int32_t* rows, std::int64_t n_rows, std::int64_t col) {
  f64 acc[update_rows][width] = {};
  for (std::int64_t i = 0; i < s.k; ++i) {
    multiply_tile<double, update_rows, width>(c + i * panel, 1, 0, job.h + cols[i] * job.n_in + col, 0, 1, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < update_rows; ++r) {
    if (r >= n_rows) break;
    const std::int64_t at = rows[r] * job.n_in + col;
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n) {
      store(job.v + at + n * vector_size, load(job.target + at + n * vector_size) - acc[r][n]);
    }
  }
}

void write_complement(const MaskedLstsqJob& job, const System& s, const std::int32_t* cols, const double* c,
                      const std::int32_t* rows, std::int64_t n_rows) {
  std::int64_t col = 0;
  for (; col + panel <= job.n_in; col += panel) update<tile_width>(job, s, cols, c, rows, n_rows, col);
  for (; col + vector_size <= job.n_in; col += vector_size) update<1>(job, s, cols, c, rows, n_rows, col);
  for (; col < job.n_in; ++col) {
    for (std::int64_t r = 0; r < n_rows; ++r) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < s.k; ++i) sum += c[i * panel + r] * job.h[cols[i] * job.n_in + col];
      job.v[rows[r] * job.n_in + col] = job.target[rows[r] * job.n_in + col] - sum;
    }
  }
  for (std::int64_t r = 0; r < n_rows; ++r) {
    for (std::int64_t i = 0; i < s.k; ++i) job.v[rows[r] * job.n_in + cols[i]] = 0.0;
  }
}

std::int64_t solve(const MaskedLstsqJob& job, const std::int32_t* cols, std::int64_t k, const std::int32_t* rows,
                   std::int64_t g, double* work) {
  const std::int64_t panels = ceil_div(k, panel);
  const std::int64_t b_panel = padded(k) * panel;
  double* b = work + panel_of(panels);
  const System s{k, work, b, b + ceil_div(g, panel) * b_panel};

  for (std::int64_t j0 = 0; j0 < g; j0 += panel, b += b_panel) {
    for (std::int64_t i = 0; i < b_panel; ++i) b[i] = 0.0;
    for (std::int64_t j = 0; j < panel && j0 + j < g; ++j) {
      const double* from = job.target + rows[j0 + j] * job.n_in;
      for (std::int64_t i = 0; i < k; ++i) b[i * panel + j] = from[cols[i]];
    }
  }
  for (std::int64_t row = 0; row < k; row += panel) {
    gather(job, s, cols, row);
    for (std::int64_t i = row; i < row + panel && i < k; i += tile_rows) {
      const std::int64_t failed = diagonal_tile(s, i);
      if (failed >= 0) return failed;
    }
    for (std::int64_t p = row / panel + 1; p < panels; ++p) {
      with_width<tile_width>(k - p * panel, PanelRows{s, row, s.u + panel_of(p)});
    }
    for (std::int64_t j = 0; j < g; j += panel) {
      with_width<tile_width>(g - j, PanelRows{s, row, s.b + j / panel * b_panel});
    }
  }
  for (std::int64_t j0 = 0; j0 < g; j0 += panel) {
    double* x = s.b + j0 / panel * b_panel;
    const std::int64_t filled = g - j0 < panel ? g - j0 : panel;
    with_width<tile_width>(filled, BackSubstitute{s, x});
    if (job.complement) {
      for (std::int64_t j = 0; j < filled; j += update_rows) {
        const std::int64_t n_rows = filled - j < update_rows ? filled - j : update_rows;
        write_complement(job, s, cols, x + j, rows + j0 + j, n_rows);
      }
    } else {
      for (std::int64_t j = 0; j < filled; ++j) {
        double* to = job.v + rows[j0 + j] * job.n_in;
        for (std::int64_t i = 0; i < k; ++i) to[cols[i]] = x[i * panel + j];
      }
    }
  }
  return -1;
}

}  // namespace

const MaskedLstsqKernel kernel = {workspace, solve};
