// The arithmetic of attention for training, written once for every vector width: one head of one sequence at a time,
// with all sums in float32. Compiled by isa/floats.h.
//
// Queries are innermost, `width` of them at a time, one per lane, and the keys are rows: the softmax then needs no sum
// across lanes. For sums over queries (dK and dV), the values of the head are innermost. So queries and dO are stored
// in both layouts. Keys that are not kept are skipped when keys are read. The rows after the last key, up to a multiple
// of draw_keys, are zero, and so are the rows after the last query, which therefore add nothing to any gradient.

#include "panel.inl"
#include "bf16.inl"
#include "philox.inl"

namespace {

constexpr int vectors = 2;
constexpr std::int64_t width = vectors * lanes;
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int draw_keys = 8;  // keys that one call of draw() decides about
constexpr float log2_e = 1.44269504f;
constexpr float ln_2 = 0.69314718f;

inline std::int64_t whole(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Room {
  std::int64_t keys, queries, size;  // sizes of a head, each rounded up

  explicit Room(const Attention& job)
      : keys(whole(job.tokens, draw_keys)), queries(whole(job.tokens, width)), size(whole(job.size, lanes)) {}
};

std::int64_t floats(const Attention& job, bool backward) {
  const Room room(job);
  const std::int64_t forward = 2 * room.keys * room.size + 2 * room.queries * room.size + (room.keys + room.size) * width;
  return !backward ? forward
                   : forward + 2 * room.keys * room.size + 2 * room.queries * room.size + 2 * room.keys * width;
}

inline void fill_zeros(float* to, std::int64_t n) { __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(float)); }

// The rows of one head in a tensor [sequences, tokens, heads, size]: where they begin, and their distance.
struct Head {
  std::int64_t begin, stride;
  const bool* keep;

  Head(const Attention& job, std::int64_t task)
      : begin((task / job.heads * job.tokens * job.heads + task % job.heads) * job.size),
        stride(job.heads * job.size),
        keep(job.keep == nullptr ? nullptr : job.keep + task / job.heads * job.tokens) {}

  bool keeps(std::int64_t token) const { return keep == nullptr || keep[token]; }
};

template <typename T>
inline void read_rows(const T* from, const Attention& job, const Head& head, const Room& room, float scale, float* to) {
  for (std::int64_t t = 0; t < room.queries; ++t, to += room.size) {
    if (t < job.tokens) read_values(from + head.begin + t * head.stride, job.size, to);
    const std::int64_t filled = t < job.tokens ? job.size : 0;
    fill_zeros(to + filled, room.size - filled);
    if (scale != 1.0f) {
      for (std::int64_t k = 0; k < room.size; k += lanes) store(to + k, load(to + k) * scale);
    }
  }
}

// Reads the kept keys and their values; returns their number.
template <typename T>
inline std::int64_t read_keys(const T* k, const T* v, const Attention& job, const Head& head, const Room& room,
                              float* keys, float* values) {
  std::int64_t n = 0;
  const std::int64_t padding = room.size - job.size;
  for (std::int64_t t = 0; t < job.tokens; ++t) {
    if (!head.keeps(t)) continue;
    const std::int64_t at = head.begin + t * head.stride;
    read_values(k + at, job.size, keys + n * room.size);
    read_values(v + at, job.size, values + n * room.size);
    fill_zeros(keys + n * room.size + job.size, padding);
    fill_zeros(values + n * room.size + job.size, padding);
    ++n;
  }
  const std::int64_t rest = (whole(n, draw_keys) - n) * room.size;
  fill_zeros(keys + n * room.size, rest);
  fill_zeros(values + n * room.size, rest);
  return n;
}

// rows [n][size] -> [size][n].
inline void transpose_rows(const float* rows, std::int64_t n, std::int64_t size, float* out, std::int64_t out_stride) {
  for (std::int64_t t = 0; t < n; t += lanes) {
    for (std::int64_t k = 0; k < size; k += lanes) {
      f32 v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = load(rows + (t + i) * size + k);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(out + (k + i) * out_stride + t, v[i]);
    }
  }
}

// Writes a panel [size][width] with the queries from `first` on to their rows.
template <typename T>
inline void write_queries(const float* panel, const Attention& job, const Head& head, const Room& room,
                          std::int64_t first, float* rows, T* out) {
  transpose_rows(panel, room.size, width, rows, room.size);
  const std::int64_t count = job.tokens - first < width ? job.tokens - first : width;
  for (std::int64_t i = 0; i < count; ++i) {
    write_values(rows + i * room.size, job.size, out + head.begin + (first + i) * head.stride);
  }
}

// Calls use(row, vector, sums) with the sums over k < depth of left[row, k] * right[k][query], for whole tiles of rows.
template <typename Use>
inline void times_queries(const float* left, std::int64_t row_stride, std::int64_t step, const float* right,
                          std::int64_t right_step, std::int64_t depth, std::int64_t rows, Use use) {
  for (std::int64_t r = 0; r < rows; r += tile_rows) {
    f32 acc[tile_rows][vectors] = {};
    multiply_tile<float, tile_rows, vectors>(left + r * row_stride, row_stride, step, right, right_step, depth, acc);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < vectors; ++c) use(r + i, c, acc[i][c]);
    }
  }
}

