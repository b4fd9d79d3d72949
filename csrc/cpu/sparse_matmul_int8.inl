// sparse_matmul in int8. Compiled by isa/int8.h. A panel of bytes is as many tokens wide as a vector has bytes, and its
// floats are four vectors wide; `quantize` (epilogue.inl) gives the order of the tokens within a column of bytes.

#include "panel.inl"
#include "epilogue.inl"
#if defined(SPARSEBERT_TILES)
#include "tile_block.inl"
#endif

typedef Vector<std::uint8_t>::type u8;
typedef Vector<std::int16_t>::type i16;

namespace {

constexpr std::int64_t task_panels = 4;

// Rows that are multiplied at once: their sums, a quad and a weight must fit the registers.
constexpr int rows_at_once = registers == 32 ? 4 : 2;

// Rows of a group up to which its quads are spread again for each rows_at_once of them. The shuffles run beside the
// products on Zen 4; keeping their results takes stores and loads.
constexpr std::int64_t most_spread_anew = registers == 32 ? 32 : 0;

// Whether a group of this many rows is multiplied in tiles.
#if defined(SPARSEBERT_TILES)
constexpr bool in_tiles(std::int64_t rows) { return rows >= 16; }
#else
constexpr bool in_tiles(std::int64_t) { return false; }
#endif

template <int half, int... i>
inline u8 unpack_bytes(u8 a, u8 b, Indices<i...>) {
  return __builtin_shuffle(a, b, u8{(i / 16 * 16 + half * 8 + i % 16 / 2 + i % 2 * vector_bytes)...});
}

template <int half, int... i>
inline u8 unpack_pairs(u8 a, u8 b, Indices<i...>) {
  return reinterpret_cast<u8>(
      __builtin_shuffle(reinterpret_cast<i16>(a), reinterpret_cast<i16>(b),
                        i16{(i / 8 * 8 + half * 4 + i % 8 / 2 + i % 2 * (vector_bytes / 2))...}));
}

// Four columns of a panel -> four vectors of `lanes` tokens, whose words hold a token's four bytes.
inline void spread(const u8 (&cols)[4], u8 (&quad)[4]) {
  typedef Count<vector_bytes>::type bytes;
  typedef Count<vector_bytes / 2>::type pairs;
  const u8 low[2] = {unpack_bytes<0>(cols[0], cols[1], bytes()), unpack_bytes<0>(cols[2], cols[3], bytes())};
  const u8 high[2] = {unpack_bytes<1>(cols[0], cols[1], bytes()), unpack_bytes<1>(cols[2], cols[3], bytes())};
  quad[0] = unpack_pairs<0>(low[0], low[1], pairs());
  quad[1] = unpack_pairs<1>(low[0], low[1], pairs());
  quad[2] = unpack_pairs<0>(high[0], high[1], pairs());
  quad[3] = unpack_pairs<1>(high[0], high[1], pairs());
}

// sum + the four products of each word. Nothing saturates: the instructions that add pairs of products in 16 bits would,
// so without dot products the bytes are widened first.
inline i32 dot(i32 sum, u8 bytes, i32 weights) {
#if defined(SPARSEBERT_DOT)
  return reinterpret_cast<i32>(SPARSEBERT_DOT(reinterpret_cast<Register>(sum), reinterpret_cast<Register>(bytes),
                                              reinterpret_cast<Register>(weights)));
#else
  const i16 b = reinterpret_cast<i16>(bytes), w = reinterpret_cast<i16>(weights);
  const i16 b_even = b & 0xff, b_odd = reinterpret_cast<i16>(reinterpret_cast<Vector<std::uint16_t>::type>(b) >> 8);
  const i16 w_even = (w << 8) >> 8, w_odd = w >> 8;
#if defined(SPARSEBERT_MADD)
  return sum +
         reinterpret_cast<i32>(SPARSEBERT_MADD(reinterpret_cast<Register>(b_even), reinterpret_cast<Register>(w_even))) +
         reinterpret_cast<i32>(SPARSEBERT_MADD(reinterpret_cast<Register>(b_odd), reinterpret_cast<Register>(w_odd)));
#else
  const i32 even = reinterpret_cast<i32>(b_even * w_even), odd = reinterpret_cast<i32>(b_odd * w_odd);
  return sum + ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
#endif
#endif
}

#if defined(SPARSEBERT_TILES)

// Products of signed weights by unsigned bytes, and their sums in int32.
template <>
struct TileDot<std::int8_t> {
  typedef std::int32_t Sum;

#if SPARSEBERT_TILES == 2
  static void add_first() { TILE_PRODUCTS("tdpbsud", 4, 0, 1); }
  static void add_second() { TILE_PRODUCTS("tdpbsud", 5, 2, 3); }
#else
  static void add(std::int32_t (&to)[16][lanes], const TilePair& left, int a, const TilePair& right, int b) {
    for (int m = 0; m < 16; ++m) {
      i32 sum = load(to[m]);
      for (int k = 0; k < 16; ++k) {
        const u8 bytes = load(reinterpret_cast<const std::uint8_t*>(right.row(b, k)));
        sum = dot(sum, bytes, splat(reinterpret_cast<const std::int32_t*>(left.row(a, m))[k]));
      }
      store(to[m], sum);
    }
  }
#endif
};

#endif

inline void load_quad(const std::uint8_t* x, const std::uint16_t* cols, u8 (&quad)[4]) {
  u8 columns[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) columns[i] = load(x + std::int64_t{cols[i]} * vector_bytes);
  spread(columns, quad);
}

// Adds up `rows` rows whose weights begin at `values`. right(q, quad) gives quad q of their columns.
template <int rows, typename Right>
inline void add_products(const std::int8_t* values, std::int64_t quads, Right right, i32 (&sums)[rows][4]) {
  for (std::int64_t q = 0; q < quads; ++q, values += group_slice * quad_cols) {
    u8 quad[4];
    right(q, quad);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      int word;
      __builtin_memcpy(&word, values + r * quad_cols, 4);
      const i32 weights = splat(word);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sums[r][n] = dot(sums[r][n], quad[n], weights);
    }
  }
}

