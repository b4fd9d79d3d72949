// The arithmetic of masked_matmul, written once for every vector width. Included after panel.inl, by its rules, with
// tile_rows and tile_vectors, the register tile. SPARSEBERT_PAIRS is 1 where two bf16 are multiplied at once.

typedef Vector<std::uint32_t>::type u32;

namespace {

constexpr int left_width = lanes;
constexpr int right_width = tile_vectors * lanes;
static_assert(left_width % tile_rows == 0, "a left panel is a whole number of tiles");

typedef std::uint16_t u16_half __attribute__((vector_size(lanes * 2)));
typedef std::uint16_t u16_half_unaligned __attribute__((vector_size(lanes * 2), aligned(2)));

inline float widened(Bf16 v) {
  union {
    std::uint32_t word;
    float value;
  } both = {static_cast<std::uint32_t>(v) << 16};
  return both.value;
}

inline f32 read_vector(const float* p) { return load(p); }
inline f32 read_vector(const Bf16* p) {
  const u16_half half = *reinterpret_cast<const u16_half_unaligned*>(p);
  return reinterpret_cast<f32>(__builtin_convertvector(half, u32) << 16);
}
inline float read_one(const float* p) { return *p; }
inline float read_one(const Bf16* p) { return widened(*p); }

// To the nearest bf16 in the lower half of each word, of two equally near ones the even; a NaN stays one.
inline u32 rounded(f32 v) {
  const u32 bits = reinterpret_cast<u32>(v);
  return (v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : (bits | 0x400000u)) >> 16;
}

inline void write_vector(float* p, f32 v) { store(p, v); }
inline void write_vector(Bf16* p, f32 v) {
  *reinterpret_cast<u16_half_unaligned*>(p) = __builtin_convertvector(rounded(v), u16_half);
}

// `count` < lanes values, by way of memory.
template <typename T>
inline void write_some(T* p, f32 v, std::int64_t count) {
  T all[lanes];
  write_vector(all, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = all[i];
}

#if SPARSEBERT_PAIRS
constexpr int depths_a_word = 2;
#else
constexpr int depths_a_word = 1;
#endif

// A row of a matrix in memory.
template <typename T>
struct PlainRow {
  const T* values;
  f32 vector(std::int64_t col) const { return read_vector(values + col); }
  void prefetch(std::int64_t col) const { __builtin_prefetch(values + col, 0, 2); }
  float one(std::int64_t col) const { return read_one(values + col); }
};

template <typename T>
struct Plain {
  typedef PlainRow<T> Row;
  static constexpr bool is_weight = false;
  const T* values;
  std::int64_t stride;
  Row row(std::int64_t i) const { return {values + i * stride}; }
};

// A row of W, masked as it is read.
struct MaskedRow {
  const float* weight;
  const float* scores;
  const float* thresholds;
  std::int64_t reach;

  void prefetch(std::int64_t col) const {
    __builtin_prefetch(weight + col, 0, 2);
    __builtin_prefetch(scores + col, 0, 2);
  }
  f32 vector(std::int64_t col) const { return load(scores + col) >= limits(col) ? load(weight + col) : f32{}; }
  float one(std::int64_t col) const { return scores[col] >= limit(col) ? weight[col] : 0.0f; }
  float limit(std::int64_t col) const { return reach == 0 ? *thresholds : thresholds[col / reach]; }
  f32 limits(std::int64_t col) const {
    if (reach == 0) return splat(*thresholds);
    const float* next = thresholds + col / reach;
    std::int64_t left = reach - col % reach;
    f32 found{};
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      found[i] = *next;
      if (--left == 0) {
        ++next;
        left = reach;
      }
    }
    return found;
  }
};

struct Masked {
  typedef MaskedRow Row;
  static constexpr bool is_weight = true;
  const MaskedWeight& w;
  Row row(std::int64_t i) const {
    const std::int64_t shared = w.share == 1 ? i : i / w.share;
    const float* thresholds = w.reach == 0 ? w.thresholds : w.thresholds + shared * (w.n_in / w.reach);
    return {w.weight + i * w.n_in, w.scores + shared * w.n_in, thresholds, w.reach};
  }
};

// `lanes` values of a row from col on, zeros from `end` on.
template <typename Row>
inline f32 read_until(const Row& row, std::int64_t col, std::int64_t end) {
  if (col + lanes <= end) return row.vector(col);
  f32 v{};
  for (std::int64_t i = 0; col + i < end; ++i) v[i] = row.one(col + i);
  return v;
}

#if SPARSEBERT_PAIRS
// Two vectors of one row, one behind the other, as words of two bf16.
inline f32 words_of(f32 first, f32 second) {
  return reinterpret_cast<f32>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}
// Two rows, one under the other, likewise.
inline f32 words_across(f32 upper, f32 lower) { return reinterpret_cast<f32>(round_pairs(upper, lower)); }
#endif

// Columns of a source in memory are the depth: its rows from `begin`, as long as there are any below `end`, become a
// panel of `width`.
template <typename Source>
inline void pack_across(const Source& source, std::int64_t begin, std::int64_t end, std::int64_t depth, int width,
                        float* panel) {
  const std::int64_t words = (depth + depths_a_word - 1) / depths_a_word;
  for (int at = 0; at < width; at += lanes) {
    const std::int64_t filled = end - begin - at;
    typename Source::Row rows[lanes];
    for (int i = 0; i < lanes; ++i) rows[i] = source.row(i < filled ? begin + at + i : begin);
    for (std::int64_t word = 0; word < words; word += lanes) {
      f32 v[lanes];
      // Sixteen rows of two matrices are more streams than the processor follows.
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        for (int part = 0; part < depths_a_word; ++part) {
          if (Source::is_weight) rows[i].prefetch(word * depths_a_word + part * lanes + 256);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
#if SPARSEBERT_PAIRS
        v[i] = i < filled ? words_of(read_until(rows[i], 2 * word, depth), read_until(rows[i], 2 * word + lanes, depth))
                          : f32{};
#else
        v[i] = i < filled ? read_until(rows[i], word, depth) : f32{};
#endif
      }
      transpose(v);
      const int count = words - word < lanes ? static_cast<int>(words - word) : lanes;
      for (int i = 0; i < count; ++i) store(panel + (word + i) * width + at, v[i]);
    }
  }
}

// Rows of a source in memory are the depth: word `word` of `count` panels of `width`, `size` apart, its columns from
// `begin`, as long as there are any below `end`.
template <typename Source>
inline void pack_along(const Source& source, std::int64_t begin, std::int64_t end, std::int64_t depth,
                       std::int64_t count, std::int64_t size, int width, std::int64_t word, float* panels) {
#if SPARSEBERT_PAIRS
  const auto upper = source.row(2 * word);
  const bool paired = 2 * word + 1 < depth;
  const auto lower = source.row(paired ? 2 * word + 1 : 2 * word);
#else
  (void)depth;
  const auto upper = source.row(word);
#endif
  // Rows are too far apart for the processor to see that they are read in turn.
  const std::int64_t ahead = word + 9 < depth / depths_a_word ? depths_a_word * (word + 8) : 0;
  const auto next = source.row(ahead), after_next = source.row(ahead + depths_a_word - 1);
  for (std::int64_t p = 0; p < count; ++p) {
    for (int at = 0; at < width; at += lanes) {
      const std::int64_t col = begin + p * width + at;
      next.prefetch(col);
      if (depths_a_word == 2) after_next.prefetch(col);
#if SPARSEBERT_PAIRS
      const f32 v = words_across(read_until(upper, col, end), paired ? read_until(lower, col, end) : f32{});
#else
      const f32 v = read_until(upper, col, end);
#endif
      store(panels + p * size + word * width + at, v);
    }
  }
}

template <typename T>
void pack_left(const MaskedJob<T>& job, std::int64_t part) {
  const std::int64_t words = (job.depth + depths_a_word - 1) / depths_a_word;
  if (job.product != Product::grad_w) {
    const Plain<T> source = job.product == Product::forward ? Plain<T>{job.x, job.w.n_in}
                                                            : Plain<T>{job.grad_y, job.w.n_out};
    pack_across(source, part * left_width, job.rows, job.depth, left_width, job.left + part * words * left_width);
    return;
  }
  const std::int64_t begin = part * pack_depth / depths_a_word;
  const std::int64_t stop = begin + pack_depth / depths_a_word < words ? begin + pack_depth / depths_a_word : words;
  const std::int64_t panels = (job.rows + left_width - 1) / left_width;
  for (std::int64_t word = begin; word < stop; ++word) {
    pack_along(Plain<T>{job.grad_y, job.w.n_out}, 0, job.rows, job.depth, panels, words * left_width, left_width, word,
               job.left);
  }
}

// acc[i][n] += sum over the words of left[i] * right[n].
inline void multiply_words(const float* left, const float* right, std::int64_t words,
                           f32 (&acc)[tile_rows][tile_vectors]) {
#if SPARSEBERT_PAIRS
  for (std::int64_t k = 0; k < words; ++k) {
    __m512bh v[tile_vectors];
#pragma GCC unroll 8
    for (int n = 0; n < tile_vectors; ++n) v[n] = reinterpret_cast<__m512bh>(load(right + n * lanes));
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
      const __m512bh u = reinterpret_cast<__m512bh>(splat(*reinterpret_cast<const std::uint32_t*>(left + i)));
#pragma GCC unroll 8
      for (int n = 0; n < tile_vectors; ++n) {
        acc[i][n] = reinterpret_cast<f32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[i][n]), v[n], u));
      }
    }
    left += left_width;
    right += right_width;
  }
