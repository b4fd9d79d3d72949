// The passes of topk_mask, in loops that the compiler vectorises for the ISA. Included by the rules of vector.inl.

namespace {

inline std::uint32_t key_of(float score) {
  const float positive = score + 0.0f;  // -0 becomes +0
  std::uint32_t bits;
  __builtin_memcpy(&bits, &positive, sizeof bits);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

bool count(const float* scores, std::int64_t n, std::int32_t* counts) {
  // Four tables in turn: scores of one digit tend to follow each other, and an increment waits for the one before.
  std::int32_t tables[4][digits];
  __builtin_memset(tables, 0, sizeof tables);
  int nan = 0;
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      nan |= scores[i + j] != scores[i + j];
      ++tables[j][key_of(scores[i + j]) >> (key_bits - digit_bits)];
    }
  }
  for (; i < n; ++i) {
    nan |= scores[i] != scores[i];
    ++tables[0][key_of(scores[i]) >> (key_bits - digit_bits)];
  }
  for (int d = 0; d < digits; ++d) counts[d] = tables[0][d] + tables[1][d] + tables[2][d] + tables[3][d];
  return nan == 0;
}

void collect(const float* scores, std::int64_t n, std::uint32_t digit, std::uint32_t* keys) {
  constexpr int stretch = 64;
  std::int64_t i = 0;
  for (; i + stretch <= n; i += stretch) {
    int any = 0;
    for (int j = 0; j < stretch; ++j) any |= key_of(scores[i + j]) >> (key_bits - digit_bits) == digit;
    if (any == 0) continue;
    for (int j = 0; j < stretch; ++j) {
      const std::uint32_t key = key_of(scores[i + j]);
      if (key >> (key_bits - digit_bits) == digit) *keys++ = key;
    }
  }
  for (; i < n; ++i) {
    const std::uint32_t key = key_of(scores[i]);
    if (key >> (key_bits - digit_bits) == digit) *keys++ = key;
  }
}

void mark(const float* scores, std::int64_t n, float threshold, std::int64_t ties, bool* keep) {
  constexpr std::int64_t stretch = 256;
  for (std::int64_t begin = 0; begin < n; begin += stretch) {
    const std::int64_t end = begin + stretch < n ? begin + stretch : n;
    int equal = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      keep[i] = scores[i] > threshold;
      equal |= scores[i] == threshold;
    }
    for (std::int64_t i = begin; equal != 0 && ties > 0 && i < end; ++i) {
      if (scores[i] == threshold) {
        keep[i] = true;
        --ties;
      }
    }
  }
}

// length: 0, or n as a constant that the compiler can unroll.
template <int length>
inline bool rank_rows(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep) {
  if constexpr (length > 0) n = length;
  int nan = 0;
  for (std::int64_t row = 0; row < rows; ++row, scores += n, keep += n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float score = scores[i];
      int before = 0;  // scores that come first
      for (std::int64_t j = 0; j < i; ++j) before += scores[j] >= score;
      for (std::int64_t j = i + 1; j < n; ++j) before += scores[j] > score;
      keep[i] = before < k;
      nan |= score != score;
    }
  }
  return nan == 0;
}

bool rank(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep) {
  if (n == 4) return rank_rows<4>(scores, rows, n, k, keep);
  if (n == 8) return rank_rows<8>(scores, rows, n, k, keep);
  return rank_rows<0>(scores, rows, n, k, keep);
}

}  // namespace

const TopkMaskKernel kernel = {count, collect, mark, rank};