// Finishes one row's sums; `y` is a panel of floats, `bytes` one of bytes.
inline void finish(const LinearJob<float>& job, std::int64_t row, const i32 (&sums)[4], float* y, std::uint8_t* bytes) {
  const float scale = job.linear->int8->scale[row];
  f32 scaled[4];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) scaled[n] = __builtin_convertvector(sums[n], f32) * scale;
  if (bytes == nullptr) return finish_row(job, row, scaled, y + row * vector_bytes);
  const float bias = job.linear->bias != nullptr ? job.linear->bias[row] : 0.0f;
  const bool gelu = job.linear->activation == Activation::gelu;
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    scaled[n] = gelu ? gelu_roughly(scaled[n] + bias) : activate(scaled[n] + bias, job.linear->activation);
  }
  store(bytes + row * vector_bytes, quantize(scaled, job.output->inverse[row], job.output->offset[row]));
}

template <int rows, typename Right>
inline void multiply_rows(const LinearJob<float>& job, std::int64_t group, std::int64_t row, Right right, float* y,
                          std::uint8_t* bytes) {
  const Int8Matrix& w = *job.linear->int8;
  const std::int32_t* ids = w.rows + w.row_begin[group] + row;
  i32 sums[rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const i32 start = splat(ids[r] >= 0 ? w.start[ids[r]] : 0);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[r][n] = start;
  }
  const std::int64_t tile = row / group_slice * w.quads[group] * group_slice * quad_cols;
  add_products<rows>(w.values + w.value_begin[group] + tile + row % group_slice * quad_cols, w.quads[group], right, sums);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    if (ids[r] >= 0) finish(job, ids[r], sums[r], y, bytes);
  }
}

#if defined(SPARSEBERT_TILES)

// Rows of a tile of weights, and quads in each of them; bytes of the tile.
constexpr std::int64_t tile_rows = 16, tile_quads = 16, tile_bytes = 1024;

// Words of vectors a and b of which each holds lanes / 4 quads of four rows -> those of rows `first` and `first` + 1.
template <int first, int... i>
inline i32 two_rows(i32 a, i32 b, Indices<i...>) {
  return __builtin_shuffle(a, b, i32{(i % (lanes / 2) * 4 + first + i / (lanes / 2))...});
}

// The lower, or the upper, halves of two vectors.
template <int half, int... i>
inline i32 halves(i32 a, i32 b, Indices<i...>) {
  return __builtin_shuffle(a, b, i32{(i % (lanes / 2) + half * (lanes / 2) + i / (lanes / 2) * lanes)...});
}

// Four rows of `lanes` quads: [quads][rows] -> [rows][tile_quads].
inline void to_rows(const std::int8_t* values, std::int8_t* tile) {
  typedef Count<lanes>::type all;
  i32 v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = reinterpret_cast<i32>(load(values + i * vector_bytes));
  const i32 low[2] = {two_rows<0>(v[0], v[1], all()), two_rows<0>(v[2], v[3], all())};
  const i32 high[2] = {two_rows<2>(v[0], v[1], all()), two_rows<2>(v[2], v[3], all())};
  const i32 rows[4] = {halves<0>(low[0], low[1], all()), halves<1>(low[0], low[1], all()),
                       halves<0>(high[0], high[1], all()), halves<1>(high[0], high[1], all())};
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) store(reinterpret_cast<std::int32_t*>(tile + r * 4 * tile_quads), rows[r]);
}

