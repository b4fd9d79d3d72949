// The arithmetic of sparse_matmul, written once for every vector width. Compiled by isa/floats.h.

#include "panel.inl"
#include "epilogue.inl"

namespace {

// Vectors in the widest panel. With four vectors of AVX2 a group would be multiplied in two halves, each with only half
// of the first-level cache's sets.
constexpr int widest_rows = 4;
constexpr int widest_groups = lanes == 8 ? 3 : 4;

// Weights come from memory in each batch, unless the model is small. Within a row or a tile they are read in too many
// short streams for the processor to fetch them ahead, so the kernels do: the next rows of a group, and so many entries
// of a row.
constexpr int fetched_ahead = 512;

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

  // Goes through all values of `lanes` tokens before the next tokens, so that a line of y is complete before the next
  // rows come: rows may be a multiple of 4096 bytes apart, and then few of them fit the first-level cache.
  const std::int64_t begin = part * job.part, vectors = begin + (end - begin) / lanes * lanes;
  for (std::int64_t t = 0; t < width && t < filled; t += lanes) {
    for (std::int64_t r = begin; r < vectors; r += lanes) {
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
  for (std::int64_t r = vectors; r < end; ++r) {
    for (std::int64_t t = 0; t < width && t < filled; ++t) y[t * n + r] = in[r * width + t];
  }
}

void quantize(const QuantizeJob& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t end = (part + 1) * job.part < job.n ? (part + 1) * job.part : job.n;
  const float* x = job.x + panel * job.n * 4 * lanes;
  std::uint8_t* bytes = job.bytes + panel * job.n * 4 * lanes;
  for (std::int64_t k = part * job.part; k < end; ++k) {
    f32 values[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) values[n] = load(x + (k * 4 + n) * lanes);
    store(bytes + k * 4 * lanes, quantize(values, job.by.inverse[k], job.by.offset[k]));
  }
}

// Multiplies one slab of a slice. `x` is the slab's part of a panel, `y` the panel of results, where the sums are kept
// between slabs. The products of a sum are added in the order of its columns, whatever the width. Absent rows go to
// `spare`.
template <int width_vectors>
inline void multiply_slice(const LinearJob<float>& job, const std::int32_t* rows, std::int64_t count,
                           const std::uint8_t* cols, const float* values, bool first, bool last, const float* x,
                           float* y, float* spare) {
  constexpr int width = width_vectors * lanes;
  // As many rows at once as keep two multiply-adds per cycle busy and fit the 16 registers of AVX2.
  constexpr int at_once = width_vectors <= 2 ? 4 : 2;
  const Activation activation = last ? job.linear->activation : Activation::none;
#pragma GCC unroll 2
  for (int begin = 0; begin < slice_rows; begin += at_once, rows += at_once, cols += at_once, values += at_once) {
    float* out[at_once];
    f32 acc[at_once][width_vectors];
#pragma GCC unroll 4
    for (int r = 0; r < at_once; ++r) {
      out[r] = rows[r] >= 0 ? y + rows[r] * width : spare;
      const bool biased = first && job.linear->bias != nullptr && rows[r] >= 0;
      const f32 bias = splat(biased ? job.linear->bias[rows[r]] : 0.0f);
#pragma GCC unroll 4
      for (int n = 0; n < width_vectors; ++n) {
        acc[r][n] = first && !job.add ? bias : *reinterpret_cast<const f32*>(out[r] + n * lanes) + bias;
      }
    }
    for (std::int64_t k = 0; k < count; ++k) {
      if constexpr (width_vectors <= 2) {
        // Few tokens: there is less to compute than to read.
        __builtin_prefetch(values + k * slice_rows + fetched_ahead, 0, 2);
        __builtin_prefetch(cols + k * slice_rows + fetched_ahead, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < at_once; ++r) {
        const float* in = x + std::int64_t{cols[k * slice_rows + r]} * width;
        const float value = values[k * slice_rows + r];
#pragma GCC unroll 4
        for (int n = 0; n < width_vectors; ++n) acc[r][n] += *reinterpret_cast<const f32*>(in + n * lanes) * value;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < at_once; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < width_vectors; ++n) {
        *reinterpret_cast<f32*>(out[r] + n * lanes) = activate(acc[r][n], activation);
      }
    }
  }
}

// Multiplies some blocks of rows by one panel.
template <int width_vectors>
void multiply_blocks(const LinearJob<float>& job, std::int64_t block, std::int64_t end, const float* x, float* y) {
  constexpr int width = width_vectors * lanes;
  const SlicedMatrix& w = *job.linear->sliced;
  const std::int64_t from = block * (block_rows / slice_rows);
  const std::int64_t to = end == w.blocks ? w.slices : end * (block_rows / slice_rows);
  alignas(64) float spare[width] = {};
  for (std::int64_t slab = 0; slab < w.slabs; ++slab, x += slab_cols * width) {
    const bool first = slab == 0, last = slab == w.slabs - 1;
    const bool finishes = last && job.linear->activation != Activation::none;
    std::int64_t entry = w.begin[slab * w.blocks + block] * slice_rows;
    for (std::int64_t slice = slab * w.slices + from; slice < slab * w.slices + to; ++slice) {
      const std::int64_t count = w.counts[slice];
      if (count > 0 || first || finishes) {
        multiply_slice<width_vectors>(job, w.rows + slice * slice_rows, count, w.cols + entry, w.values + entry, first,
                                      last, x, y, spare);
      }
      entry += count * slice_rows;
    }
  }
}

// Multiplies `tiles` times group_slice rows of a group by `count` vectors of a panel. The products of a sum are added in
// the order of the columns, whatever the tile.
template <int tiles, int count>
inline void multiply_tiles(const LinearJob<float>& job, std::int64_t group, std::int64_t tile, const float* x,
                           std::int64_t width, float* y) {
  const GroupedMatrix& w = *job.linear->grouped;
  const std::uint16_t* cols = w.cols + w.col_begin[group];
  const std::int64_t kept = w.col_count[group];
  const float* values = w.values + w.value_begin[group] + tile * kept * group_slice;
  f32 acc[tiles * group_slice][count] = {};
  for (std::int64_t k = 0; k < kept; ++k) {
    const float* in = x + std::int64_t{cols[k]} * width;
    __builtin_prefetch(values + (kept + k) * (tiles * group_slice), 0, 2);
    f32 right[count];
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) right[n] = *reinterpret_cast<const f32*>(in + n * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < tiles; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < group_slice; ++r) {
        const float value = values[(i * kept + k) * group_slice + r];
#pragma GCC unroll 8
        for (int n = 0; n < count; ++n) acc[i * group_slice + r][n] += right[n] * value;
      }
    }
  }
  const std::int32_t* rows = w.rows + group * group_rows + tile * group_slice;
  for (int r = 0; r < tiles * group_slice; ++r) {
    if (rows[r] >= 0) finish_row(job, rows[r], acc[r], y + rows[r] * width);
  }
}

// Multiplies a group by `count` vectors of a panel, with as many rows at once as keep the multiply-adds busy and fit
// the registers.
template <int count>
inline void multiply_group(const LinearJob<float>& job, std::int64_t group, const float* x, std::int64_t width,
                           float* y) {
  constexpr int tiles = count == 1 || lanes == 16 ? 2 : 1;
  for (std::int64_t tile = 0; tile < group_rows / group_slice; tile += tiles) {
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
  const bool sliced = job.linear->form == Form::rows;
  const std::int64_t units = sliced ? job.linear->sliced->blocks : job.linear->grouped->groups;
  const std::int64_t end = (part + 1) * job.unit < units ? (part + 1) * job.unit : units;
  if (sliced) return multiply_blocks<width_vectors>(job, part * job.unit, end, x, y);
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

constexpr int saturated = 12;  // independent multiply-adds: more than two per cycle of latency 4 need

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

const SparseMatmulKernel<float> kernel = {lanes, widest_rows, widest_groups, {1, multiply, work_bytes},
                                          pack,  unpack,      quantize,      saturate, 2 * saturated * lanes};
