// Attention of a block of queries, for every arithmetic that the encoder's float32 panels are multiplied in. Included
// after panel.inl, by its rules. An Arithmetic has
//   rows, Sum     keys, or values of a head, that are multiplied at a time; a vector of sums of products
//   least         a sum below all others
//   words(n)      the number of words that hold n factors of a sum
//   multiply      as multiply_tile
//   weigh         scores -> weights of the n keys, as words; `top` is the largest score. Writes to `factor` what to
//                 multiply the weighted sums of the values by

namespace {

// The results of `count` vectors of queries, which begin at q and at `out`; they may overwrite the queries. q, k: words
// [words(size)][stride], of the values of all tokens; v: words [size][v_stride], of all tokens. All sums run over the
// head's values, or over the keys, in order, so that a query's result does not depend on where its sequence lies.
template <int count, typename Arithmetic, typename Word>
inline void attend_queries(const Arithmetic& arithmetic, const Word* q, const Word* k, const Word* v,
                           std::int64_t stride, std::int64_t v_stride, std::int64_t n, std::int64_t size, Word* scores,
                           float* out) {
  typedef typename Arithmetic::Sum Sum;
  constexpr int rows = Arithmetic::rows;
  constexpr std::int64_t width = count * lanes;
  Sum top[count];
  for (int c = 0; c < count; ++c) top[c] = splat(Arithmetic::least);
  const auto keep = [&](std::int64_t key, const Sum(&acc)[count]) {
#pragma GCC unroll 2
    for (int c = 0; c < count; ++c) {
      top[c] = acc[c] > top[c] ? acc[c] : top[c];
      store(scores + key * width + c * lanes, acc[c]);
    }
  };
  std::int64_t key = 0;
  for (; key + rows <= n; key += rows) {
    Sum acc[rows][count] = {};
    Arithmetic::template multiply<rows, count>(k + key, 1, stride, q, stride, Arithmetic::words(size), acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) keep(key + r, acc[r]);
  }
  for (; key < n; ++key) {
    Sum acc[1][count] = {};
    Arithmetic::template multiply<1, count>(k + key, 1, stride, q, stride, Arithmetic::words(size), acc);
    keep(key, acc[0]);
  }

  f32 factor[count];
  arithmetic.template weigh<count>(scores, n, top, factor);
  const auto finish = [&](std::int64_t i, const Sum(&acc)[count]) {
#pragma GCC unroll 2
    for (int c = 0; c < count; ++c) {
      store(out + i * stride + c * lanes, __builtin_convertvector(acc[c], f32) * factor[c]);
    }
  };
  std::int64_t i = 0;
  for (; i + rows <= size; i += rows) {
    Sum acc[rows][count] = {};
    Arithmetic::template multiply<rows, count>(v + i * v_stride, v_stride, 1, scores, width, Arithmetic::words(n), acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) finish(i + r, acc[r]);
  }
  for (; i < size; ++i) {
    Sum acc[1][count] = {};
    Arithmetic::template multiply<1, count>(v + i * v_stride, v_stride, 1, scores, width, Arithmetic::words(n), acc);
    finish(i, acc[0]);
  }
}

// The first `queries` of n tokens attend to all n, two vectors of them at a time.
template <typename Arithmetic, typename Word>
inline void attend_all(const Arithmetic& arithmetic, const Word* q, const Word* k, const Word* v, std::int64_t stride,
                       std::int64_t v_stride, std::int64_t queries, std::int64_t n, std::int64_t size, Word* scores,
                       float* out) {
  std::int64_t t = 0;
  for (; t + lanes < queries; t += 2 * lanes) {
    attend_queries<2>(arithmetic, q + t, k, v, stride, v_stride, n, size, scores, out + t);
  }
  if (t < queries) attend_queries<1>(arithmetic, q + t, k, v, stride, v_stride, n, size, scores, out + t);
}

}  // namespace
