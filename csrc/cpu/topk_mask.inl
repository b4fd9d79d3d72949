// The passes of topk_mask, written once for every vector width. Compiled by isa/floats.h.

namespace {

typedef Vector<float>::type f32;
typedef Vector<int>::type i32;
typedef signed char bytes __attribute__((vector_size(lanes)));
typedef signed char bytes_unaligned __attribute__((vector_size(lanes), aligned(1)));

// A true lane of a comparison is -1.
inline void store_bools(bool* p, i32 mask) {
  *reinterpret_cast<bytes_unaligned*>(p) = __builtin_convertvector(mask, bytes) & 1;
}

inline std::int64_t total(i32 counts) {
  std::int64_t sum = 0;
  for (int i = 0; i < lanes; ++i) sum += counts[i];
  return sum;
}

inline bool any(i32 mask) {
  typedef Vector<long long>::type i64;
  const i64 wide = reinterpret_cast<i64>(mask);
  long long bits = 0;
#pragma GCC unroll 8
  for (int i = 0; i < Vector<long long>::size; ++i) bits |= wide[i];
  return bits != 0;
}

std::int64_t count(const float* scores, std::int64_t n, float threshold) {
  constexpr int chains = 4;
  i32 below[chains] = {};  // at most n / lanes per lane, and n is below 2^31 (a chunk or a row)
  std::int64_t i = 0;
  for (; i + chains * lanes <= n; i += chains * lanes) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) below[c] += load(scores + i + c * lanes) >= threshold;
  }
  std::int64_t found = -total((below[0] + below[1]) + (below[2] + below[3]));
  for (; i < n; ++i) found += scores[i] >= threshold;
  return found;
}

std::int64_t collect(const float* scores, std::int64_t n, float low, float high, float* out, std::int64_t* above) {
  constexpr int vectors = 2;
  i32 over{}, nan{};
  std::int64_t found = 0;
  std::int64_t i = 0;
  for (; i + vectors * lanes <= n; i += vectors * lanes) {
    i32 inside{};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const f32 score = load(scores + i + v * lanes);
      over += score > high;
      nan |= score != score;
      inside |= (score >= low) & (score <= high);
    }
    if (!any(inside)) continue;
    for (int j = 0; j < vectors * lanes; ++j) {
      out[found] = scores[i + j];
      found += (scores[i + j] >= low) & (scores[i + j] <= high);
    }
  }
  *above = -total(over);
  bool finite = !any(nan);
  for (; i < n; ++i) {
    *above += scores[i] > high;
    finite &= scores[i] == scores[i];
    out[found] = scores[i];
    found += (scores[i] >= low) & (scores[i] <= high);
  }
  return finite ? found : -1;
}

void mark(const float* scores, std::int64_t n, float threshold, std::int64_t ties, bool* keep) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const f32 score = load(scores + i);
    store_bools(keep + i, score > threshold);
    if (ties == 0 || !any(score == threshold)) continue;
    for (int j = 0; j < lanes && ties > 0; ++j) {
      if (scores[i + j] == threshold) {
        keep[i + j] = true;
        --ties;
      }
    }
  }
  for (; i < n; ++i) {
    const bool tie = scores[i] == threshold && ties > 0;
    keep[i] = scores[i] > threshold || tie;
    ties -= tie;
  }
}

// Adds 1 to `before` in the lanes whose score comes after the score `r` places further in their group of n
// (cyclically); then does the same for r + 1 to n - 1 places.
template <int n, int r, int... i>
inline void rank_rotated(f32 score, i32& before, Indices<i...> all) {
  if constexpr (r < n) {
    const f32 other = __builtin_shuffle(score, i32{(i / n * n + (i + r) % n)...});
    // Of equal scores the one of lower index comes first: the other one if it wrapped around.
    const i32 lower = i32{(i % n + r >= n ? -1 : 0)...};
    before -= (other > score) | ((other == score) & lower);
    rank_rotated<n, r + 1>(score, before, all);
  }
}

// Ranks vectors of whole groups of n scores each, the last vector perhaps in part.
template <int n>
bool rank_groups(const float* scores, std::int64_t size, std::int64_t k, bool* keep) {
  typedef typename Count<lanes>::type all;
  const int wanted = static_cast<int>(k);
  i32 nan{};
  for (std::int64_t at = 0; at < size; at += lanes) {
    const std::int64_t here = size - at < lanes ? size - at : lanes;
    f32 score{};
    if (here == lanes) {
      score = load(scores + at);
    } else {
      for (std::int64_t i = 0; i < here; ++i) score[i] = scores[at + i];
    }
    i32 before{};
    rank_rotated<n, 1>(score, before, all());
    const i32 kept = before < wanted;
    nan |= score != score;
    if (here == lanes) {
      store_bools(keep + at, kept);
    } else {
      for (std::int64_t i = 0; i < here; ++i) keep[at + i] = kept[i] != 0;
    }
  }
  return !any(nan);
}

// Ranks rows of any length: every score of a row is compared with every vector of it.
bool rank_rows(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep) {
  const int wanted = static_cast<int>(k);
  alignas(64) float row[ranked_length] = {};
  alignas(64) bool kept[ranked_length];
  i32 lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  i32 nan{};
  for (std::int64_t r = 0; r < rows; ++r, scores += n, keep += n) {
    __builtin_memcpy(row, scores, static_cast<std::size_t>(n) * sizeof(float));
    for (std::int64_t first = 0; first < n; first += lanes) {
      const f32 score = load(row + first);
      const std::int64_t end = first + lanes < n ? first + lanes : n;
      i32 before{};
      for (std::int64_t j = 0; j < first; ++j) before -= row[j] >= score;
      for (std::int64_t j = first; j < end; ++j) {
        const i32 later = lane > static_cast<int>(j - first);
        before -= (row[j] > score) | ((row[j] == score) & later);
      }
      for (std::int64_t j = end; j < n; ++j) before -= row[j] > score;
      nan |= score != score;
      store_bools(kept + first, before < wanted);
    }
    __builtin_memcpy(keep, kept, static_cast<std::size_t>(n));
  }
  return !any(nan);
}

bool rank(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep) {
  if (n == 4) return rank_groups<4>(scores, rows * n, k, keep);
  if constexpr (lanes >= 8) {
    if (n == 8) return rank_groups<8>(scores, rows * n, k, keep);
  }
  if constexpr (lanes >= 16) {
    if (n == 16) return rank_groups<16>(scores, rows * n, k, keep);
  }
  return rank_rows(scores, rows, n, k, keep);
}

}  // namespace

const TopkMaskKernel kernel = {count, collect, mark, rank};
