// The products with a weight of which little is kept: only the kept weights are multiplied. Tokens are innermost, as in
// sparse_matmul, but the kept weights of a row are collected again in each call. Included after masked_matmul.inl, by
// its rules, if words are floats.

namespace {

constexpr int token_vectors = 4;
constexpr int panel_tokens = token_vectors * lanes;
// Values of a token that are summed at a time, so that their part of a panel stays in a near cache: 64 KB with AVX-512,
// 32 KB with AVX2.
constexpr std::int64_t slab = chunk;

// The kept weights of some results, slab by slab; each slab is filled up with zeros to an even number.
struct Kept {
  float* values;          // [results, room]
  std::int32_t* offsets;  // [results, room], where a value's tokens begin in a panel
  std::int32_t* counts;   // [results, slabs]
  std::int64_t room, slabs;
};

inline std::int64_t slabs_of(const MatmulJob& job) { return (job.right.words + slab - 1) / slab; }
// One vector more, because whole vectors are written.
inline std::int64_t room_of(const MatmulJob& job) { return job.right.words + slabs_of(job) + lanes; }

std::int64_t sparse_floats(const MatmulJob& job, std::int64_t results) {
  const std::int64_t padded = (results + lanes - 1) / lanes * lanes;
  return padded * (2 * room_of(job) + slabs_of(job) + panel_tokens) + lanes;
}

// Appends the non-zero values of a vector, whose first value's tokens are at `offset`. Returns the new count.
inline std::int64_t append(const Kept& kept, std::int64_t result, std::int64_t count, f32 v, std::int32_t offset) {
  float* values = kept.values + result * kept.room + count;
  std::int32_t* offsets = kept.offsets + result * kept.room + count;
#if SPARSEBERT_COMPRESS
  const auto vector = reinterpret_cast<__m512>(v);
  const __mmask16 there = _mm512_cmp_ps_mask(vector, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  constexpr int p = panel_tokens;
  const i32 steps = {0, p, 2 * p, 3 * p, 4 * p, 5 * p, 6 * p, 7 * p,
                     8 * p, 9 * p, 10 * p, 11 * p, 12 * p, 13 * p, 14 * p, 15 * p};
  store(values, reinterpret_cast<f32>(_mm512_maskz_compress_ps(there, vector)));
  store(offsets, reinterpret_cast<i32>(
                     _mm512_maskz_compress_epi32(there, reinterpret_cast<__m512i>(steps + offset))));
  return count + __builtin_popcount(there);
#else
  std::int64_t found = 0;
  for (int i = 0; i < lanes; ++i) {
    values[found] = v[i];
    offsets[found] = offset + i * panel_tokens;
    found += v[i] != 0.0f;
  }
  return count + found;
#endif
}

// Ends a slab whose values began at `begun`. Returns the count including the padding.
inline std::int64_t end_slab(const Kept& kept, std::int64_t result, std::int64_t s, std::int64_t begun,
                             std::int64_t count) {
  if ((count - begun) % 2 != 0) {
    kept.values[result * kept.room + count] = 0.0f;
    kept.offsets[result * kept.room + count] = static_cast<std::int32_t>(s * slab * panel_tokens);
    ++count;
  }
  kept.counts[result * kept.slabs + s] = static_cast<std::int32_t>(count - begun);
  return count;
}

// Collects the kept weights of results whose weights lie along a row of the matrix.
inline void collect_along(const MatmulJob& job, std::int64_t first, std::int64_t last, const Kept& kept) {
  alignas(64) float row[slab];
  for (std::int64_t r = first; r < last; ++r) {
    std::int64_t count = 0;
    for (std::int64_t s = 0; s < kept.slabs; ++s) {
      const std::int64_t begun = count, k = s * slab;
      const std::int64_t here = job.right.words - k < slab ? job.right.words - k : slab;
      const std::int64_t room = (here + lanes - 1) / lanes * lanes;
      read_row(job.right.source, r, k, here, room, row);
      for (std::int64_t i = 0; i < room; i += lanes) {
        count = append(kept, r - first, count, load(row + i), static_cast<std::int32_t>((k + i) * panel_tokens));
      }
      count = end_slab(kept, r - first, s, begun, count);
    }
  }
}

// Collects the kept weights of results whose weights lie down a column: at most `chunk` results. `counts` and `begun`
// have one entry per result.
inline void collect_across(const MatmulJob& job, std::int64_t first, std::int64_t last, const Kept& kept) {
  alignas(64) float rows[lanes][chunk];
  std::int64_t counts[chunk] = {}, begun[chunk] = {};
  const std::int64_t results = last - first, room = (results + lanes - 1) / lanes * lanes;
  for (std::int64_t s = 0; s < kept.slabs; ++s) {
    const std::int64_t end = (s + 1) * slab < job.right.words ? (s + 1) * slab : job.right.words;
    for (std::int64_t k = s * slab; k < end; k += lanes) {
      for (int i = 0; i < lanes; ++i) read_row(job.right.source, k + i, first, results, room, rows[i]);
      for (std::int64_t c = 0; c < room; c += lanes) {
        f32 v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(rows[i] + c);
        transpose(v);
        const auto offset = static_cast<std::int32_t>(k * panel_tokens);
        for (int i = 0; i < lanes; ++i) counts[c + i] = append(kept, c + i, counts[c + i], v[i], offset);
      }
    }
    for (std::int64_t c = 0; c < results; ++c) begun[c] = counts[c] = end_slab(kept, c, s, begun[c], counts[c]);
  }
}

template <int results>
inline void add_kept(const float* x, const float* values, const std::int32_t* offsets, const std::int64_t (&from)[2],
                     std::int64_t count, f32 (&acc)[2][token_vectors]) {
  for (std::int64_t e = 0; e < count; ++e) {
#pragma GCC unroll 2
    for (int r = 0; r < results; ++r) {
      const float* in = x + offsets[from[r] + e];
      const float value = values[from[r] + e];
#pragma GCC unroll 4
      for (int n = 0; n < token_vectors; ++n) acc[r][n] += load(in + n * lanes) * value;
    }
  }
}

// Writes the sums of some results for a panel's tokens, token innermost, to the rows of these tokens.
inline void write_tokens(const MatmulJob& job, std::int64_t panel, std::int64_t first, std::int64_t last,
                         const float* sums) {
  for (std::int64_t t = 0; t < panel_tokens; t += lanes) {
    const std::int64_t token = panel * panel_tokens + t;
    for (std::int64_t c = first; c < last && token < job.rows; c += lanes) {
      f32 v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = load(sums + (c - first + i) * panel_tokens + t);
      transpose(v);
      const std::int64_t columns = last - c < lanes ? last - c : lanes;
      const std::int64_t tokens = job.rows - token < lanes ? job.rows - token : lanes;
      for (std::int64_t i = 0; i < tokens; ++i) write_row(job, token + i, c, columns, reinterpret_cast<float*>(&v[i]));
    }
  }
}

// Computes results `first` to `last`, at most `chunk` of them, of all tokens; job.left is in panels of panel_tokens.
void multiply_sparse(const MatmulJob& job, std::int64_t first, std::int64_t last, float* work) {
  const std::int64_t results = last - first, padded = (results + lanes - 1) / lanes * lanes;
  const std::int64_t room = room_of(job), slabs = slabs_of(job);
  float* sums = work;
  float* values = sums + padded * panel_tokens;
  auto* offsets = reinterpret_cast<std::int32_t*>(values + padded * room);
  const Kept kept{values, offsets, offsets + padded * room, room, slabs};
  job.right.across ? collect_across(job, first, last, kept) : collect_along(job, first, last, kept);
  // Collecting would wait for memory, so the next results' weights are prefetched during the products of these.
  MatmulPanels one = job.right;
  one.width = 1;
  Ahead ahead(one, last, results, 0, job.right.words);
  const std::int64_t pieces = (job.rows + panel_tokens - 1) / panel_tokens * slabs * ((results + 1) / 2);
  const std::int64_t lines = (ahead.lines() + pieces - 1) / pieces;
  std::int64_t place[chunk];
  for (std::int64_t panel = 0; panel * panel_tokens < job.rows; ++panel) {
    const float* x = job.left + panel * job.right.words * panel_tokens;
    for (std::int64_t r = 0; r < results; ++r) place[r] = r * room;
    for (std::int64_t s = 0; s < slabs; ++s) {
      // Two results at once: enough sums to keep two multiply-adds per cycle busy.
      for (std::int64_t r = 0; r < results; r += 2) {
        const int second = r + 1 < results ? 1 : 0;
        const std::int64_t counts[2] = {kept.counts[r * slabs + s], second ? kept.counts[(r + 1) * slabs + s] : 0};
        const std::int64_t both = counts[0] < counts[1] ? counts[0] : counts[1];
        std::int64_t from[2] = {place[r], place[r + second]};
        float* to[2] = {sums + r * panel_tokens, sums + (r + second) * panel_tokens};
        f32 acc[2][token_vectors];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < token_vectors; ++n) acc[i][n] = s > 0 ? load(to[i] + n * lanes) : f32{};
        }
        ahead.fetch(lines);
        add_kept<2>(x, values, offsets, from, both, acc);
        const std::int64_t after[2] = {from[0] + both, from[1] + both};
        if (counts[0] > both) {
          add_kept<1>(x, values, offsets, after, counts[0] - both, acc);
        } else if (counts[1] > both) {
          const std::int64_t other[2] = {after[1], after[0]};
          f32 swapped[2][token_vectors];
#pragma GCC unroll 4
          for (int n = 0; n < token_vectors; ++n) swapped[0][n] = acc[1][n];
          add_kept<1>(x, values, offsets, other, counts[1] - both, swapped);
#pragma GCC unroll 4
          for (int n = 0; n < token_vectors; ++n) acc[1][n] = swapped[0][n];
        }
        place[r] += counts[0];
        place[r + second] += counts[1];
        for (int i = second; i >= 0; --i) {
#pragma GCC unroll 4
          for (int n = 0; n < token_vectors; ++n) store(to[i] + n * lanes, acc[i][n]);
        }
      }
    }
    write_tokens(job, panel, first, last, sums);
  }
}

}  // namespace