// sums[key][size] += the sum over queries of left[key][query] * right[query][size].
template <int count>
inline void add_over_queries(const float* left, const float* right, std::int64_t size, std::int64_t queries,
                             std::int64_t keys, float* sums) {
  for (std::int64_t r = 0; r < keys; r += tile_rows) {
    f32 acc[tile_rows][count];
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < count; ++c) acc[i][c] = load(sums + (r + i) * size + c * lanes);
    }
    multiply_tile<float, tile_rows, count>(left + r * width, width, 1, right, size, queries, acc);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < count; ++c) store(sums + (r + i) * size + c * lanes, acc[i][c]);
    }
  }
}

inline void add_over_queries(const float* left, const float* right, std::int64_t size, std::int64_t queries,
                             std::int64_t keys, float* sums) {
  std::int64_t k = 0;
  for (; k + 2 * lanes <= size; k += 2 * lanes) {
    add_over_queries<2>(left, right + k, size, queries, keys, sums + k);
  }
  if (k < size) add_over_queries<1>(left, right + k, size, queries, keys, sums + k);
}

// 2^v, but at least 2^-126; a NaN stays a NaN.
inline f32 power_of_2(f32 v) {
  const f32 power = exp2(v < splat(-126.0f) ? splat(-126.0f) : v);
  return v == v ? power : v;
}

// Calls use(key, c, which) for each of n keys and the queries from `first` on: `which` is all ones in the lanes that
// dropout keeps.
template <typename Use>
inline void for_kept(const Attention& job, std::int64_t task, std::int64_t first, std::int64_t n, Use use) {
  for (std::int64_t draw_index = 0; draw_index * draw_keys < n; ++draw_index) {
    const std::int64_t begin = draw_index * draw_keys;
    const int here = static_cast<int>(n - begin < draw_keys ? n - begin : draw_keys);
    if (job.dropout.limit == 0) {
      for (int i = 0; i < here; ++i) {
        for (int c = 0; c < vectors; ++c) use(begin + i, c, i32{} - 1);
      }
      continue;
    }
    for (int c = 0; c < vectors; ++c) {
      const Draws draws = draw(job.dropout.seed, static_cast<std::uint32_t>(first + c * lanes),
                               static_cast<std::uint32_t>(draw_index), static_cast<std::uint32_t>(task));
      if (here == draw_keys) {
#pragma GCC unroll 8
        for (int i = 0; i < draw_keys; ++i) use(begin + i, c, draws.at_least(i, job.dropout.limit));
      } else {
        for (int i = 0; i < here; ++i) use(begin + i, c, draws.at_least(i, job.dropout.limit));
      }
    }
  }
}

