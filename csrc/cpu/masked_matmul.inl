// The arithmetic of masked_matmul, written once for every vector width, for floats (compiled by isa/floats.h) and for
// pairs of bf16 (by isa/tiles.h). A tile is tile_rows x tile_vectors vectors of sums. With SPARSEBERT_MATRICES it is four
// tiles of tile.inl, of 16 x 16 words each; else its sums are vectors in registers.
#include "panel.inl"
#include "bf16.inl"
#if defined(SPARSEBERT_TILES)
#include "tile.inl"
#endif
#if defined(SPARSEBERT_TILES) && SPARSEBERT_TILES != 1
#define SPARSEBERT_MATRICES 1
#else
#define SPARSEBERT_MATRICES 0
#endif

namespace {

#if SPARSEBERT_MATRICES
constexpr int tile_rows = 32, tile_vectors = 2, word_run = 16;
#else
constexpr int tile_rows = lanes == 16 ? 8 : 4, tile_vectors = lanes == 4 ? 2 : 3, word_run = 1;
#endif
#if defined(SPARSEBERT_TILES)
constexpr int values_a_word = 2;
#else
constexpr int values_a_word = 1;
#endif
typedef float half_unaligned __attribute__((vector_size(vector_bytes / 2), aligned(4)));

constexpr int tile_columns = tile_vectors * lanes;
constexpr std::int64_t line = 16;  // floats of a cache line
// Values of a row that are read at a time: few enough that the copies for a transposition stay in the first-level
// cache.
constexpr int chunk = 256;
static_assert(chunk % (values_a_word * lanes * 2) == 0, "a chunk is whole transpositions");
static_assert(tile_rows % lanes == 0 || 2 * tile_rows == lanes, "a row of a panel is vectors, or half of one");
static_assert(chunk >= tile_columns, "a chunk holds a panel's columns");

// Without a division if there is nothing to divide: it would take as long as the rest of a short row.
inline std::int64_t score_row_of(const MaskedWeight& mask, std::int64_t row) {
  return mask.score_rows == 1 ? row : row / mask.score_rows;
}

// out[c] = values[c] where the mask keeps row `row`, column begin + c, else 0; count <= chunk.
inline void keep(const MaskedWeight& mask, std::int64_t row, std::int64_t begin, std::int64_t count,
                 const float* values, bool round, float* out) {
  const std::int64_t score_row = score_row_of(mask, row);
  const float* scores = mask.scores + score_row * mask.n_in + begin;
  const f32 one = splat(mask.thresholds[0]);
  float expanded[chunk + lanes];
  const bool many = mask.reach > 0;
  if (many) {
    // Stores whole vectors of each threshold; the next threshold overwrites the excess.
    const float* thresholds = mask.thresholds + score_row * (mask.n_in / mask.reach) + begin / mask.reach;
    for (std::int64_t c = 0, next = mask.reach - begin % mask.reach; c < count; next += mask.reach) {
      for (const f32 t = splat(*thresholds++); c < count && c < next; c += lanes) store(expanded + c, t);
      c = next;
    }
  }
  std::int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    f32 value = load(values + c);
    if (round) value = reinterpret_cast<f32>(rounded(value));
    store(out + c, load(scores + c) >= (many ? load(expanded + c) : one) ? value : f32{});
  }
  for (; c < count; ++c) {
    const float value = round ? rounded(values[c]) : values[c];
    out[c] = scores[c] >= (many ? expanded[c] : mask.thresholds[0]) ? value : 0.0f;
  }
}

// Reads values `begin` to `begin + count` of a row, then zeros up to `room`; all zeros if the row does not exist.
inline void read_row(const MatmulSource& source, std::int64_t row, std::int64_t begin, std::int64_t count,
                     std::int64_t room, float* out) {
  if (begin + count > source.cols) count = begin < source.cols ? source.cols - begin : 0;
  if (row >= source.rows) count = 0;
  const std::int64_t at = row * source.cols + begin;
  if (count > 0) {
    if (source.mask != nullptr) {
      keep(*source.mask, row, begin, count, static_cast<const float*>(source.values) + at, source.round, out);
    } else if (source.bf16) {
      read_values(static_cast<const Bf16*>(source.values) + at, count, out);
    } else {
      copy(static_cast<const float*>(source.values) + at, out, count);
    }
  }
  for (std::int64_t c = count; c < room; ++c) out[c] = 0.0f;
}

