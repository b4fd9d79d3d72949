// The arithmetic of admm_prune, written once for every vector width. Compiled by isa/floats.h.

typedef Vector<float>::type f32;

namespace {

// A tile of the products: as many sums as the registers hold beside their operands.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int tile_width = lanes == 4 ? 2 : 3;
constexpr int tile_floats = tile_width * lanes;
static_assert(admm_panel % tile_floats == 0 && admm_block_rows % tile_rows == 0, "tiles fill panels and blocks");

// x <- shrink (x - Z), as a product with 0 or shrink: a branch would be mispredicted at every other weight.
inline void shrink_rest(float* __restrict x, const unsigned char* __restrict keep, std::int64_t n, float shrink) {
  for (std::int64_t j = 0; j < n; ++j) x[j] *= shrink * static_cast<float>(1 - keep[j]);
}

// z <- Z, then x <- shrink (x - Z).
inline void split(float* __restrict x, const unsigned char* __restrict keep, std::int64_t n, float shrink,
                  float* __restrict z) {
  for (std::int64_t j = 0; j < n; ++j) z[j] = x[j] * static_cast<float>(keep[j]);
  shrink_rest(x, keep, n, shrink);
}

void project(const AdmmPruneJob& job, std::int64_t block) {
  const std::int64_t n_in = job.state.n_in;
  const float shrink = job.shrink;
  for (std::int64_t row = block * admm_block_rows; row < (block + 1) * admm_block_rows; ++row) {
    float* x = job.state.x + row * n_in;
    const auto* keep = reinterpret_cast<const unsigned char*>(job.keep) + row * n_in;
    if (row >= job.state.rows) {
      for (std::int64_t j = 0; job.dense && j < n_in; ++j) job.z[row * n_in + j] = 0.0f;
    } else if (job.dense) {
      split(x, keep, n_in, shrink, job.z + row * n_in);
    } else {
      float* __restrict values = job.values + row * n_in;
      std::int32_t* __restrict cols = job.cols + row * n_in;
      std::int64_t count = 0;
      for (std::int64_t j = 0; j < n_in; ++j) {
        // Written whether kept or not, and overwritten if not: no branch here either.
        values[count] = x[j];
        cols[count] = static_cast<std::int32_t>(j);
        count += keep[j];
      }
      job.counts[row] = count;
      shrink_rest(x, keep, n_in, shrink);
    }
  }
}

// Multiplies the row's kept values by the rows of one panel of Q. The terms go to `chains` accumulators alternately:
// enough to keep two multiply-adds per cycle busy, and as many as fit 16 registers.
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

// x += B~ Qᵀ.
void expand(const AdmmPruneJob& job, std::int64_t block, std::int64_t panel) {
  const std::int64_t n_in = job.state.n_in;
  for (std::int64_t part = 0; part < admm_panel; part += tile_floats) {
    const std::int64_t col = panel * admm_panel + part;
    const float* qt = job.state.qt + panel * job.padded_n * admm_panel + part;
    for (std::int64_t row = block * admm_block_rows; row < (block + 1) * admm_block_rows; row += tile_rows) {
      f32 acc[tile_rows][tile_width] = {};
      multiply_tile<float, tile_rows, tile_width>(job.state.b + row * job.padded_n, job.padded_n, 1, qt, admm_panel,
                                                  job.padded_n, acc);
      float* x = job.state.x + row * n_in + col;
      float* scores = job.state.scores + row * n_in + col;
      if (col + tile_floats <= n_in && row + tile_rows <= job.state.rows) {
#pragma GCC unroll 8
        for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < tile_width; ++n) {
            const f32 sum = acc[i][n] + load(x + i * n_in + n * lanes);
            store(x + i * n_in + n * lanes, sum);
            store(scores + i * n_in + n * lanes, sum * sum);
          }
        }
        continue;
      }
      // Through memory: an index that the compiler cannot resolve would keep acc out of registers in the code above
      // too.
      float tile[tile_rows][tile_floats];
#pragma GCC unroll 8
      for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
        for (int n = 0; n < tile_width; ++n) store(tile[i] + n * lanes, acc[i][n]);
      }
      for (std::int64_t i = 0; i < tile_rows && row + i < job.state.rows; ++i) {
        for (std::int64_t j = 0; j < tile_floats && col + j < n_in; ++j) {
          x[i * n_in + j] += tile[i][j];
          scores[i * n_in + j] = x[i * n_in + j] * x[i * n_in + j];
        }
      }
    }
  }
}

}  // namespace

const AdmmPruneKernel kernel = {project, update, expand};
