// Panels have the token innermost, so that all arithmetic of an encoder is plain vector arithmetic, one token per lane.
// Written once for every vector width; included after vector.inl, by its rules.

typedef Vector<float>::type f32;
typedef Vector<int>::type i32;

namespace {

// Perfect shuffle: zip(a, b) = a0 b0 a1 b1 ...; its lower half with first = 0, its upper half with first = lanes / 2.
template <int first, int... i>
inline f32 zip(f32 a, f32 b, Indices<i...>) {
  return __builtin_shuffle(a, b, i32{(first + i / 2 + (i % 2) * lanes)...});
}

// Transposes lanes x lanes floats in registers. A perfect shuffle of the rows i and i + lanes/2 rotates the bits of
// (row, lane) by one place, so log2(lanes) of them swap row and lane.
inline void transpose(f32 (&v)[lanes]) {
  typedef typename Count<lanes>::type all;
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
    f32 w[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      w[2 * i] = zip<0>(v[i], v[i + lanes / 2], all());
      w[2 * i + 1] = zip<lanes / 2>(v[i], v[i + lanes / 2], all());
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}

// How a token's row is read: `lanes` neighbouring values, or one value.
struct ReadVector {
  f32 operator()(const float* from) const { return load(from); }
};
struct ReadFloat {
  float operator()(const float* from) const { return *from; }
};

// Packs values `begin` to `end` of tokens, each token in a row, into a panel of this width. `filled` of its tokens
// exist; the others become zero. row(t, k, read) returns what `read` gives for value k of token t and the values after
// it.
template <typename Row>
inline void pack_tokens(std::int64_t begin, std::int64_t end, std::int64_t width, std::int64_t filled, float* panel,
                        Row row) {
  const std::int64_t vectors = begin + (end - begin) / lanes * lanes;
  for (std::int64_t t = 0; t < width; t += lanes) {
    for (std::int64_t k = begin; k < vectors; k += lanes) {
      f32 v[lanes];
      if (t + lanes <= filled) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = row(t + i, k, ReadVector());
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = t + i < filled ? row(t + i, k, ReadVector()) : f32{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(panel + (k + i) * width + t, v[i]);
    }
  }
  for (std::int64_t k = vectors; k < end; ++k) {
    for (std::int64_t t = 0; t < width; ++t) panel[k * width + t] = t < filled ? row(t, k, ReadFloat()) : 0.0f;
  }
}

// 2^e for e in [-126, 126]; the coefficients are those of a polynomial for 2^e on [-1/2, 1/2], highest power first.
template <int n>
inline f32 exp2_by(const float (&coefficients)[n], f32 e) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where it becomes the exponent.
  const f32 magic = splat(12582912.0f);
  const f32 shifted = magic + e;
  const f32 fraction = e - (shifted - magic);
  f32 power = splat(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < n; ++i) power = power * fraction + coefficients[i];
  return reinterpret_cast<f32>(reinterpret_cast<i32>(power) + (reinterpret_cast<i32>(shifted) << 23));
}

// 2^e with a relative error of 2e-7.
inline f32 exp2(f32 e) {
  constexpr float coefficients[] = {0.0013400432653725147f, 0.009676037356257439f, 0.05550327152013779f,
                                    0.2402210682630539f,    0.6931471824645996f,   1.0f};
  return exp2_by(coefficients, e);
}

// e^v for v <= 0, with a relative error of 1e-6; constant for v below -87. A NaN stays a NaN.
inline f32 exp_negative(f32 v) {
  const f32 power = exp2((v < splat(-87.0f) ? splat(-87.0f) : v) * 1.44269504f);
  return v == v ? power : v;
}

// tanh with an error of 2e-7. A NaN stays a NaN.
inline f32 tanh(f32 v) {
  const f32 zero{};
  const f32 power = exp_negative((v < zero ? v : -v) * 2.0f);
  const f32 size = (1.0f - power) / (1.0f + power);
  return v < zero ? -size : size;
}

// gelu(v) = v Phi(v) = max(v, 0) - a Phi(-a), a = |v|: no cancellation, so small results keep their relative accuracy.
// Phi(-a) = 2^-q(a), with q a polynomial fitted to minimise the error of a Phi(-a) on [0, 12.5]. Larger a are set to
// 12.5, where a Phi(-a) is below 2e-30. Error of a Phi(-a): 8e-8 absolute, and 0.3 % relative up to a = 5.
inline f32 gelu(f32 v) {
  const f32 zero{};
  f32 a = v < zero ? -v : v;
  a = a < splat(12.5f) ? a : splat(12.5f);
  f32 q = splat(-3.3092837838921696e-05f);
  q = q * a + 0.0007692198851145804f;
  q = q * a - 0.00808071717619896f;
  q = q * a + 0.05341210588812828f;
  q = q * a + 0.4587709605693817f;
  q = q * a + 1.1512017250061035f;
  q = q * a + 0.999993085861206f;
  return (v < zero ? zero : v) - a * exp2(-q);  // in this order a NaN stays a NaN
}

inline f32 activate(f32 v, Activation activation) {
  switch (activation) {
    case Activation::none: return v;
    case Activation::gelu: return gelu(v);
    case Activation::relu: return v < f32{} ? f32{} : v;
    case Activation::tanh: return tanh(v);
  }
  return v;
}

// The next functions are only as exact as is useful if the result is rounded to bf16 (a relative error of 2^-9) or to
// bytes.

// 2^e for e <= 126, with a relative error of 1e-4; constant for e below -126. A NaN may get lost: the values that the
// power is multiplied with are then NaN too.
inline f32 exp2_roughly(f32 e) {
  constexpr float coefficients[] = {0.05517166852951050f, 0.2426111251115799f, 0.6932609677314758f,
                                    0.9999280571937561f};
  return exp2_by(coefficients, e < splat(-126.0f) ? splat(-126.0f) : e);
}

// v (1/2 + c P(c^2)), with c = v clamped to [-4, 4], at whose ends the bracket is 0 and 1. Error at most 2e-4.
inline f32 gelu_roughly(f32 v) {
  f32 c = v < splat(-4.0f) ? splat(-4.0f) : v;
  c = c > splat(4.0f) ? splat(4.0f) : c;
  const f32 square = c * c;
  f32 p = splat(2.2588203307805088e-08f);
  p = p * square - 1.227415623361594e-06f;
  p = p * square + 2.8125232347520068e-05f;
  p = p * square - 0.00036218372406437993f;
  p = p * square + 0.002968751359730959f;
  p = p * square - 0.017054392024874687f;
  return v * (c * (p * (square - 16.0f) + 0.125f) + 0.5f);
}

// The sum over k < n of term(k), as four independent sums.
template <typename Term>
inline f32 sum_of(std::int64_t n, Term term) {
  f32 sum[4] = {};
  std::int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += term(k + i);
  }
  for (; k < n; ++k) sum[0] += term(k);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// For pack_tokens: the word vector plus the position vector of the tokens from `first` on.
template <typename Job>
inline auto embedding(const Job& job, std::int64_t first) {
  return [&job, first](std::int64_t t, std::int64_t k, auto read) {
    const Encoder& encoder = *job.encoder;
    const std::int64_t token = first + t, n = encoder.embedding;
    const std::int64_t position = job.types[token] * encoder.max_length + job.positions[token];
    return read(encoder.words + job.ids[token] * n + k) + read(encoder.positions + position * n + k);
  };
}

// Copies exactly n elements.
template <typename T>
inline void copy(const T* from, T* to, std::int64_t n) {
  constexpr int step = Vector<T>::size;
  for (; n >= step; n -= step, from += step, to += step) store(to, load(from));
  for (; n > 0; --n) *to++ = *from++;
}

// Calls piece(token, panel, lane, count) for each part of the tokens start to stop that lies in one panel; `token`
// counts from start.
template <typename Piece>
inline void for_pieces(std::int64_t start, std::int64_t stop, std::int64_t width, Piece piece) {
  for (std::int64_t t = start; t < stop;) {
    const std::int64_t lane = t % width;
    const std::int64_t count = width - lane < stop - t ? width - lane : stop - t;
    piece(t - start, t / width, lane, count);
    t += count;
  }
}

// Floats per row of a sequence's queries, keys or values: whole vectors may be written past its end.
inline std::int64_t row_floats(std::int64_t n) { return (n + lanes - 1) / lanes * lanes + lanes; }

// Part 0, 1 or 2, the queries, keys or values, of one head of the sequence of tokens `start` to `stop`: [head size]
// [row_floats(n)] floats, times `scale`.
template <typename Job>
inline void read_head(const Job& job, std::int64_t start, std::int64_t stop, std::int64_t head, int part, float scale,
                      float* to) {
  const std::int64_t width = job.shape.width(), size = job.hidden / job.heads, stride = row_floats(stop - start);
  for_pieces(start, stop, width, [&](std::int64_t token, std::int64_t panel, std::int64_t lane, std::int64_t count) {
    const float* from = job.qkv + ((3 * panel + part) * job.hidden + head * size) * width + lane;
    float* at = to + token;
    for (std::int64_t i = 0; i < size; ++i, from += width, at += stride) {
      for (std::int64_t t = 0; t < count; t += lanes) store(at + t, load(from + t) * scale);
    }
  });
}

// How many tokens of a sequence of n attend.
template <typename Job>
inline std::int64_t queries_of(const Job& job, std::int64_t n) {
  return job.queries < n ? job.queries : n;
}

// Writes the head's result for the tokens that attend, likewise [head size][row_floats(n)].
template <typename Job>
inline void write_head(const Job& job, std::int64_t start, std::int64_t stop, std::int64_t head, const float* from) {
  const std::int64_t width = job.shape.width(), size = job.hidden / job.heads, stride = row_floats(stop - start);
  const std::int64_t end = start + queries_of(job, stop - start);
  for_pieces(start, end, width, [&](std::int64_t token, std::int64_t panel, std::int64_t lane, std::int64_t count) {
    float* to = job.out + (panel * job.hidden + head * size) * width + lane;
    for (std::int64_t i = 0; i < size; ++i) copy(from + i * stride + token, to + i * width, count);
  });
}

}  // namespace