// `lanes` words, made from neighbouring values of a row; words_across makes them from values one below the other.
inline f32 words_along(const float* row) {
#if SPARSEBERT_TILES >= 1
  return reinterpret_cast<f32>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(row + lanes)),
                                                   reinterpret_cast<__m512>(load(row))));
#elif defined(SPARSEBERT_TILES)
  const i32 evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const f32 low = load(row), high = load(row + lanes);
  return reinterpret_cast<f32>(round_pairs(__builtin_shuffle(low, high, evens), __builtin_shuffle(low, high, evens + 1)));
#else
  return load(row);
#endif
}

inline f32 words_across(const float* upper, [[maybe_unused]] const float* lower) {
#if defined(SPARSEBERT_TILES)
  return reinterpret_cast<f32>(round_pairs(load(upper), load(lower)));
#else
  return load(upper);
#endif
}

// Packs words that run along a row: puts each side by side with those of the panel's other rows.
template <int width>
void pack_along(const MatmulPanels& job, std::int64_t panel, std::int64_t begin, std::int64_t end, float* out) {
  // If a panel is narrower than a vector, two vectors of each row are transposed at once.
  constexpr int side = width < lanes ? width : lanes;
  constexpr int parts = lanes / side;
  constexpr int step = parts * lanes;  // words
  alignas(64) float rows[side][chunk];
  for (int r = 0; r < width; r += side) {
    for (std::int64_t w = begin; w < end; w += chunk / values_a_word) {
      const std::int64_t here = end - w < chunk / values_a_word ? end - w : chunk / values_a_word;
      const std::int64_t room = (here + step - 1) / step * step * values_a_word;
      for (int i = 0; i < side; ++i) {
        read_row(job.source, panel * width + r + i, w * values_a_word, here * values_a_word, room, rows[i]);
      }
      for (std::int64_t k = 0; k < here; k += step) {
        f32 v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = words_along(rows[i % side] + (k + i / side * lanes) * values_a_word);
        transpose(v);
#pragma GCC unroll 2
        for (int part = 0; part < parts; ++part) {
          float* to = out + (w - begin + k + part * lanes) * width + r;
          const std::int64_t left = here - k - part * lanes;
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) {
            if (i >= left) break;
            if constexpr (parts == 1) {
              store(to + i * width, v[i]);
            } else {
              *reinterpret_cast<half_unaligned*>(to + i * width) = reinterpret_cast<const half_unaligned*>(&v[i])[part];
            }
          }
        }
      }
    }
  }
}

// Words of the bf16 of two rows, the lower row `cols` values after the upper.
inline f32 interleaved(const Bf16* upper, std::int64_t cols) {
  const bits low = __builtin_convertvector(*reinterpret_cast<const short_bits_unaligned*>(upper), bits);
  const bits high = __builtin_convertvector(*reinterpret_cast<const short_bits_unaligned*>(upper + cols), bits);
  return reinterpret_cast<f32>(low | (high << 16));
}

// Packs panels `first` to `last`, whose words run down the columns.
template <int width>
void pack_across(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
                 float* out, std::int64_t stride) {
  constexpr std::int64_t at_once = chunk / width;
  // Words written to one panel before the next panel: panels are often a multiple of 4096 bytes apart, and then few of
  // their lines fit the first-level cache.
  constexpr int words = 8;
  constexpr int side = width < lanes ? lanes : width;
  const MatmulSource& source = job.source;
  alignas(64) float rows[words * values_a_word][chunk + lanes];
  for (; first < last; first += at_once, out += at_once * stride) {
    const std::int64_t column = first * width;
    const std::int64_t columns = (last - first < at_once ? last - first : at_once) * width;
    for (std::int64_t w = begin; w < end; w += words) {
      const std::int64_t here = end - w < words ? end - w : words;
      const bool pairs = values_a_word == 2 && source.bf16 && (w + here) * 2 <= source.rows &&
                         column + (columns + lanes - 1) / lanes * lanes <= source.cols;
      const Bf16* halves = static_cast<const Bf16*>(source.values) + (pairs ? w * 2 * source.cols + column : 0);
      for (std::int64_t i = 0; !pairs && i < here * values_a_word; ++i) {
        read_row(source, w * values_a_word + i, column, columns, columns, rows[i]);
      }
      for (std::int64_t c = 0; c < columns; c += side) {
        float* to = out + c / width * stride + (w - begin) * width;
        for (std::int64_t i = 0; i < here; ++i, to += width) {
#pragma GCC unroll 4
          for (int n = 0; n < side; n += lanes) {
            const float* upper = rows[i * values_a_word] + c + n;
            const float* lower = rows[(i + 1) * values_a_word - 1] + c + n;
            const f32 words = pairs ? interleaved(halves + 2 * i * source.cols + c + n, source.cols)
                                    : words_across(upper, lower);
            if constexpr (width < lanes) {
              const auto* parts = reinterpret_cast<const half_unaligned*>(&words);
              *reinterpret_cast<half_unaligned*>(to) = parts[0];
              if (c + width < columns) *reinterpret_cast<half_unaligned*>(to + stride) = parts[1];
            } else {
              store(to + n, words);
            }
          }
        }
      }
    }
  }
}