#else
  multiply_tile<float, tile_rows, tile_vectors>(left, 1, left_width, right, right_width, words, acc);
#endif
}

// A tile of y or grad_x, `rows` rows and `columns` columns of which exist.
template <typename T>
inline void finish(const MaskedJob<T>& job, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t columns,
                   f32 (&acc)[tile_rows][tile_vectors]) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T* out = job.out + (row + i) * job.columns + col;
#pragma GCC unroll 8
    for (int n = 0; n < tile_vectors; ++n) {
      const std::int64_t here = columns - n * lanes;
      if (here >= lanes) {
        const f32 v = job.bias != nullptr ? acc[i][n] + load(job.bias + col + n * lanes) : acc[i][n];
        write_vector(out + n * lanes, v);
      } else if (here > 0) {
        f32 v = acc[i][n];
        for (std::int64_t c = 0; job.bias != nullptr && c < here; ++c) v[c] += job.bias[col + n * lanes + c];
        write_some(out + n * lanes, v, here);
      }
    }
  }
}

// The same of G: what it gives the gradients.
template <typename T>
inline void finish_gradients(const MaskedJob<T>& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                             std::int64_t columns, f32 (&acc)[tile_rows][tile_vectors]) {
  const MaskedWeight& w = job.w;
  for (std::int64_t i = 0; i < rows; ++i) {
    const MaskedRow source = Masked{w}.row(row + i);
    const std::int64_t shared = w.share == 1 ? row + i : (row + i) / w.share;
    const bool first = !job.add && row + i == shared * w.share;
    float* scores = job.grad_scores != nullptr ? job.grad_scores + shared * w.n_in + col : nullptr;
    float* weight = job.grad_weight != nullptr ? job.grad_weight + (row + i) * w.n_in + col : nullptr;
#pragma GCC unroll 8
    for (int n = 0; n < tile_vectors; ++n) {
      const std::int64_t here = columns - n * lanes, c = n * lanes;
      if (here >= lanes) {
        if (scores != nullptr) {
          const f32 v = acc[i][n] * load(source.weight + col + c);
          store(scores + c, first ? v : load(scores + c) + v);
        }
        if (weight != nullptr) {
          const f32 v = load(source.scores + col + c) >= source.limits(col + c) ? acc[i][n] : f32{};
          store(weight + c, job.add ? load(weight + c) + v : v);
        }
      } else {
        for (std::int64_t k = c; k < c + here; ++k) {
          const float g = acc[i][n][k - c];
          if (scores != nullptr) scores[k] = (first ? 0.0f : scores[k]) + g * source.weight[col + k];
          if (weight != nullptr) {
            const bool kept = source.scores[col + k] >= source.limit(col + k);
            weight[k] = (job.add ? weight[k] : 0.0f) + (kept ? g : 0.0f);
          }
        }
      }
    }
  }
}

