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

// Adds up `rows` rows of quads of weights. right(q, quad) gives quad q of their columns.
template <int rows, typename Right>
inline void add_products(const std::int8_t* values, std::int64_t quads, Right right, i32 (&sums)[rows][4]) {
  const std::int8_t* row[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) row[r] = values + r * quads * quad_cols;
  for (std::int64_t q = 0; q < quads; ++q) {
    // The next rows' weights: see fetched_ahead in sparse_matmul.inl.
    __builtin_prefetch(values + (quads + q) * (rows * quad_cols), 0, 2);
    u8 quad[4];
    right(q, quad);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      int word;
      __builtin_memcpy(&word, row[r] + q * quad_cols, 4);
      const i32 weights = splat(word);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sums[r][n] = dot(sums[r][n], quad[n], weights);
    }
  }
}

// Finishes one row's sums; `y` is a panel of floats, `bytes` one of bytes.
[[gnu::always_inline]] inline void finish(const LinearJob<float>& job, std::int64_t row, const i32 (&sums)[4], float* y,
                                          std::uint8_t* bytes) {
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
  const std::int64_t quads = w.quads[group];
  add_products<rows>(w.values + w.value_begin[group] + row * quads * quad_cols, quads, right, sums);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    if (ids[r] >= 0) finish(job, ids[r], sums[r], y, bytes);
  }
}

#if defined(SPARSEBERT_TILES)

// Rows of a tile of weights, and quads in each of them.
constexpr std::int64_t tile_rows = 16, tile_quads = 16;
static_assert(tile_quads * quad_cols <= int8_overrun, "the last tile of a group may be read beyond its values");

// Multiplies 16 * `tiles` rows of a group, from `row` on. spread: its columns' quads, and zeros up to a whole tile. They
// are multiplied by what the last tile of a row reads beyond its quads, of the next row or group.
template <int tiles>
inline void multiply_tiles(const LinearJob<float>& job, std::int64_t group, std::int64_t row, const std::uint8_t* spread,
                           std::int32_t* sums, float* y, std::uint8_t* bytes) {
  const Int8Matrix& w = *job.linear->int8;
  const std::int64_t quads = w.quads[group], width = quads * quad_cols;
  const std::int8_t* left = w.values + w.value_begin[group] + row * width;
  for (int pair = 0; pair < 2; ++pair) {
    TileBlock<std::int8_t, tiles> block;
    block.zero();
    for (std::int64_t q = 0; q < quads; q += tile_quads) {
      block.step({left + q * quad_cols, tile_rows * width, width},
                 {spread + (q * 4 + pair * 2) * vector_bytes, vector_bytes, 4 * vector_bytes});
    }
    block.store_to(sums + pair * 2 * lanes, tile_rows * 4 * lanes, lanes, 4 * lanes);
  }
  const std::int32_t* ids = w.rows + w.row_begin[group] + row;
  for (std::int64_t r = 0; r < tiles * tile_rows; ++r) {
    if (ids[r] < 0) continue;
    const i32 start = splat(w.start[ids[r]]);
    i32 found[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) found[n] = load(sums + (r * 4 + n) * lanes) + start;
    finish(job, ids[r], found, y, bytes);
  }
}

// Bytes of working memory for the spread quads of a group; the sums of its tiles follow.
inline std::int64_t spread_bytes(const Int8Matrix& w) {
  return (w.most_quads + tile_quads - 1) / tile_quads * tile_quads * 4 * vector_bytes;
}
constexpr std::int64_t sums_bytes = 2 * tile_rows * 4 * lanes * 4;

// Multiplies as many rows of a group as fill tiles, and returns their number.
inline std::int64_t multiply_in_tiles(const LinearJob<float>& job, std::int64_t group, std::int64_t rows,
                                      std::uint8_t* spread, float* y, std::uint8_t* bytes) {
  const std::int64_t quads = job.linear->int8->quads[group];
  __builtin_memset(spread + quads * 4 * vector_bytes, 0,
                   static_cast<std::size_t>(-quads & (tile_quads - 1)) * 4 * vector_bytes);
  auto* sums = reinterpret_cast<std::int32_t*>(spread + spread_bytes(*job.linear->int8));
  std::int64_t row = 0;
  for (; rows - row >= 2 * tile_rows; row += 2 * tile_rows) multiply_tiles<2>(job, group, row, spread, sums, y, bytes);
  for (; rows - row >= tile_rows; row += tile_rows) multiply_tiles<1>(job, group, row, spread, sums, y, bytes);
  return row;
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
      if (w.col_begin[group] != list || quads != gathered_quads) {  // a list may begin with another one
        list = w.col_begin[group];
        gathered_quads = quads;
        for (std::int64_t q = 0; q < quads; ++q) {
          u8 quad[4];
          load_quad(x, cols + q * quad_cols, quad);
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) store(gathered + (q * 4 + n) * vector_bytes, quad[n]);
        }
      }
      std::int64_t row = 0;
#if defined(SPARSEBERT_TILES)
      if (in_tiles(rows)) row = multiply_in_tiles(job, group, rows, gathered, y, bytes);
#endif
      const auto right = [&](std::int64_t q, u8(&quad)[4]) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) quad[n] = load(gathered + (q * 4 + n) * vector_bytes);
      };
      for (; row < rows; row += rows_at_once) {
        multiply_rows<rows_at_once>(job, group, row, right, y, bytes);
      }
    }
  }
}

#if defined(SPARSEBERT_TILES)

std::int64_t work_bytes(const LinearJob<float>& job) {
  return spread_bytes(*job.linear->int8) + sums_bytes;
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