template <int width>
void pack_panels(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
                 float* out, std::int64_t stride) {
  if (job.across) return pack_across<width>(job, first, last, begin, end, out, stride);
  for (; first < last; ++first, out += stride) pack_along<width>(job, first, begin, end, out);
}

#if SPARSEBERT_MATRICES

// Packs panels of tile_rows as tiles, with the words of a run one after the other.
void pack_grouped(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
                  float* out, std::int64_t stride) {
  if (job.across) {
    constexpr std::int64_t at_once = chunk / tile_rows;
    alignas(64) float rows[word_run * values_a_word][chunk];
    for (; first < last; first += at_once, out += at_once * stride) {
      const std::int64_t column = first * tile_rows;
      const std::int64_t columns = (last - first < at_once ? last - first : at_once) * tile_rows;
      for (std::int64_t w = begin; w < end; w += word_run) {
        for (int i = 0; i < word_run * values_a_word; ++i) {
          read_row(job.source, w * values_a_word + i, column, columns, columns, rows[i]);
        }
        for (std::int64_t c = 0; c < columns; c += lanes) {
          float* to = out + c / tile_rows * stride + (w - begin) * tile_rows + c % tile_rows * word_run;
          f32 v[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) v[i] = words_across(rows[2 * i] + c, rows[2 * i + 1] + c);
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(to + i * word_run, v[i]);
        }
      }
    }
    return;
  }
  alignas(64) float row[chunk];
  for (; first < last; ++first, out += stride) {
    for (int r = 0; r < tile_rows; ++r) {
      for (std::int64_t w = begin; w < end; w += chunk / values_a_word) {
        const std::int64_t here = end - w < chunk / values_a_word ? end - w : chunk / values_a_word;
        read_row(job.source, first * tile_rows + r, w * values_a_word, here * values_a_word, here * values_a_word, row);
        for (std::int64_t k = 0; k < here; k += word_run) {
          store(out + (w - begin + k) * tile_rows + r * word_run, words_along(row + k * values_a_word));
        }
      }
    }
  }
}

#endif

void pack(const MatmulPanels& job, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
          float* out, std::int64_t stride) {
#if SPARSEBERT_MATRICES
  if (job.grouped) return pack_grouped(job, first, last, begin, end, out, stride);
#else
  if (job.width == tile_rows) return pack_panels<tile_rows>(job, first, last, begin, end, out, stride);
#endif
  if (job.width == tile_columns) return pack_panels<tile_columns>(job, first, last, begin, end, out, stride);
  pack_panels<4 * lanes>(job, first, last, begin, end, out, stride);
}

typedef float Tile[tile_rows][tile_columns];

#if SPARSEBERT_MATRICES

static_assert(tile_rows == 32 && tile_columns == 32 && word_run == 16, "a tile is four of tile.inl's");

// sums = the products of `depth` words of a panel of rows and one of columns. Calls between(row) for each row of the
// tile, spread over the work.
template <typename Between>
inline void products(const float* a, const float* b, std::int64_t depth, Tile& sums,
                     Between between) {
  TileBlock<Bf16, 2> block;
  block.zero();
  std::int64_t row = 0;
  for (std::int64_t k = 0; k < depth; k += word_run, a += word_run * tile_rows, b += word_run * tile_columns) {
    for (; row * depth <= k * tile_rows; ++row) between(row);
    block.step({a, 16 * word_run * 4, 64}, {b, 64, 4 * tile_columns});
  }
  for (; row < tile_rows; ++row) between(row);
  block.store_to(sums[0], 16 * tile_columns, 16, tile_columns);
}

