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

// A matrix in memory, its rows `stride` apart.
template <typename T>
struct Plain {
  const T* values;
  std::int64_t stride;
  f32 vector(std::int64_t row, std::int64_t col) const { return read_vector(values + row * stride + col); }
  float one(std::int64_t row, std::int64_t col) const { return read_one(values + row * stride + col); }
};

// W, masked as it is read.
struct Masked {
  const MaskedWeight& w;
  f32 vector(std::int64_t row, std::int64_t col) const {
    const std::int64_t score_row = row / w.share;
    const f32 score = load(w.scores + score_row * w.n_in + col);
    const f32 weight = load(w.weight + row * w.n_in + col);
    return score >= threshold(score_row, col) ? weight : f32{};
  }
  float one(std::int64_t row, std::int64_t col) const {
    const std::int64_t score_row = row / w.share;
    const float limit = w.reach == 0 ? *w.thresholds : w.thresholds[(score_row * w.n_in + col) / w.reach];
    return w.scores[score_row * w.n_in + col] >= limit ? w.weight[row * w.n_in + col] : 0.0f;
  }
  f32 threshold(std::int64_t score_row, std::int64_t col) const {
    if (w.reach == 0) return splat(*w.thresholds);
    const float* next = w.thresholds + (score_row * w.n_in + col) / w.reach;
    std::int64_t left = w.reach - col % w.reach;
    f32 limits{};
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      limits[i] = *next;
      if (--left == 0) {
        ++next;
        left = w.reach;
      }
    }
    return limits;
  }
};

// `lanes` values of a row from col on, zeros from `end` on.
template <typename Source>
inline f32 read_until(const Source& source, std::int64_t row, std::int64_t col, std::int64_t end) {
  if (col + lanes <= end) return source.vector(row, col);
  f32 v{};
  for (std::int64_t i = 0; col + i < end; ++i) v[i] = source.one(row, col + i);
  return v;
}

#if SPARSEBERT_PAIRS
constexpr int depths_a_word = 2;

// Two vectors of one row, one behind the other, as words of two bf16.
inline f32 words_of(f32 first, f32 second) {
  return reinterpret_cast<f32>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}
// Two rows, one under the other, likewise.
inline f32 words_across(f32 upper, f32 lower) { return reinterpret_cast<f32>(round_pairs(upper, lower)); }
#else
constexpr int depths_a_word = 1;
#endif

// Columns of a source in memory are the depth: its rows from `begin`, as long as there are any below `end`, become a
// panel of `width`.
template <typename Source>
inline void pack_across(const Source& source, std::int64_t begin, std::int64_t end, std::int64_t depth, int width,
                        float* panel) {
  const std::int64_t words = (depth + depths_a_word - 1) / depths_a_word;
  for (int at = 0; at < width; at += lanes) {
    for (std::int64_t word = 0; word < words; word += lanes) {
      f32 v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const std::int64_t row = begin + at + i;
        if (row >= end) {
          v[i] = f32{};
          continue;
        }
#if SPARSEBERT_PAIRS
        v[i] = words_of(read_until(source, row, 2 * word, depth), read_until(source, row, 2 * word + lanes, depth));
#else
        v[i] = read_until(source, row, word, depth);
#endif
      }
      transpose(v);
      const int count = words - word < lanes ? static_cast<int>(words - word) : lanes;
      for (int i = 0; i < count; ++i) store(panel + (word + i) * width + at, v[i]);
    }
  }
}

