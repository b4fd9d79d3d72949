// The arithmetic of sparse_matmul, written once for every vector width. Included after panel.inl, by its rules.

namespace {

void pack(const TransposeJob<float>& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t n = job.n;
  const std::int64_t width = std::int64_t{job.shape.width_vectors} * lanes;
  const std::int64_t end = (part + 1) * job.part < n ? (part + 1) * job.part : n;
  const float* x = job.rows + panel * width * n;
  pack_tokens(part * job.part, end, width, job.shape.tokens - panel * width, job.panels + panel * n * width,
              [&](std::int64_t t, std::int64_t k, auto read) { return read(x + t * n + k); });
}

void unpack(const TransposeJob<float>& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t n = job.n;
  const std::int64_t width = std::int64_t{job.shape.width_vectors} * lanes;
  const std::int64_t end = (part + 1) * job.part < n ? (part + 1) * job.part : n;
  const float* in = job.panels + panel * n * width;
  float* y = job.rows + panel * width * n;
  const std::int64_t filled = job.shape.tokens - panel * width;

  std::int64_t r = part * job.part;
  for (; r + lanes <= end; r += lanes) {
    for (std::int64_t t = 0; t < width && t < filled; t += lanes) {
      f32 v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = load(in + (r + i) * width + t);
      transpose(v);
      if (t + lanes <= filled) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(y + (t + i) * n + r, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (t + i < filled) store(y + (t + i) * n + r, v[i]);
        }
      }
    }
  }
  for (; r < end; ++r) {
    for (std::int64_t t = 0; t < width && t < filled; ++t) y[t * n + r] = in[r * width + t];
  }
}

// Finishes the sums of one row for `count` vectors -> y.
template <int count>
inline void finish_row(const LinearJob<float>& job, std::int64_t row, const f32 (&sums)[count], float* y) {
  const float bias = job.linear->bias != nullptr ? job.linear->bias[row] : 0.0f;
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) {
    f32& out = *reinterpret_cast<f32*>(y + n * lanes);
    const f32 value = activate(sums[n] + bias, job.linear->activation);
    out = job.add ? out + value : value;
  }
}

// One row times one panel. The row's products go to `chains` accumulators in turn, whatever the width, so that a
// token's result never depends on how many share its panel.
template <int width_vectors>
inline void multiply_row(const LinearJob<float>& job, const float* panel, std::int64_t row, float* y) {
  constexpr int width = width_vectors * lanes;
  const CsrMatrix& w = *job.linear->csr;
  f32 acc[chains][width_vectors] = {};
  std::int64_t j = w.row_ptr[row];
  const std::int64_t end = w.row_ptr[row + 1];
  for (; j + chains <= end; j += chains) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      const float* x = panel + std::int64_t{w.cols[j + c]} * width;
      const float value = w.values[j + c];
#pragma GCC unroll 8
      for (int n = 0; n < width_vectors; ++n) acc[c][n] += *reinterpret_cast<const f32*>(x + n * lanes) * value;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < chains - 1; ++c) {
    if (j + c >= end) break;
    const float* x = panel + std::int64_t{w.cols[j + c]} * width;
    const float value = w.values[j + c];
#pragma GCC unroll 8
    for (int n = 0; n < width_vectors; ++n) acc[c][n] += *reinterpret_cast<const f32*>(x + n * lanes) * value;
  }
#pragma GCC unroll 8
  for (int n = 0; n < width_vectors; ++n) {
#pragma GCC unroll 8
    for (int c = 1; c < chains; ++c) acc[0][n] += acc[c][n];
  }
  finish_row(job, row, acc[0], y);
}

// `tiles` times group_tile rows of a group and `count` vectors of a panel. A sum's products come in the order of the
// columns, whatever the tile.
template <int tiles, int count>
inline void multiply_tiles(const LinearJob<float>& job, std::int64_t group, std::int64_t tile, const float* x,
                           std::int64_t width, float* y) {
  const GroupedMatrix& w = *job.linear->grouped;
  const std::uint16_t* cols = w.cols + w.col_begin[group];
  const std::int64_t kept = w.col_count[group];
  const float* values = w.values + w.value_begin[group] + tile * kept * group_tile;
  f32 acc[tiles * group_tile][count] = {};
  for (std::int64_t k = 0; k < kept; ++k) {
    const float* in = x + std::int64_t{cols[k]} * width;
    f32 right[count];
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) right[n] = *reinterpret_cast<const f32*>(in + n * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < tiles; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < group_tile; ++r) {
        const float value = values[(i * kept + k) * group_tile + r];
#pragma GCC unroll 8
        for (int n = 0; n < count; ++n) acc[i * group_tile + r][n] += right[n] * value;
      }
    }
  }
  const std::int32_t* rows = w.rows + group * group_rows + tile * group_tile;
  for (int r = 0; r < tiles * group_tile; ++r) {
    if (rows[r] >= 0) finish_row(job, rows[r], acc[r], y + rows[r] * width);
  }
}

// A group times `count` vectors of a panel, as many rows at once as keep the multiply-adds busy and fit the registers.
template <int count>
inline void multiply_group(const LinearJob<float>& job, std::int64_t group, const float* x, std::int64_t width,
                           float* y) {
  constexpr int tiles = count == 1 || lanes == 16 ? 2 : 1;
  for (std::int64_t tile = 0; tile < group_rows / group_tile; tile += tiles) {
    multiply_tiles<tiles, count>(job, group, tile, x, width, y);
  }
}

template <int width_vectors>
void multiply_width(const LinearJob<float>& job, std::int64_t panel, std::int64_t part) {
  if constexpr (width_vectors > 1) {
    if (job.shape.width_vectors < width_vectors) return multiply_width<width_vectors - 1>(job, panel, part);
  }
  constexpr int width = width_vectors * lanes;
  const float* x = job.x + panel * job.linear->n_in * width;
  float* y = job.y + panel * job.linear->n_out * width;
  const std::int64_t units = job.linear->csr != nullptr ? job.linear->n_out : job.linear->grouped->groups;
  const std::int64_t end = (part + 1) * job.unit < units ? (part + 1) * job.unit : units;
  if (job.linear->csr != nullptr) {
    for (std::int64_t row = part * job.unit; row < end; ++row) {
      multiply_row<width_vectors>(job, x, row, y + row * width);
    }
    return;
  }
  for (std::int64_t group = part * job.unit; group < end; ++group) {
    if constexpr (width_vectors == 4) {
      multiply_group<2>(job, group, x, width, y);
      multiply_group<2>(job, group, x + 2 * lanes, width, y + 2 * lanes);
    } else {
      multiply_group<width_vectors>(job, group, x, width, y);
    }
  }
}

void multiply(const LinearJob<float>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void*) {
  for (; panels > 0; --panels, ++panel) multiply_width<widest_rows>(job, panel, part);
}

std::int64_t work_bytes(const LinearJob<float>&) { return 0; }

constexpr int saturated = 12;  // multiply-adds that go on independently: more than two a cycle of latency 4 need

float saturate(std::int64_t steps) {
  f32 sums[saturated];
  for (int i = 0; i < saturated; ++i) sums[i] = splat(1.0f + static_cast<float>(i));
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < saturated; ++i) sums[i] = sums[i] * 0.5f + 1.0f;
  }
  f32 sum{};
  for (int i = 0; i < saturated; ++i) sum += sums[i];
  return sum[0];
}

}  // namespace

const SparseMatmulKernel<float> kernel = {lanes,    widest_rows, widest_groups, 1,        pack,
                                          unpack,   multiply,    work_bytes,    saturate, 2 * saturated * lanes};