template <typename T>
void attend_as(const Attention& job, std::int64_t task, float* work, T* out, float* stats) {
  const Room room(job);
  const Head head(job, task);
  float* keys = work;
  float* values = keys + room.keys * room.size;
  float* rows = values + room.keys * room.size;
  float* queries = rows + room.queries * room.size;
  float* powers = queries + room.queries * room.size;
  float* panel = powers + room.keys * width;
  const std::int64_t n = read_keys(static_cast<const T*>(job.k), static_cast<const T*>(job.v), job, head, room, keys,
                                   values);
  const std::int64_t n_room = whole(n, draw_keys);
  read_rows(static_cast<const T*>(job.q), job, head, room, job.scale * log2_e, rows);
  transpose_rows(rows, room.queries, room.size, queries, room.queries);
  float* most_out = stats + 2 * task * job.tokens;
  float* inverse_out = most_out + job.tokens;
  for (std::int64_t first = 0; first < job.tokens; first += width) {
    f32 most[vectors], sum[vectors] = {};
    for (int c = 0; c < vectors; ++c) most[c] = splat(n > 0 ? -__builtin_inff() : 0.0f);
    times_queries(keys, room.size, 1, queries + first, room.queries, job.size, n_room,
                  [&](std::int64_t key, int c, f32 score) {
                    store(powers + key * width + c * lanes, score);
                    if (key < n) most[c] = score > most[c] ? score : most[c];
                  });
    for_kept(job, task, first, n, [&](std::int64_t key, int c, i32 kept) {
      float* at = powers + key * width + c * lanes;
      const f32 power = power_of_2(load(at) - most[c]);
      sum[c] += power;
      store(at, kept ? power : f32{});
    });
    f32 inverse[vectors], factor[vectors];
    for (int c = 0; c < vectors; ++c) {
      inverse[c] = n > 0 ? 1.0f / sum[c] : f32{};
      factor[c] = inverse[c] * job.dropout.scale();
    }
    times_queries(values, 1, room.size, powers, width, n, room.size,
                  [&](std::int64_t k, int c, f32 v) { store(panel + k * width + c * lanes, v * factor[c]); });
    write_queries(panel, job, head, room, first, rows, out);
    const std::int64_t count = job.tokens - first < width ? job.tokens - first : width;
    copy(reinterpret_cast<const float*>(most), most_out + first, count);
    copy(reinterpret_cast<const float*>(inverse), inverse_out + first, count);
  }
}