template <typename T>
void pack_right(const MaskedJob<T>& job, std::int64_t panel, std::int64_t count, float* right) {
  const std::int64_t words = (job.depth + depths_a_word - 1) / depths_a_word, size = words * right_width;
  if (job.product == Product::forward) {
    for (std::int64_t p = 0; p < count; ++p) {
      pack_across(Masked{job.w}, (panel + p) * right_width, job.columns, job.depth, right_width, right + p * size);
    }
    return;
  }
  for (std::int64_t word = 0; word < words; ++word) {
    const auto pack = [&](const auto& source) {
      pack_along(source, panel * right_width, job.columns, job.depth, count, size, right_width, word, right);
    };
    job.product == Product::grad_x ? pack(Masked{job.w}) : pack(Plain<T>{job.x, job.w.n_in});
  }
}

template <typename T>
void multiply(const MaskedJob<T>& job, std::int64_t panel, std::int64_t count, std::int64_t begin, std::int64_t end,
              float* right, float* sums) {
  const std::int64_t words = (job.depth + depths_a_word - 1) / depths_a_word;
  pack_right(job, panel, count, right);
  for (std::int64_t block = begin; block < end; block += left_block) {
    const std::int64_t stop = block + left_block < end ? block + left_block : end;
    for (std::int64_t word = 0; word == 0 || word < words; word += chunk_words) {
      const std::int64_t here = words - word < chunk_words ? words - word : chunk_words;
      for (std::int64_t left = block; left < stop; ++left) {
        for (int tile = 0; tile < left_width; tile += tile_rows) {
          const std::int64_t row = left * left_width + tile;
          if (row >= job.rows) break;
          const std::int64_t rows = job.rows - row < tile_rows ? job.rows - row : tile_rows;
          float* waiting = sums + (row - block * left_width) * count * right_width;
          for (std::int64_t p = 0; p < count; ++p, waiting += tile_rows * right_width) {
            f32 acc[tile_rows][tile_vectors] = {};
            if (word > 0) {
#pragma GCC unroll 16
              for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 8
                for (int n = 0; n < tile_vectors; ++n) acc[i][n] = load(waiting + (i * tile_vectors + n) * lanes);
              }
            }
            multiply_words(job.left + (left * words + word) * left_width + tile,
                           right + (p * words + word) * right_width, here, acc);
            if (word + here < words) {
#pragma GCC unroll 16
              for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 8
                for (int n = 0; n < tile_vectors; ++n) store(waiting + (i * tile_vectors + n) * lanes, acc[i][n]);
              }
              continue;
            }
            const std::int64_t col = (panel + p) * right_width;
            const std::int64_t columns = job.columns - col < right_width ? job.columns - col : right_width;
            if (job.product == Product::grad_w) {
              finish_gradients(job, row, rows, col, columns, acc);
            } else {
              finish(job, row, rows, col, columns, acc);
            }
          }
        }
      }
    }
  }
}

}  // namespace

#if !SPARSEBERT_PAIRS
const MaskedKernel<float> kernel = {left_width, right_width, depths_a_word, pack_left<float>, multiply<float>};
#endif
const MaskedKernel<Bf16> kernel_bf16 = {left_width, right_width, depths_a_word, pack_left<Bf16>, multiply<Bf16>};
