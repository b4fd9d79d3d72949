// The arithmetic of sparse_matmul, written once for every vector width. Included after vector.inl, by its rules.

typedef Vector<float>::type f32;
typedef Vector<int>::type i32;

namespace {

// Masks of the perfect shuffle: zip(a, b) = a0 b0 a1 b1 ...; its lower half with first = 0, its upper with lanes / 2.
template <int first, int... i>
inline f32 zip(f32 a, f32 b, Indices<i...>) {
  return __builtin_shuffle(a, b, i32{(first + i / 2 + (i % 2) * lanes)...});
}

// Transposes lanes x lanes floats in registers. A perfect shuffle of the rows i and i + lanes/2 rotates the bits of
// (row, lane) by one place, so log2(lanes) of them swap row and lane.
inline void transpose(f32 (&v)[lanes]) {
  typedef typename Count<lanes>::type all;
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
    f32 w[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      w[2 * i] = zip<0>(v[i], v[i + lanes / 2], all());
      w[2 * i + 1] = zip<lanes / 2>(v[i], v[i + lanes / 2], all());
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}

// x [tokens of one panel, inputs of one part] -> panels, transposed; lanes without a token become zero.
void pack(const SparseMatmulJob& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t n_in = job.w.n_in;
  const std::int64_t width = std::int64_t{job.width_vectors} * lanes;
  const std::int64_t begin = part * job.pack_rows;
  const std::int64_t end = begin + job.pack_rows < n_in ? begin + job.pack_rows : n_in;
  const float* x = job.x + panel * width * n_in;
  float* out = job.panels + panel * n_in * width;
  const std::int64_t filled = job.tokens - panel * width < width ? job.tokens - panel * width : width;

  std::int64_t k = begin;
  for (; k + lanes <= end; k += lanes) {
    for (std::int64_t t = 0; t < width; t += lanes) {
      f32 v[lanes];
      if (t + lanes <= filled) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(x + (t + i) * n_in + k);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = t + i < filled ? load(x + (t + i) * n_in + k) : f32{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(out + (k + i) * width + t, v[i]);
    }
  }
  for (; k < end; ++k) {
    for (std::int64_t t = 0; t < width; ++t) out[k * width + t] = t < filled ? x[t * n_in + k] : 0.0f;
  }
}

// gelu(v) = v Phi(v) = max(v, 0) - a Phi(-a), a = |v|: no cancellation, so small results keep their relative accuracy.
// Phi(-a) = 2^-q(a), with q a polynomial fitted to minimise the error of a Phi(-a) on [0, 12.5]; beyond, where it is
// below 2e-30, a stands still. Error of a Phi(-a): 8e-8 absolute, and 0.3 % relative up to a = 5.
inline f32 gelu(f32 v) {
  const f32 zero{};
  f32 a = v < zero ? -v : v;
  a = a < splat(12.5f) ? a : splat(12.5f);
  f32 q = splat(-3.3092837838921696e-05f);
  q = q * a + 0.0007692198851145804f;
  q = q * a - 0.00808071717619896f;
  q = q * a + 0.05341210588812828f;
  q = q * a + 0.4587709605693817f;
  q = q * a + 1.1512017250061035f;
  q = q * a + 0.999993085861206f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: -q is in (-120, 0], so 2^n is a normal float.
  const f32 magic = splat(12582912.0f);
  const f32 shifted = magic - q;
  const f32 fraction = -q - (shifted - magic);
  f32 power = splat(0.0013400432653725147f);  // 2^fraction on [-1/2, 1/2], to 2e-7
  power = power * fraction + 0.009676037356257439f;
  power = power * fraction + 0.05550327152013779f;
  power = power * fraction + 0.2402210682630539f;
  power = power * fraction + 0.6931471824645996f;
  power = power * fraction + 1.0f;
  power = reinterpret_cast<f32>(reinterpret_cast<i32>(power) + (reinterpret_cast<i32>(shifted) << 23));
  return (v < zero ? zero : v) - a * power;  // in this order a NaN stays
}

// One output row times one panel -> out [width_vectors * lanes], finished. The row's products go to `chains`
// accumulators in turn, whatever the width, so that a token's result never depends on how many share its panel.
template <int width_vectors>
inline void dot_row(const SparseMatmulJob& job, const float* panel, std::int64_t row, float* out) {
  constexpr int width = width_vectors * lanes;
  f32 acc[chains][width_vectors] = {};
  std::int64_t j = job.w.row_ptr[row];
  const std::int64_t end = job.w.row_ptr[row + 1];
  for (; j + chains <= end; j += chains) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      const float* x = panel + std::int64_t{job.w.cols[j + c]} * width;
      const float value = job.w.values[j + c];
#pragma GCC unroll 8
      for (int n = 0; n < width_vectors; ++n) acc[c][n] += *reinterpret_cast<const f32*>(x + n * lanes) * value;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < chains - 1; ++c) {
    if (j + c >= end) break;
    const float* x = panel + std::int64_t{job.w.cols[j + c]} * width;
    const float value = job.w.values[j + c];
#pragma GCC unroll 8
    for (int n = 0; n < width_vectors; ++n) acc[c][n] += *reinterpret_cast<const f32*>(x + n * lanes) * value;
  }
  const float bias = job.bias != nullptr ? job.bias[row] : 0.0f;
#pragma GCC unroll 8
  for (int n = 0; n < width_vectors; ++n) {
    f32 sum = acc[0][n];
#pragma GCC unroll 8
    for (int c = 1; c < chains; ++c) sum += acc[c][n];
    sum += bias;
    if (job.activation == Activation::gelu) sum = gelu(sum);
    *reinterpret_cast<f32*>(out + n * lanes) = sum;
  }
}

// `rows` outputs of lanes tokens, tile [rows][width] -> y, transposed. `filled` of these tokens exist.
inline void store_tokens(const float* tile, std::int64_t width, std::int64_t rows, std::int64_t filled,
                         std::int64_t n_out, float* y) {
  std::int64_t r = 0;
  for (; r + lanes <= rows; r += lanes) {
    f32 v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = load(tile + (r + i) * width);
    transpose(v);
    if (filled == lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(y + i * n_out + r, v[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < filled) store(y + i * n_out + r, v[i]);
      }
    }
  }
  for (; r < rows; ++r) {
    for (std::int64_t t = 0; t < filled; ++t) y[t * n_out + r] = tile[r * width + t];
  }
}

template <int width_vectors>
void compute_block(const SparseMatmulJob& job, std::int64_t panel, std::int64_t block) {
  constexpr int width = width_vectors * lanes;
  alignas(64) float tile[tile_rows * width];
  if (job.poison) {
    for (float& v : tile) v = __builtin_nanf("");
  }
  const std::int64_t filled = job.tokens - panel * width;  // tokens from this panel on
  const float* x = job.panels + panel * job.w.n_in * width;
  float* y = job.y + panel * width * job.w.n_out;
  const std::int64_t begin = block * job.block_rows;
  const std::int64_t end = begin + job.block_rows < job.w.n_out ? begin + job.block_rows : job.w.n_out;
  for (std::int64_t row = begin; row < end; row += tile_rows) {
    const std::int64_t rows = end - row < tile_rows ? end - row : tile_rows;
    for (std::int64_t r = 0; r < rows; ++r) dot_row<width_vectors>(job, x, row + r, tile + r * width);
    for (std::int64_t t = 0; t < width && t < filled; t += lanes) {
      store_tokens(tile + t, width, rows, filled - t < lanes ? filled - t : lanes, job.w.n_out,
                   y + t * job.w.n_out + row);
    }
  }
}

// Calls the block that was compiled for the job's width.
template <int width_vectors>
void compute_width(const SparseMatmulJob& job, std::int64_t panel, std::int64_t block) {
  if constexpr (width_vectors > 1) {
    if (job.width_vectors < width_vectors) return compute_width<width_vectors - 1>(job, panel, block);
  }
  compute_block<width_vectors>(job, panel, block);
}

}  // namespace

const SparseMatmulKernel kernel = {lanes, max_width_vectors, pack, compute_width<max_width_vectors>};
