// Counter-based random numbers [Salmon et al. 2011, Philox4x32-7]: each is computed from its counter alone, so that a
// backward pass can generate the numbers of the forward pass again. Included after vector.inl, by its rules.

namespace {

typedef Vector<std::uint32_t>::type u32;
typedef Vector<std::uint64_t>::type u64;

// Eight numbers of 16 bits for each lane: number i is half i % 2 (0: the lower) of word i / 2.
struct Draws {
  u32 words[4];

  // All ones in the lanes where number i is at least `limit`.
  i32 at_least(int i, std::uint32_t limit) const {
    const u32 word = words[i / 2];
    const u32 number = i % 2 == 0 ? word & 0xffffu : word >> 16;
    return reinterpret_cast<i32>(number) >= static_cast<int>(limit);
  }
};

inline void multiply_wide(u32 a, std::uint32_t factor, u32& high, u32& low) {
  const u64 even = (reinterpret_cast<u64>(a) & 0xffffffffu) * factor;
  const u64 odd = (reinterpret_cast<u64>(a) >> 32) * factor;
  low = reinterpret_cast<u32>((even & 0xffffffffu) | (odd << 32));
  high = reinterpret_cast<u32>((even >> 32) | (odd & 0xffffffff00000000u));
}

// The numbers for the counter (first + lane, second, third, 0) with the key `seed`.
inline Draws draw(std::uint64_t seed, std::uint32_t first, std::uint32_t second, std::uint32_t third) {
  u32 c0 = splat(first), c1 = splat(second), c2 = splat(third), c3{};
  for (int i = 0; i < lanes; ++i) c0[i] += static_cast<std::uint32_t>(i);
  std::uint32_t low_key = static_cast<std::uint32_t>(seed), high_key = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    u32 high0, low0, high2, low2;
    multiply_wide(c0, 0xd2511f53u, high0, low0);
    multiply_wide(c2, 0xcd9e8d57u, high2, low2);
    c0 = high2 ^ c1 ^ low_key;
    c1 = low2;
    c2 = high0 ^ c3 ^ high_key;
    c3 = low0;
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
