// bf16 in memory, floats in registers, for every vector width. Included after panel.inl, by its rules.

namespace {

typedef Vector<std::uint32_t>::type bits;
typedef std::uint16_t short_bits __attribute__((vector_size(vector_bytes / 2)));
typedef std::uint16_t short_bits_unaligned __attribute__((vector_size(vector_bytes / 2), aligned(2)));

inline f32 widen(short_bits v) { return reinterpret_cast<f32>(__builtin_convertvector(v, bits) << 16); }

// Rounds to the nearest bf16, ties to even; a NaN stays a NaN. The results are in the upper halves of the words.
inline bits rounded(f32 v) {
  const bits word = reinterpret_cast<bits>(v);
  const bits near = word + 0x7fffu + ((word >> 16) & 1u);
  return (v == v ? near : (word | 0x400000u)) & 0xffff0000u;
}

inline float rounded(float value) {
  union {
    float number;
    std::uint32_t word;
  } v = {value};
  v.word = value == value ? v.word + 0x7fffu + ((v.word >> 16) & 1u) : v.word | 0x400000u;
  v.word &= 0xffff0000u;
  return v.number;
}

inline float widen(Bf16 value) {
  union {
    std::uint32_t word;
    float number;
  } v = {static_cast<std::uint32_t>(value) << 16};
  return v.number;
}

inline Bf16 narrow(float value) {
  union {
    float number;
    std::uint32_t word;
  } v = {rounded(value)};
  return static_cast<Bf16>(v.word >> 16);
}

// Loads and stores a vector of values that are float or bf16 in memory.
inline f32 load_value(const float* p) { return load(p); }
inline f32 load_value(const Bf16* p) { return widen(*reinterpret_cast<const short_bits_unaligned*>(p)); }
inline void store_value(float* p, f32 v) { store(p, v); }
inline void store_value(Bf16* p, f32 v) {
  *reinterpret_cast<short_bits_unaligned*>(p) = __builtin_convertvector(rounded(v) >> 16, short_bits);
}

// Converts n values to floats, and back.
inline void read_values(const Bf16* from, std::int64_t n, float* to) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(to + i, load_value(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}
inline void read_values(const float* from, std::int64_t n, float* to) { copy(from, to, n); }

inline void write_values(const float* from, std::int64_t n, Bf16* to) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_value(to + i, load(from + i));
  for (; i < n; ++i) to[i] = narrow(from[i]);
}
inline void write_values(const float* from, std::int64_t n, float* to) { copy(from, to, n); }

}  // namespace
