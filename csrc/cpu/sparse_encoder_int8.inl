// Attention of an encoder whose linears are in int8: queries, keys, values and powers are rounded to 12 bits, with a
// scale for each head and sequence, and multiplied in pairs. The sums are exact in int32. Compiled by isa/int8.h.

#include "panel.inl"
#include "attend.inl"

typedef Vector<std::int16_t>::type i16;

namespace {

// Sizes of factors: the sum of 512 products stays below 2^31, and of more if the factors are smaller.
constexpr float most = 2047.0f;
inline float most_of_both(std::int64_t n) { return n <= 512 ? most : most * __builtin_sqrtf(512.0f / static_cast<float>(n)); }
inline float most_beside_powers(std::int64_t n) { return n <= 512 ? most : most * 512.0f / static_cast<float>(n); }

// sum + the two products of each word.
inline i32 dot_pairs(i32 sum, i32 a, i32 b) {
#if defined(SPARSEBERT_DOT_PAIRS)
  return reinterpret_cast<i32>(SPARSEBERT_DOT_PAIRS(reinterpret_cast<Register>(sum), reinterpret_cast<Register>(a),
                                                    reinterpret_cast<Register>(b)));
#elif defined(SPARSEBERT_MADD)
  return sum + reinterpret_cast<i32>(SPARSEBERT_MADD(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The nearest integers, below 2^15 in size, in the low halves of words; the upper halves are not cleared.
inline i32 rounded(f32 v) { return reinterpret_cast<i32>(v + 12582912.0f); }
inline i32 pair(i32 low, i32 high) { return (low & 0xffff) | (high << 16); }

// The largest size of [size][stride] values, n of each row; NaN if one is not finite.
inline float largest(const float* values, std::int64_t size, std::int64_t stride, std::int64_t n) {
  f32 found{}, bad{};
  for (std::int64_t i = 0; i < size; ++i) {
    const float* row = values + i * stride;
    std::int64_t t = 0;
    for (; t + lanes <= n; t += lanes) {
      const f32 v = load(row + t), a = v < f32{} ? -v : v;
      found = a > found ? a : found;
      bad += v * 0.0f;
    }
    for (; t < n; ++t) {
      const float a = row[t] < 0.0f ? -row[t] : row[t];
      found[0] = a > found[0] ? a : found[0];
      bad[0] += row[t] * 0.0f;
    }
  }
  float result = found[0], sum = bad[0];
  for (int i = 1; i < lanes; ++i) {
    result = found[i] > result ? found[i] : result;
    sum += bad[i];
  }
  return result + sum;
}

// A head's part of a sequence, rounded: `limit` times its share of the largest value. Returns the value of one unit.
// Neighbouring values of a token make a word: [pairs of values][stride].
inline float round_values(const float* values, std::int64_t size, std::int64_t stride, std::int64_t n, float limit,
                          int* words) {
  const float size_of = largest(values, size, stride, n), inverse = size_of > 0.0f ? limit / size_of : 0.0f;
  for (std::int64_t i = 0; i < size; i += 2, words += stride) {
    for (std::int64_t t = 0; t < n; t += lanes) {
      const f32 a = load(values + i * stride + t), b = i + 1 < size ? load(values + (i + 1) * stride + t) : f32{};
      store(words + t, pair(rounded(a * inverse), rounded(b * inverse)));
    }
  }
  return size_of / limit;
}

// The same with neighbouring tokens in a word: [values][pairs of tokens], `stride` shorts apart.
inline float round_tokens(const float* values, std::int64_t size, std::int64_t stride, std::int64_t n, float limit,
                          std::int16_t* shorts) {
  const float size_of = largest(values, size, stride, n), inverse = size_of > 0.0f ? limit / size_of : 0.0f;
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t t = 0; t < n; t += lanes) {
      typedef std::int16_t Shorts __attribute__((vector_size(lanes * 2), aligned(2)));
      *reinterpret_cast<Shorts*>(shorts + i * stride + t) =
          __builtin_convertvector(rounded(load(values + i * stride + t) * inverse), Shorts);
    }
    if (n % 2 != 0) shorts[i * stride + n] = 0;
  }
  return size_of / limit;
}

// unit: of the scores, times log2(e); v_unit: of the values.
struct Pairs {
  typedef i32 Sum;
  static constexpr int rows = registers == 32 ? 8 : 4;
  static constexpr int least = -2147483647 - 1;
  float unit, v_unit;

  static std::int64_t words(std::int64_t n) { return (n + 1) / 2; }

  template <int height, int count>
  static void multiply(const int* a, std::int64_t a_row, std::int64_t a_step, const int* b, std::int64_t b_step,
                       std::int64_t depth, i32 (&acc)[height][count]) {
    for (std::int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
      i32 right[count];
#pragma GCC unroll 2
      for (int n = 0; n < count; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < height; ++r) {
        const i32 left = splat(a[r * a_row]);
#pragma GCC unroll 2
        for (int n = 0; n < count; ++n) acc[r][n] = dot_pairs(acc[r][n], right[n], left);
      }
    }
  }

  template <int count>
  void weigh(int* scores, std::int64_t n, const i32 (&top)[count], f32 (&factor)[count]) const {
    i32 sum[count] = {};
    const auto power = [&](std::int64_t key, int c) {
      const i32 below = load(scores + (key * count + c) * lanes) - top[c];
      return rounded(exp2_roughly(__builtin_convertvector(below, f32) * unit) * most);
    };
    for (std::int64_t key = 0; key < n; key += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < count; ++c) {
        const i32 both = pair(power(key, c), key + 1 < n ? power(key + 1, c) : i32{});
        sum[c] += (both & 0xffff) + (both >> 16);
        store(scores + (key / 2 * count + c) * lanes, both);
      }
    }
    for (int c = 0; c < count; ++c) factor[c] = v_unit / __builtin_convertvector(sum[c], f32);
  }
};

std::int64_t attention_bytes(std::int64_t n, std::int64_t size) {
  const std::int64_t stride = row_floats(n);
  return (size * stride + 2 * ((size + 1) / 2) * stride + (size * stride + 1) / 2 + n * 2 * lanes) * 4;
}

void attend(const AttentionJob<float>& job, std::int64_t start, std::int64_t stop, std::int64_t head, void* memory) {
  const std::int64_t n = stop - start, size = job.hidden / job.heads, stride = row_floats(n);
  auto* values = static_cast<float*>(memory);  // of one part after the other, then the results
  int* q = reinterpret_cast<int*>(values + size * stride);
  int* k = q + (size + 1) / 2 * stride;
  auto* v = reinterpret_cast<std::int16_t*>(k + (size + 1) / 2 * stride);
  int* scores = reinterpret_cast<int*>(v + (size * stride + 1) / 2 * 2);
  read_head(job, start, stop, head, 0, 1.0f, values);
  const float q_unit = round_values(values, size, stride, n, most_of_both(size), q);
  read_head(job, start, stop, head, 1, 1.0f, values);
  const float k_unit = round_values(values, size, stride, n, most_of_both(size), k);
  read_head(job, start, stop, head, 2, 1.0f, values);
  const float bad = (q_unit + k_unit) * 0.0f;  // passes on a value that is not finite
  const float v_unit = round_tokens(values, size, stride, n, most_beside_powers(n), v) + bad;
  const float unit = q_unit * k_unit * 1.44269504f / __builtin_sqrtf(static_cast<float>(size));
  attend_all(Pairs{unit, v_unit}, q, k, reinterpret_cast<const int*>(v), stride, stride / 2, queries_of(job, n), n,
             size, scores, values);
  write_head(job, start, stop, head, values);
}

}  // namespace

const AttentionKernel<float> kernel = {attention_bytes, attend};