#else

// acc += the products of `depth` words of a panel of rows and one of columns. `next` is multiplied afterwards; it is
// prefetched, because the processor does not foresee it.
inline void add_products(const float* a, const float* b, std::int64_t depth, const float* next,
                         f32 (&acc)[tile_rows][tile_vectors]) {
  for (std::int64_t k = 0; k < depth; ++k, a += tile_rows, b += tile_columns, next += tile_rows) {
    __builtin_prefetch(next);
    f32 right[tile_vectors];
#pragma GCC unroll 4
    for (int n = 0; n < tile_vectors; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
#if SPARSEBERT_TILES >= 1
      std::uint32_t pair;  // not a float: float arithmetic may flush values that look denormal
      __builtin_memcpy(&pair, a + i, sizeof pair);
      const auto left = reinterpret_cast<__m512bh>(splat(pair));
#endif
#pragma GCC unroll 4
      for (int n = 0; n < tile_vectors; ++n) {
#if SPARSEBERT_TILES >= 1
        acc[i][n] = reinterpret_cast<f32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[i][n]),
                                                           reinterpret_cast<__m512bh>(right[n]), left));
#else
        acc[i][n] += right[n] * a[i];
#endif
      }
    }
  }
}

#endif

// The part of a tile that exists: its first row and column, and the number of each.
struct TilePlace {
  std::int64_t row, rows;
  std::int64_t column, columns;
};

inline TilePlace place_of(const MatmulJob& job, std::int64_t tile, std::int64_t panel) {
  const std::int64_t row = tile * tile_rows, column = panel * tile_columns;
  return {row, job.rows - row < tile_rows ? job.rows - row : tile_rows, column,
          job.columns - column < tile_columns ? job.columns - column : tile_columns};
}

// Writes `columns` sums, plus their biases unless `bias` is null, to out.
template <typename T>
inline void write_sums(const float* sums, const float* bias, std::int64_t columns, T* out) {
  std::int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    store_value(out + c, load(sums + c) + (bias != nullptr ? load(bias + c) : f32{}));
  }
  for (; c < columns; ++c) {
    const float sum = sums[c] + (bias != nullptr ? bias[c] : 0.0f);
    write_values(&sum, 1, out + c);
  }
}

// Writes the sums of a row's `columns` columns from `column` on to out.
inline void write_row(const MatmulJob& job, std::int64_t row, std::int64_t column, std::int64_t columns,
                      const float* sums) {
  const float* bias = job.bias != nullptr ? job.bias + column : nullptr;
  const std::int64_t to = row * job.columns + column;
  if (job.bf16) {
    write_sums(sums, bias, columns, static_cast<Bf16*>(job.out) + to);
  } else {
    write_sums(sums, bias, columns, static_cast<float*>(job.out) + to);
  }
}

inline void write_out(const MatmulJob& job, const TilePlace& at, const Tile& tile) {
  for (std::int64_t i = 0; i < at.rows; ++i) write_row(job, at.row + i, at.column, at.columns, tile[i]);
}

// Sums the tile's `rows` rows from `first` on, which share a row of scores. `add`: earlier rows of it are already
// summed.
inline void add_scores(const MatmulJob& job, const TilePlace& at, const Tile& tile, std::int64_t score_row,
                       std::int64_t first, std::int64_t rows, bool add) {
  const float* weight = job.weight->weight + (at.row + first) * job.columns + at.column;
  float* out = job.d_scores + score_row * job.columns + at.column;
  std::int64_t c = 0;
  for (; c + lanes <= at.columns; c += lanes) {
    f32 sum = add ? load(out + c) : f32{};
    for (std::int64_t i = 0; i < rows; ++i) sum += load(tile[first + i] + c) * load(weight + i * job.columns + c);
    store(out + c, sum);
  }
  for (; c < at.columns; ++c) {
    float sum = add ? out[c] : 0.0f;
    for (std::int64_t i = 0; i < rows; ++i) sum += tile[first + i][c] * weight[i * job.columns + c];
    out[c] = sum;
  }
}

