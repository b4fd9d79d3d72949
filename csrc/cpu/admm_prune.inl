// The arithmetic of admm_prune, written once for every vector width. Included after vector.inl, by its rules.

typedef Vector<float>::type f32;

namespace {

constexpr int tile_floats = tile_width * lanes;
static_assert(admm_panel % tile_floats == 0 && admm_block_rows % tile_rows == 0, "tiles fill panels and blocks");

// acc = the tile's product, as in vector.inl.
inline void store_tile(float* out, std::int64_t step, const f32 (&acc)[tile_rows][tile_width]) {
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < tile_width; ++n) store(out + i * step + n * lanes, acc[i][n]);
  }
}

void project(const AdmmPruneJob& job, std::int64_t block) {
  const std::int64_t n_in = job.state.n_in;
  for (std::int64_t row = block * admm_block_rows; row < (block + 1) * admm_block_rows; ++row) {
    const bool exists = row < job.state.rows;
    const float* x = job.state.x + row * n_in;
    const bool* keep = job.keep + row * n_in;
    if (job.dense) {
      float* z = job.z + row * n_in;
      for (std::int64_t j = 0; j < n_in; ++j) z[j] = exists && keep[j] ? x[j] : 0.0f;
    } else if (exists) {
      float* values = job.values + row * n_in;
      std::int32_t* cols = job.cols + row * n_in;
      std::int64_t count = 0;
      for (std::int64_t j = 0; j < n_in; ++j) {
        // Written whether kept or not, and overwritten if not: no branch to mispredict.
        values[count] = x[j];
        cols[count] = static_cast<std::int32_t>(j);
        count += keep[j];
      }
      job.counts[row] = count;
    }
  }
}

// The row's kept values times the rows of one panel of Q. Sums go to `chains` accumulators in turn: enough independent
// ones to keep two multiply-adds a cycle busy, as many as fit 16 registers.
constexpr int chains = 3;
inline void multiply_list(const float* values, const std::int32_t* cols, std::int64_t count, const float* q,
                          f32 (&sum)[tile_width]) {
  f32 acc[chains][tile_width] = {};
  std::int64_t k = 0;
  for (; k + chains <= count; k += chains) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const float* right = q + std::int64_t{cols[k + c]} * admm_panel;
#pragma GCC unroll 4
      for (int n = 0; n < tile_width; ++n) acc[c][n] += load(right + n * lanes) * values[k + c];
    }
  }
  for (; k < count; ++k) {
    const float* right = q + std::int64_t{cols[k]} * admm_panel;
#pragma GCC unroll 4
    for (int n = 0; n < tile_width; ++n) acc[0][n] += load(right + n * lanes) * values[k];
  }
#pragma GCC unroll 4
  for (int n = 0; n < tile_width; ++n) sum[n] = acc[0][n] + acc[1][n] + acc[2][n];
}

// With Z~ = Z Q: U~ += B~ - Z~, then B~ = (goal + rho (Z~ - U~)) / (eigenvalue + rho).
inline void update_row(const AdmmPruneJob& job, std::int64_t row, std::int64_t col, const f32 (&z)[tile_width]) {
  const std::int64_t at = row * job.padded_n + col;
#pragma GCC unroll 4
  for (int n = 0; n < tile_width; ++n) {
    const std::int64_t here = at + n * lanes;
    const f32 u = load(job.state.u + here) + load(job.state.b + here) - z[n];
    const f32 b = (load(job.state.goal + here) + (z[n] - u) * job.rho) /
                  (load(job.state.eigenvalues + col + n * lanes) + job.rho);
    store(job.state.u + here, u * job.shrink);
    store(job.state.b + here, b);
  }
}

void update(const AdmmPruneJob& job, std::int64_t block, std::int64_t panel) {
  const std::int64_t n_in = job.state.n_in;
  const std::int64_t begin = block * admm_block_rows;
  for (std::int64_t col = 0; col < admm_panel; col += tile_floats) {
    const float* q = job.state.q + panel * n_in * admm_panel + col;
    const std::int64_t to = panel * admm_panel + col;
    if (job.dense) {
      for (std::int64_t row = begin; row < begin + admm_block_rows; row += tile_rows) {
        f32 acc[tile_rows][tile_width] = {};
        multiply_tile<float, tile_rows, tile_width>(job.z + row * n_in, n_in, 1, q, admm_panel, n_in, acc);
#pragma GCC unroll 8
        for (int i = 0; i < tile_rows; ++i) update_row(job, row + i, to, acc[i]);
      }
    } else {
      const std::int64_t end = begin + admm_block_rows < job.state.rows ? begin + admm_block_rows : job.state.rows;
      for (std::int64_t row = begin; row < end; ++row) {
        f32 z[tile_width];
        multiply_list(job.values + row * n_in, job.cols + row * n_in, job.counts[row], q, z);
        update_row(job, row, to, z);
      }
    }
  }
}

// x <- B~ Qᵀ + shrink U, where U = x - Z is x itself where it was not kept and 0 elsewhere.
void expand(const AdmmPruneJob& job, std::int64_t block, std::int64_t panel) {
  const std::int64_t n_in = job.state.n_in;
  for (std::int64_t part = 0; part < admm_panel; part += tile_floats) {
    const std::int64_t col = panel * admm_panel + part;
    const std::int64_t cols = n_in - col < tile_floats ? n_in - col : tile_floats;
    const float* qt = job.state.qt + panel * job.padded_n * admm_panel + part;
    for (std::int64_t row = block * admm_block_rows; row < (block + 1) * admm_block_rows; row += tile_rows) {
      f32 acc[tile_rows][tile_width] = {};
      multiply_tile<float, tile_rows, tile_width>(job.state.b + row * job.padded_n, job.padded_n, 1, qt, admm_panel,
                                                  job.padded_n, acc);
      float tile[tile_rows * tile_floats];
      store_tile(tile, tile_floats, acc);
      for (std::int64_t i = 0; i < tile_rows && row + i < job.state.rows; ++i) {
        const std::int64_t at = (row + i) * n_in + col;
        for (std::int64_t j = 0; j < cols; ++j) {
          const float x = tile[i * tile_floats + j] + (job.keep[at + j] ? 0.0f : job.state.x[at + j] * job.shrink);
          job.state.x[at + j] = x;
          job.state.scores[at + j] = x * x;
        }
      }
    }
  }
}

}  // namespace

const AdmmPruneKernel kernel = {project, update, expand};
