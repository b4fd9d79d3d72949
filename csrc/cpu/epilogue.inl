// What becomes of a linear's sums in float32. Included after panel.inl, by its rules.

namespace {

// Four vectors of tokens as one vector of their bytes, in the order in which `spread` (int8.inl) takes quads of bytes
// apart: token t of a panel of n tokens is byte t / 4 % (n / 16) * 16 + t / (n / 4) * 4 + t % 4.
template <int... i>
inline Vector<std::uint8_t>::type in_order(Vector<std::uint8_t>::type bytes, Indices<i...>) {
  return __builtin_shuffle(bytes, Vector<std::uint8_t>::type{(i / 16 * 16 + i % 16 / 4 + i % 4 * 4)...});
}

// The bounds stand between product and sum, so that no compiler fuses the two: all instruction sets give the same bytes.
inline Vector<std::uint8_t>::type quantize(const f32 (&values)[4], float inverse, float offset) {
  const f32 low = splat(0.5f - offset), high = splat(255.5f - offset);
  i32 words{};
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    f32 v = values[n] * inverse;
    v = v > low ? v : low;
    v = v < high ? v : high;
    words |= __builtin_convertvector(v + offset, i32) << 8 * n;
  }
  return in_order(reinterpret_cast<Vector<std::uint8_t>::type>(words), Count<vector_bytes>::type());
}

// Finishes `count` vectors of sums of one row, scaled already, and writes them to column `row` of a panel of y, or adds
// them to it; `at` is their place in the column.
template <int count>
inline void finish_row(const LinearJob<float>& job, std::int64_t row, const f32 (&sums)[count], float* y) {
  const float bias = job.linear->bias != nullptr ? job.linear->bias[row] : 0.0f;
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) {
    f32& out = *reinterpret_cast<f32*>(y + n * lanes);
    const f32 value = activate(sums[n] + bias, job.linear->activation);
    out = job.add ? out + value : value;
  }
}

}  // namespace