// Prefetches what write_gradients will read and write in a row. Always inline, like its callers: GCC takes a function
// that only prefetches for one without effects, and removes calls to it.
[[gnu::always_inline]] inline void prefetch_gradients(const MatmulJob& job, const TilePlace& at, std::int64_t row) {
  if (row >= at.rows) return;
  const std::int64_t own = (at.row + row) * job.columns + at.column;
  const std::int64_t shared = score_row_of(*job.weight, at.row + row) * job.columns + at.column;
  for (std::int64_t c = 0; c < at.columns; c += line) {
    if (job.d_scores != nullptr) {
      __builtin_prefetch(job.weight->weight + own + c);
      __builtin_prefetch(job.d_scores + shared + c, 1);
    }
    if (job.d_weight != nullptr) {
      __builtin_prefetch(job.weight->scores + shared + c);
      __builtin_prefetch(job.d_weight + own + c, 1);
    }
  }
}

inline void write_gradients(const MatmulJob& job, const TilePlace& at, const Tile& tile) {
  if (job.d_weight != nullptr) {
    for (std::int64_t i = 0; i < at.rows; ++i) {
      float* out = job.d_weight + (at.row + i) * job.columns + at.column;
      keep(*job.weight, at.row + i, at.column, at.columns, tile[i], false, out);
    }
  }
  if (job.d_scores == nullptr) return;
  const std::int64_t together = job.weight->score_rows;
  std::int64_t score_row = score_row_of(*job.weight, at.row);
  std::int64_t begun = at.row - score_row * together;  // rows of this score in earlier tiles
  for (std::int64_t i = 0; i < at.rows; ++score_row) {
    const std::int64_t rows = together - begun < at.rows - i ? together - begun : at.rows - i;
    add_scores(job, at, tile, score_row, i, rows, begun > 0);
    i += rows;
    begun = 0;
  }
}

// Prefetches the part of a masked weight that is packed next, while products are summed: the sums of a tile take some
// microseconds, in which the memory is otherwise idle.
class Ahead {
 public:
  Ahead(const MatmulPanels& job, std::int64_t panel, std::int64_t panels, std::int64_t begin, std::int64_t end)
      : mask_(*job.source.mask) {
    const std::int64_t sides[2][2] = {{panel * job.width, (panel + panels) * job.width},
                                      {begin * values_a_word, end * values_a_word}};
    const auto& rows = sides[job.across ? 1 : 0];
    const auto& columns = sides[job.across ? 0 : 1];
    row_ = rows[0];
    end_row_ = rows[1] < mask_.n_out ? rows[1] : mask_.n_out;
    first_ = column_ = columns[0];
    end_column_ = columns[1] < mask_.n_in ? columns[1] : mask_.n_in;
    find_row();
  }

  std::int64_t lines() const {
    return row_ < end_row_ ? (end_row_ - row_) * ((end_column_ - first_ + line - 1) / line) : 0;
  }

  void fetch(std::int64_t lines) {
    for (; lines > 0 && row_ < end_row_; --lines) {
      __builtin_prefetch(weight_ + column_, 0, 2);
      __builtin_prefetch(scores_ + column_, 0, 2);
      column_ += line;
      if (column_ < end_column_) continue;
      column_ = first_;
      ++row_;
      find_row();
    }
  }

 private:
  void find_row() {
    weight_ = mask_.weight + row_ * mask_.n_in;
    scores_ = mask_.scores + score_row_of(mask_, row_) * mask_.n_in;
  }

  const MaskedWeight& mask_;
  std::int64_t row_, end_row_, column_, first_, end_column_;
  const float *weight_, *scores_;
};