// Up to 16 rows of a group -> its tiles, one for each 16 quads, `stride` bytes apart. Rows and quads past the last are
// zero. values: of the first row; quads: the group's.
inline void make_tiles(const std::int8_t* values, std::int64_t rows, std::int64_t quads, std::int8_t* tiles,
                       std::int64_t stride) {
  constexpr std::int64_t quad_bytes = group_slice * quad_cols;
  for (std::int64_t q = 0; q < quads; q += tile_quads, tiles += stride) {
    if (rows < tile_rows) __builtin_memset(tiles, 0, tile_bytes);
    for (std::int64_t r = 0; r < rows; r += group_slice) {
      const std::int8_t* from = values + (r * quads + q * group_slice) * quad_cols;
      for (std::int64_t i = 0; i < tile_quads; i += lanes) {
        const std::int64_t here = quads - q - i;
        std::int8_t part[lanes * quad_bytes];
        if (here < lanes) {
          __builtin_memset(part, 0, sizeof part);
          if (here > 0) __builtin_memcpy(part, from + i * quad_bytes, static_cast<std::size_t>(here * quad_bytes));
        }
        to_rows(here < lanes ? part : from + i * quad_bytes, tiles + (r * tile_quads + i) * quad_cols);
      }
    }
  }
}

// Multiplies 16 * `tiles` rows of a group, from `row` on, of which `rows` are there. spread: its columns' quads.
template <int tiles>
inline void multiply_tiles(const LinearJob<float>& job, std::int64_t group, std::int64_t row, std::int64_t rows,
                           const std::uint8_t* spread, std::int8_t* left, std::int32_t* sums, float* y,
                           std::uint8_t* bytes) {
  const Int8Matrix& w = *job.linear->int8;
  const std::int64_t quads = w.quads[group], chunks = (quads + tile_quads - 1) / tile_quads;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t first = row + t * tile_rows, here = rows - t * tile_rows;
    make_tiles(w.values + w.value_begin[group] + first * quads * quad_cols, here < tile_rows ? here : tile_rows, quads,
               left + t * tile_bytes, tiles * tile_bytes);
  }
  for (int pair = 0; pair < 2; ++pair) {
    TileBlock<std::int8_t, tiles> block;
    block.zero();
    for (std::int64_t c = 0; c < chunks; ++c) {
      block.step({left + c * tiles * tile_bytes, tile_bytes, 4 * tile_quads},
                 {spread + (c * tile_quads * 4 + pair * 2) * vector_bytes, vector_bytes, 4 * vector_bytes});
    }
    block.store_to(sums + pair * 2 * lanes, tile_rows * 4 * lanes, lanes, 4 * lanes);
  }
  const std::int32_t* ids = w.rows + w.row_begin[group] + row;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (ids[r] < 0) continue;
    const i32 start = splat(w.start[ids[r]]);
    i32 found[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) found[n] = load(sums + (r * 4 + n) * lanes) + start;
    finish(job, ids[r], found, y, bytes);
  }
}

// Where working memory is divided: the quads of a group, its tiles of weights, their sums.
inline std::int64_t spread_bytes(const Int8Matrix& w) {
  return (w.most_quads + tile_quads - 1) / tile_quads * tile_quads * 4 * vector_bytes;
}
inline std::int64_t left_bytes(const Int8Matrix& w) {
  return (w.most_quads + tile_quads - 1) / tile_quads * 2 * tile_bytes;
}
constexpr std::int64_t sums_bytes = 2 * tile_rows * 4 * lanes * 4;

inline void multiply_in_tiles(const LinearJob<float>& job, std::int64_t group, std::uint8_t* spread, float* y,
                              std::uint8_t* bytes) {
  const Int8Matrix& w = *job.linear->int8;
  auto* left = reinterpret_cast<std::int8_t*>(spread + spread_bytes(w));
  auto* sums = reinterpret_cast<std::int32_t*>(left + left_bytes(w));
  for (std::int64_t row = 0, rows = w.row_begin[group + 1] - w.row_begin[group]; row < rows; row += 2 * tile_rows) {
    const std::int64_t here = rows - row < 2 * tile_rows ? rows - row : 2 * tile_rows;
    if (here > tile_rows) {
      multiply_tiles<2>(job, group, row, here, spread, left, sums, y, bytes);
    } else {
      multiply_tiles<1>(job, group, row, here, spread, left, sums, y, bytes);
    }
  }
}