template <typename T>
void attend_backward_as(const Attention& job, std::int64_t task, float* work, const float* stats, const T* d_out,
                        T* dq, T* dk, T* dv) {
  const Room room(job);
  const Head head(job, task);
  const std::int64_t keys_floats = room.keys * room.size, query_floats = room.queries * room.size;
  float* keys = work;
  float* values = keys + keys_floats;
  float* d_keys = values + keys_floats;
  float* d_values = d_keys + keys_floats;
  float* query_rows = d_values + keys_floats;
  float* queries = query_rows + query_floats;
  float* d_rows = queries + query_floats;
  float* d_outs = d_rows + query_floats;
  float* softmax = d_outs + query_floats;
  float* dropped = softmax + room.keys * width;       // the softmax after dropout
  float* d_scores = dropped + room.keys * width;
  float* panel = d_scores + room.keys * width;
  const std::int64_t n = read_keys(static_cast<const T*>(job.k), static_cast<const T*>(job.v), job, head, room, keys,
                                   values);
  const std::int64_t n_room = whole(n, draw_keys);
  read_rows(static_cast<const T*>(job.q), job, head, room, job.scale * log2_e, query_rows);
  read_rows(d_out, job, head, room, 1.0f, d_rows);
  transpose_rows(query_rows, room.queries, room.size, queries, room.queries);
  transpose_rows(d_rows, room.queries, room.size, d_outs, room.queries);
  fill_zeros(d_keys, n_room * room.size);
  fill_zeros(d_values, n_room * room.size);
  fill_zeros(softmax + n * width, (n_room - n) * width);
  fill_zeros(dropped + n * width, (n_room - n) * width);
  const float* all_most = stats + 2 * task * job.tokens;
  const float* all_inverses = all_most + job.tokens;
  const float scale = job.dropout.scale();
  for (std::int64_t first = 0; first < job.tokens; first += width) {
    const std::int64_t count = job.tokens - first < width ? job.tokens - first : width;
    f32 most[vectors] = {}, inverse[vectors] = {}, inner[vectors] = {};
    copy(all_most + first, reinterpret_cast<float*>(most), count);
    copy(all_inverses + first, reinterpret_cast<float*>(inverse), count);
    times_queries(keys, room.size, 1, queries + first, room.queries, job.size, n_room,
                  [&](std::int64_t key, int c, f32 score) {
                    if (key < n) {
                      store(softmax + key * width + c * lanes, power_of_2(score - most[c]) * inverse[c]);
                    }
                  });
    times_queries(values, room.size, 1, d_outs + first, room.queries, job.size, n_room,
                  [&](std::int64_t key, int c, f32 v) { store(d_scores + key * width + c * lanes, v); });
    for_kept(job, task, first, n, [&](std::int64_t key, int c, i32 kept) {
      const std::int64_t at = key * width + c * lanes;
      const f32 here = kept ? load(softmax + at) * scale : f32{};
      const f32 product = here * load(d_scores + at);
      inner[c] += product;
      store(dropped + at, here);
      store(d_scores + at, product);
    });
    for (std::int64_t key = 0; key < n_room; ++key) {
      for (int c = 0; c < vectors; ++c) {
        const std::int64_t at = key * width + c * lanes;
        store(d_scores + at, load(d_scores + at) - load(softmax + at) * inner[c]);
      }
    }
    add_over_queries(d_scores, query_rows + first * room.size, room.size, count, n_room, d_keys);
    add_over_queries(dropped, d_rows + first * room.size, room.size, count, n_room, d_values);
    times_queries(keys, 1, room.size, d_scores, width, n, room.size,
                  [&](std::int64_t k, int c, f32 v) { store(panel + k * width + c * lanes, v * job.scale); });
    write_queries(panel, job, head, room, first, query_rows + first * room.size, dq);
  }
  for (std::int64_t t = 0, key = 0; t < job.tokens; ++t) {
    const std::int64_t at = head.begin + t * head.stride;
    if (!head.keeps(t)) {
      __builtin_memset(dk + at, 0, static_cast<std::size_t>(job.size) * sizeof(T));
      __builtin_memset(dv + at, 0, static_cast<std::size_t>(job.size) * sizeof(T));
      continue;
    }
    float* row = d_keys + key * room.size;
    for (std::int64_t k = 0; k < room.size; k += lanes) store(row + k, load(row + k) * ln_2);
    write_values(row, job.size, dk + at);
    write_values(d_values + key * room.size, job.size, dv + at);
    ++key;
  }
}

void attend(const Attention& job, std::int64_t task, float* work, void* out, float* stats) {
  if (job.bf16) {
    attend_as(job, task, work, static_cast<Bf16*>(out), stats);
  } else {
    attend_as(job, task, work, static_cast<float*>(out), stats);
  }
}

void attend_backward(const Attention& job, std::int64_t task, float* work, const float* stats, const void* d_out,
                     void* dq, void* dk, void* dv) {
  if (job.bf16) {
    attend_backward_as(job, task, work, stats, static_cast<const Bf16*>(d_out), static_cast<Bf16*>(dq),
                       static_cast<Bf16*>(dk), static_cast<Bf16*>(dv));
  } else {
    attend_backward_as(job, task, work, stats, static_cast<const float*>(d_out), static_cast<float*>(dq),
                       static_cast<float*>(dk), static_cast<float*>(dv));
  }
}

}  // namespace

const AttentionKernel kernel = {floats, attend, attend_backward};