// Multiplies all panels of a block by its tiles, over words k to k + depth.
template <typename Fetch>
inline void multiply_depth(const MatmulJob& job, const MatmulBlock& block, std::int64_t k, std::int64_t depth,
                           const float* right, std::int64_t stride, float* sums, Fetch fetch) {
  const std::int64_t words = job.right.words;
  const bool last = k + depth >= words;
#if SPARSEBERT_MATRICES
  [[maybe_unused]] const Tiles tiles;
#endif
  for (std::int64_t t = 0; t < block.tiles; ++t) {
    const float* left = job.left + ((block.tile + t) * words + k) * tile_rows;
    for (std::int64_t p = 0; p < block.panels; ++p) {
      const TilePlace at = place_of(job, block.tile + t, block.panel + p);
      float* waiting = sums + (t * block.panels + p) * (tile_rows * tile_columns);
      const bool turns = p + 1 == block.panels;
      const TilePlace coming = place_of(job, block.tile + t + turns, block.panel + (turns ? 0 : p + 1));
      alignas(64) Tile tile;
      float* to = last ? tile[0] : waiting;
#if SPARSEBERT_MATRICES
      products(left, right + p * stride, depth, tile, [&](std::int64_t row) { fetch(coming, row, last); });
      if (k > 0 || !last) {
        for (int i = 0; i < tile_rows * tile_columns; i += lanes) {
          store(to + i, k > 0 ? load(tile[0] + i) + load(waiting + i) : load(tile[0] + i));
        }
      }
#else
      const std::int64_t piece = (depth + tile_rows - 1) / tile_rows;
      f32 acc[tile_rows][tile_vectors] = {};
      if (k > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < tile_vectors; ++n) acc[i][n] = load(waiting + i * tile_columns + n * lanes);
        }
      }
      // Prefetches the next tile's panel, in the first pass over this one.
      const float* next = p == 0 ? left + words * tile_rows : left;
      for (std::int64_t i = 0; i < tile_rows; ++i) {
        const std::int64_t from = i * piece, here = depth - from < piece ? depth - from : piece;
        if (here <= 0) break;
        fetch(coming, i, last);
        add_products(left + from * tile_rows, right + p * stride + from * tile_columns, here, next + from * tile_rows,
                     acc);
      }
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
        for (int n = 0; n < tile_vectors; ++n) store(to + i * tile_columns + n * lanes, acc[i][n]);
      }
#endif
      if (last) job.out != nullptr ? write_out(job, at, tile) : write_gradients(job, at, tile);
    }
  }
}

void multiply(const MatmulJob& job, const MatmulBlock& block, float* work) {
  const std::int64_t words = job.right.words, panel_end = block.panel + block.panels;
  std::int64_t k = 0;
  // Runs once even if there is nothing to sum.
  do {
    const std::int64_t depth = words - k < job.depth ? words - k : job.depth;
    const std::int64_t end = k + depth;
    if (job.right.panels != nullptr) {
      const std::int64_t stride = words * tile_columns;
      const float* right = job.right.panels + block.panel * stride + k * tile_columns;
      // Prefetched one tile before they are needed: the tile itself may take less time than a memory access.
      const auto fetch = [&](const TilePlace& coming, std::int64_t i, bool last) __attribute__((always_inline)) {
        if (last) prefetch_gradients(job, coming, i);
      };
      multiply_depth(job, block, k, depth, right, stride, work, fetch);
    } else {
      const std::int64_t stride = depth * tile_columns;
      pack(job.right, block.panel, panel_end, k, end, work, stride);
      Ahead ahead = end < words
                        ? Ahead(job.right, block.panel, block.panels, end, end + job.depth)
                        : Ahead(job.right, panel_end, block.panels, 0, job.depth);
      const std::int64_t pieces = block.tiles * block.panels * tile_rows;
      const std::int64_t lines = (ahead.lines() + pieces - 1) / pieces;
      multiply_depth(job, block, k, depth, work, stride, work + block.panels * job.depth * tile_columns,
                     [&](const TilePlace&, std::int64_t, bool) { ahead.fetch(lines); });
    }
    k = end;
  } while (k < words);
}

std::int64_t count_kept(const MaskedWeight& mask, std::int64_t row) {
  alignas(64) float one[chunk], kept[chunk];
  for (int c = 0; c < chunk; ++c) one[c] = 1.0f;
  std::int64_t count = 0;
  for (std::int64_t c = 0; c < mask.n_in; c += chunk) {
    const std::int64_t here = mask.n_in - c < chunk ? mask.n_in - c : chunk;
    keep(mask, row, c, here, one, false, kept);
    for (std::int64_t i = 0; i < here; ++i) count += kept[i] != 0.0f;
  }
  return count;
}

}  // namespace

#if !defined(SPARSEBERT_TILES)
#include "masked_matmul_sparse.inl"

const MaskedMatmulKernel kernel = {values_a_word, word_run,   tile_rows,     tile_columns,    0.35,      pack,
                                   multiply,      panel_tokens, sparse_floats, multiply_sparse, count_kept};
#else
// Sparse weights are multiplied as floats; on AMX as if dense, until measurements show from which sparsity on this stops
// paying.
const MaskedMatmulKernel kernel = {values_a_word, word_run,
                                   tile_rows,     tile_columns,
                                   SPARSEBERT_MATRICES ? 0.0 : 0.12,
                                   pack,          multiply,
                                   0,             nullptr,
                                   nullptr,       count_kept};
#endif
#undef SPARSEBERT_MATRICES