#endif

void multiply(const LinearJob<float>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void* work) {
  const Int8Matrix& w = *job.linear->int8;
  auto* gathered = static_cast<std::uint8_t*>(work);
  const std::int64_t end = (part + 1) * job.unit < w.groups ? (part + 1) * job.unit : w.groups;
#if defined(SPARSEBERT_TILES)
  [[maybe_unused]] const Tiles tiles;
#endif
  for (; panels > 0; --panels, ++panel) {
    const std::uint8_t* x = job.bytes + panel * job.linear->n_in * vector_bytes;
    float* y = job.y + panel * job.linear->n_out * vector_bytes;
    std::uint8_t* bytes = job.y_bytes == nullptr ? nullptr : job.y_bytes + panel * job.linear->n_out * vector_bytes;
    std::int64_t list = -1, gathered_quads = 0;
    for (std::int64_t group = part * job.unit; group < end; ++group) {
      const std::int64_t rows = w.row_begin[group + 1] - w.row_begin[group], quads = w.quads[group];
      const std::uint16_t* cols = w.cols + w.col_begin[group];
      if (rows <= most_spread_anew && !in_tiles(rows)) {
        const auto right = [&](std::int64_t q, u8(&quad)[4]) { load_quad(x, cols + q * quad_cols, quad); };
        for (std::int64_t row = 0; row < rows; row += rows_at_once) {
          multiply_rows<rows_at_once>(job, group, row, right, y, bytes);
        }
        continue;
      }
      if (w.col_begin[group] != list || quads > gathered_quads) {  // an empty list may begin where another list does
        list = w.col_begin[group];
        gathered_quads = quads;
        for (std::int64_t q = 0; q < quads; ++q) {
          u8 quad[4];
          load_quad(x, cols + q * quad_cols, quad);
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) store(gathered + (q * 4 + n) * vector_bytes, quad[n]);
        }
      }
#if defined(SPARSEBERT_TILES)
      if (in_tiles(rows)) {
        multiply_in_tiles(job, group, gathered, y, bytes);
        continue;
      }
#endif
      const auto right = [&](std::int64_t q, u8(&quad)[4]) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) quad[n] = load(gathered + (q * 4 + n) * vector_bytes);
      };
      for (std::int64_t row = 0; row < rows; row += rows_at_once) {
        multiply_rows<rows_at_once>(job, group, row, right, y, bytes);
      }
    }
  }
}

#if defined(SPARSEBERT_TILES)

std::int64_t work_bytes(const LinearJob<float>& job) {
  return spread_bytes(*job.linear->int8) + left_bytes(*job.linear->int8) + sums_bytes;
}

constexpr std::int64_t saturated_ops = 2 * 4 * 16 * 16 * 4 * lanes;

// Repeats four independent products of tiles that stay in the first-level cache.
float saturate(std::int64_t steps) {
  alignas(64) std::int32_t words[16][16] = {};
  alignas(64) std::int32_t sums[4][16][lanes];
  [[maybe_unused]] const Tiles tiles;
  TileBlock<std::int8_t, 2> block;
  block.zero();
  for (std::int64_t step = 0; step < steps; ++step) block.step({words, 0, 64}, {words, 0, 64});
  block.store_to(sums[0][0], 2 * 16 * lanes, 16 * lanes, lanes);
  return static_cast<float>((sums[0][0][0] + sums[1][0][0]) + (sums[2][0][0] + sums[3][0][0]));
}

#else

std::int64_t work_bytes(const LinearJob<float>& job) { return job.linear->int8->most_quads * 4 * vector_bytes; }

constexpr int saturated = 16;
constexpr std::int64_t saturated_ops = 2 * saturated * vector_bytes;

float saturate(std::int64_t steps) {
  i32 sums[saturated];
  for (int i = 0; i < saturated; ++i) sums[i] = splat(i);
  u8 bytes = splat(std::uint8_t{1});
  i32 weights = splat(0x01010101);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < saturated; ++i) sums[i] = dot(sums[i], bytes, weights);
    asm volatile("" : "+x"(bytes), "+x"(weights));  // else a loop without dot products would be folded
  }
  i32 sum{};
  for (int i = 0; i < saturated; ++i) sum += sums[i];
  return static_cast<float>(sum[0]);
}

#endif

}  // namespace

const Int8Kernel kernel = {lanes, {task_panels, multiply, work_bytes}, saturate, saturated_ops};