// Rows of a source in memory are the depth: word `word` of a panel of `width`, its columns from `begin`, as long as
// there are any below `end`.
template <typename Source>
inline void pack_along(const Source& source, std::int64_t begin, std::int64_t end, std::int64_t depth, int width,
                       std::int64_t word, float* panel) {
  for (int at = 0; at < width; at += lanes) {
#if SPARSEBERT_PAIRS
    const f32 upper = read_until(source, 2 * word, begin + at, end);
    const f32 lower = 2 * word + 1 < depth ? read_until(source, 2 * word + 1, begin + at, end) : f32{};
    store(panel + word * width + at, words_across(upper, lower));
#else
    (void)depth;
    store(panel + word * width + at, read_until(source, word, begin + at, end));
#endif
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
  for (std::int64_t word = begin; word < stop; ++word) {
    for (std::int64_t row = 0; row < job.rows; row += left_width) {
      pack_along(Plain<T>{job.grad_y, job.w.n_out}, row, job.rows, job.depth, left_width, word,
                 job.left + row * words);
    }
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
    const std::int64_t at = (row + i) * w.n_in + col, score_row = (row + i) / w.share;
    const bool first = !job.add && (row + i) % w.share == 0;
    float* scores = job.grad_scores != nullptr ? job.grad_scores + score_row * w.n_in + col : nullptr;
    float* weight = job.grad_weight != nullptr ? job.grad_weight + at : nullptr;
#pragma GCC unroll 8
    for (int n = 0; n < tile_vectors; ++n) {
      const std::int64_t here = columns - n * lanes, c = n * lanes;
      if (here >= lanes) {
        if (scores != nullptr) {
          const f32 v = acc[i][n] * load(w.weight + at + c);
          store(scores + c, first ? v : load(scores + c) + v);
        }
        if (weight != nullptr) {
          const f32 score = load(w.scores + score_row * w.n_in + col + c);
          const f32 v = score >= Masked{w}.threshold(score_row, col + c) ? acc[i][n] : f32{};
          store(weight + c, job.add ? load(weight + c) + v : v);
        }
      } else {
        for (std::int64_t k = 0; k < here; ++k) {
          const float g = acc[i][n][k];
          if (scores != nullptr) scores[c + k] = (first ? 0.0f : scores[c + k]) + g * w.weight[at + c + k];
          if (weight != nullptr) {
            const std::int64_t score = score_row * w.n_in + col + c + k;
            const float limit = w.reach == 0 ? *w.thresholds : w.thresholds[score / w.reach];
            weight[c + k] = (job.add ? weight[c + k] : 0.0f) + (w.scores[score] >= limit ? g : 0.0f);
          }
        }
      }
    }
  }
}

template <typename T>
void multiply(const MaskedJob<T>& job, std::int64_t panel, std::int64_t begin, std::int64_t end, float* right) {
  const std::int64_t words = (job.depth + depths_a_word - 1) / depths_a_word;
  const std::int64_t col = panel * right_width;
  const std::int64_t columns = job.columns - col < right_width ? job.columns - col : right_width;
  if (job.product == Product::forward) {
    pack_across(Masked{job.w}, col, job.columns, job.depth, right_width, right);
  } else {
    for (std::int64_t word = 0; word < words; ++word) {
      if (job.product == Product::grad_x) {
        pack_along(Masked{job.w}, col, job.columns, job.depth, right_width, word, right);
      } else {
        pack_along(Plain<T>{job.x, job.w.n_in}, col, job.columns, job.depth, right_width, word, right);
      }
    }
  }
  for (std::int64_t left = begin; left < end; ++left) {
    for (int tile = 0; tile < left_width; tile += tile_rows) {
      const std::int64_t row = left * left_width + tile;
      if (row >= job.rows) break;
      const std::int64_t rows = job.rows - row < tile_rows ? job.rows - row : tile_rows;
      f32 acc[tile_rows][tile_vectors] = {};
      multiply_words(job.left + left * words * left_width + tile, right, words, acc);
      if (job.product == Product::grad_w) {
        finish_gradients(job, row, rows, col, columns, acc);
      } else {
        finish(job, row, rows, col, columns, acc);
      }
    }
  }
}

}  // namespace

#if !SPARSEBERT_PAIRS
const MaskedKernel<float> kernel = {left_width, right_width, depths_a_word, pack_left<float>, multiply<float>};
#endif
const MaskedKernel<Bf16> kernel_bf16 = {left_width, right_width, depths_a_word, pack_left<Bf16>, multiply<Bf16>};
