// The arithmetic of gram, written once for every vector width. Compiled by isa/floats.h.

namespace {

// A tile: as many vectors of float32 sums as the registers hold beside their operands.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int tile_vectors = lanes == 4 ? 2 : 3;

typedef Vector<float>::type f32;
typedef Vector<double>::type f64;
typedef float half_unaligned __attribute__((vector_size(vector_bytes / 2), aligned(4)));

constexpr int width = tile_vectors * lanes;
constexpr int half = lanes / 2;
// A tile's float64 sums are prefetched this many tokens before its last one: some 1,500 cycles of AVX-512, the latency
// of memory. Prefetched at the tile's start, they would leave the first-level cache again before its end.
constexpr std::int64_t prefetch_depth = 128;
static_assert(width % tile_rows == 0, "a panel is cut into whole tiles");

// Loads as many floats as a vector has doubles.
inline half_unaligned load_half(const float* p) { return *reinterpret_cast<const half_unaligned*>(p); }
inline f64 widen(half_unaligned v) { return __builtin_convertvector(v, f64); }

// sums[c] += the tokens' weighted, shifted values, one token after the other.
template <int tokens>
inline void add_tokens(const float* values, const float* weights, const float* shift, std::int64_t n, double* sums) {
  double w[tokens];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) w[t] = weights != nullptr ? weights[t] : 1.0;
  std::int64_t c = 0;
  for (; c + half <= n; c += half) {
    f64 sum = load(sums + c);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum += widen(load_half(values + t * n + c) - load_half(shift + c)) * w[t];
    store(sums + c, sum);
  }
  for (; c < n; ++c) {
    for (int t = 0; t < tokens; ++t) {
      const float centred = values[t * n + c] - shift[c];
      sums[c] += static_cast<double>(centred) * w[t];
    }
  }
}

void token_sums(const TokenSumsJob& job, std::int64_t part) {
  double* sums = job.partial + part * job.n;
  for (std::int64_t c = 0; c < job.n; ++c) sums[c] = 0.0;
  std::int64_t t = part * job.part_tokens;
  const std::int64_t end = t + job.part_tokens < job.tokens ? t + job.part_tokens : job.tokens;
  // Four tokens at a time read and write the sums a quarter as often.
  for (; t + 4 <= end; t += 4) {
    add_tokens<4>(job.values + t * job.n, job.weights ? job.weights + t : nullptr, job.shift, job.n, sums);
  }
  for (; t < end; ++t) {
    add_tokens<1>(job.values + t * job.n, job.weights ? job.weights + t : nullptr, job.shift, job.n, sums);
  }
}

template <bool keep>
void pack_part(const GramPackJob& job, std::int64_t part) {
  const std::int64_t n = job.operand.n;
  const std::int64_t begin = part * job.part_tokens;
  const std::int64_t end = begin + job.part_tokens < job.tokens ? begin + job.part_tokens : job.tokens;
  const float* roots = job.roots;
  float* partial = job.partial + part * n;
  std::int64_t first = 0;
  for (; first + width <= n; first += width) {
    const float* in = job.operand.values + first;
    float* out = job.operand.panels + first * job.tokens;
    f32 shift[tile_vectors], sums[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) {
      shift[v] = load(job.operand.shift + first + v * lanes);
      sums[v] = f32{};
    }
    for (std::int64_t t = begin; t < end; ++t) {
      const float root = roots != nullptr ? roots[t] : 1.0f;
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) {
        // The processor does not foresee that the next panel will read the next piece of this row.
        __builtin_prefetch(in + t * n + width + v * lanes);
        const f32 scaled = (load(in + t * n + v * lanes) - shift[v]) * root;
        if (keep) store(out + t * width + v * lanes, scaled);
        sums[v] += scaled * root;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) store(partial + first + v * lanes, sums[v]);
  }
  if (first == n) return;
  float* out = job.operand.panels + first * job.tokens;
  for (std::int64_t c = 0; c < width; ++c) {
    float sum = 0.0f;
    for (std::int64_t t = begin; t < end; ++t) {
      const float root = roots != nullptr ? roots[t] : 1.0f;
      float scaled = 0.0f;
      if (first + c < n) scaled = (job.operand.values[t * n + first + c] - job.operand.shift[first + c]) * root;
      if (keep) out[t * width + c] = scaled;
      sum += scaled * root;
    }
    if (first + c < n) partial[first + c] = sum;
  }
}

void pack(const GramPackJob& job, std::int64_t part) {
  job.keep ? pack_part<true>(job, part) : pack_part<false>(job, part);
}

// sums[i][j] += sum over k < depth of a[k][i] b[k][j], for i below tile_rows and j below `vectors` vectors, in float32.
// Only `rows` x `columns` of the sums exist.
template <int vectors>
inline void add_tile(const float* a, const float* b, std::int64_t depth, double* sums, std::int64_t stride,
                     std::int64_t rows, std::int64_t columns) {
  const bool whole = rows >= tile_rows && columns >= vectors * lanes;
  f32 acc[tile_rows][vectors] = {};
  const std::int64_t late = depth > prefetch_depth ? depth - prefetch_depth : 0;
  multiply_tile(a, 1, width, b, width, late, acc);
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < vectors * lanes; c += 8) __builtin_prefetch(sums + i * stride + c, 1);
    }
  }
  multiply_tile(a + late * width, 1, width, b + late * width, width, depth - late, acc);
  alignas(64) float tile[tile_rows][vectors * lanes];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) store(tile[i] + n * lanes, acc[i][n]);
  }
  if (whole) {
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < vectors * lanes; c += half) {
        double* p = sums + i * stride + c;
        store(p, load(p) + widen(load_half(tile[i] + c)));
      }
    }
    return;
  }
  for (int i = 0; i < tile_rows && i < rows; ++i) {
    for (std::int64_t c = 0; c < vectors * lanes && c < columns; ++c) sums[i * stride + c] += tile[i][c];
  }
}

// Adds the tile of some rows and one panel of columns, without the panel's first `skip` vectors.
template <int skip>
inline void add_tile_from(std::int64_t skipped, const float* a, const float* b, std::int64_t depth, double* sums,
                          std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  if constexpr (skip + 1 < tile_vectors) {
    if (skipped > skip) return add_tile_from<skip + 1>(skipped, a, b, depth, sums, stride, rows, columns);
  }
  add_tile<tile_vectors - skip>(a, b + skip * lanes, depth, sums + skip * lanes, stride, rows, columns - skip * lanes);
}

void multiply(const GramBlock& block) {
  for (std::int64_t k = 0; k < block.tokens; k += gram_depth) {
    const std::int64_t depth = block.tokens - k < gram_depth ? block.tokens - k : gram_depth;
    for (std::int64_t j = 0; j < block.n_columns; j += width) {
      const float* b = block.columns + j * block.tokens + k * width;
      const std::int64_t rows = block.upper && j + width < block.n_rows ? j + width : block.n_rows;
      for (std::int64_t i = 0; i < rows; i += tile_rows) {
        const float* a = block.rows + i / width * width * block.tokens + k * width + i % width;
        // In a block on the diagonal, vectors of columns that lie wholly below the diagonal are not needed.
        const std::int64_t skipped = block.upper && i > j ? (i - j) / lanes : 0;
        add_tile_from<0>(skipped, a, b, depth, block.sums + i * block.stride + j, block.stride, block.n_rows - i,
                         block.n_columns - j);
      }
    }
  }
}

}  // namespace

const GramKernel kernel = {width, token_sums, pack, multiply};
