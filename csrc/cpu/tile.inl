// bf16 in tiles. Included after panel.inl, by its rules, with lanes = 16. SPARSEBERT_TILES (tile_block.inl) is 1 for the
// dot products of AVX-512 BF16.
//
// A vector of 32 bf16 is 16 words of two. If tokens are innermost, word i holds tokens 2i and 2i + 1. The even tokens
// make one float vector and the odd tokens another, so that nothing has to be shuffled.

#include "tile_block.inl"

typedef Vector<std::uint16_t>::type u16;
typedef Vector<std::uint32_t>::type u32;

namespace {

constexpr std::int64_t panel_width = 32;

inline f32 even(u16 v) { return reinterpret_cast<f32>(reinterpret_cast<u32>(v) << 16); }
inline f32 odd(u16 v) { return reinterpret_cast<f32>(reinterpret_cast<u32>(v) & 0xffff0000u); }

// Rounds to the nearest bf16, ties to even; a NaN stays a NaN.
inline u16 round_pairs(f32 evens, f32 odds) {
#if SPARSEBERT_TILES >= 1
  // The instruction puts all evens first, then all odds.
  const auto halves = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odds), reinterpret_cast<__m512>(evens)));
  const u16 order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<u16>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), halves));
#else
  const auto rounded = [](f32 v) {
    const u32 bits = reinterpret_cast<u32>(v);
    const u32 near = bits + 0x7fffu + ((bits >> 16) & 1u);
    return v == v ? near : (bits | 0x400000u);
  };
  return reinterpret_cast<u16>((rounded(evens) >> 16) | (rounded(odds) & 0xffff0000u));
#endif
}

// pack_tokens for a panel of bf16.
template <typename Row>
inline void pack_tokens(std::int64_t begin, std::int64_t end, std::int64_t filled, Bf16* panel, Row row) {
  for (std::int64_t k = begin; k < end; k += lanes) {
    const std::int64_t here = end - k < lanes ? end - k : lanes;
    f32 v[2][lanes];
    for (std::int64_t t = 0; t < panel_width; ++t) {
      f32& values = v[t % 2][t / 2];
      values = f32{};
      if (t >= filled) continue;
      if (here == lanes) {
        values = row(t, k, ReadVector());
      } else {
        for (std::int64_t i = 0; i < here; ++i) values[i] = row(t, k + i, ReadFloat());
      }
    }
    transpose(v[0]);
    transpose(v[1]);
    for (std::int64_t i = 0; i < here; ++i) store(panel + (k + i) * panel_width, round_pairs(v[0][i], v[1][i]));
  }
}

// Two rows a and b of 32 tokens -> one row of each right-hand tile: words (a, b) of the even tokens, and of the odd
// ones.
inline u32 pair_even(u16 a, u16 b) {
  return (reinterpret_cast<u32>(a) & 0xffffu) | (reinterpret_cast<u32>(b) << 16);
}
inline u32 pair_odd(u16 a, u16 b) {
  return (reinterpret_cast<u32>(a) >> 16) | (reinterpret_cast<u32>(b) & 0xffff0000u);
}

#if SPARSEBERT_TILES == 0
inline float of_bf16(std::uint32_t bits) {
  union {
    std::uint32_t word;
    float value;
  } both = {bits << 16};
  return both.value;
}
#endif

// Products of bf16, and their sums in float32.
template <>
struct TileDot<Bf16> {
  typedef float Sum;

#if SPARSEBERT_TILES == 2
  static void add_first() { TILE_PRODUCTS("tdpbf16ps", 4, 0, 1); }
  static void add_second() { TILE_PRODUCTS("tdpbf16ps", 5, 2, 3); }
#elif SPARSEBERT_TILES == 1
  static void add(float (&to)[16][16], const TilePair& left, int a, const TilePair& right, int b) {
    f32 sums[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) sums[m] = load(to[m]);
    for (int k = 0; k < 16; ++k) {
      const auto row = reinterpret_cast<__m512bh>(load(reinterpret_cast<const std::uint32_t*>(right.row(b, k))));
#pragma GCC unroll 16
      for (int m = 0; m < 16; ++m) {
        const auto pair = reinterpret_cast<__m512bh>(splat(reinterpret_cast<const std::uint32_t*>(left.row(a, m))[k]));
        sums[m] = reinterpret_cast<f32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[m]), row, pair));
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) store(to[m], sums[m]);
  }
#else
  static void add(float (&to)[16][16], const TilePair& left, int a, const TilePair& right, int b) {
    for (int m = 0; m < 16; ++m) {
      f32 evens{}, odds{};
      for (int k = 0; k < 16; ++k) {
        const u32 row = load(reinterpret_cast<const std::uint32_t*>(right.row(b, k)));
        const std::uint32_t pair = reinterpret_cast<const std::uint32_t*>(left.row(a, m))[k];
        evens += reinterpret_cast<f32>(row << 16) * of_bf16(pair & 0xffffu);
        odds += reinterpret_cast<f32>(row & 0xffff0000u) * of_bf16(pair >> 16);
      }
      store(to[m], load(to[m]) + (evens + odds));
    }
  }
#endif
};

}  // namespace
