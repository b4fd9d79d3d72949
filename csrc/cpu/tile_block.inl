// Blocks of tiles: 16 rows of words, multiplied as matrices. A word of the left tile, and one of the right, hold two
// bf16 or four bytes each, whose products are added up. A row has 16 words on the left, and `lanes` on the right and in
// the sums. SPARSEBERT_TILES chooses the instructions: 2, the tile registers of AMX; less, vectors, which in plain C++
// are slow and serve as reference.

namespace {

#if SPARSEBERT_TILES == 2

struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All libraries of a thread share its tile configuration, so the destructor restores the configuration that it found.
class Tiles {
 public:
  Tiles() {
    const TileConfig whole;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  ~Tiles() {
    if (before_.palette != 0) {
      asm volatile("ldtilecfg %0" ::"m"(before_));
    } else {
      asm volatile("tilerelease");
    }
  }

 private:
  TileConfig before_;
};

#define TILE_LOAD(t, pair, tile) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((pair).row(tile, 0)), "r"((pair).stride) : "memory")
#define TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
// Adds the products of left tile `l` and both right tiles to their sums.
#define TILE_PRODUCTS(instruction, l, sums, other) \
  asm volatile(instruction " %%tmm6, %%tmm" #l ", %%tmm" #sums "\n\t" instruction " %%tmm7, %%tmm" #l ", %%tmm" #other ::)

#else

// Nothing to set up without tile registers.
struct Tiles {};

#endif

// Two neighbouring tiles in memory: the first, and the bytes from one to the other, and from row to row.
struct TilePair {
  const void* first;
  std::int64_t next, stride;

  const char* row(int tile, int r) const { return static_cast<const char*>(first) + tile * next + r * stride; }
};

// The arithmetic of an element: Sum, the type of its sums, and
//   add_first(), add_second()     with tile registers: adds the products of left tile 0 or 1 in a block
//   add(to, left, a, right, b)    else: adds those of two tiles
template <typename Element>
struct TileDot;

// The sums of products of `rows` left tiles by two right tiles. While one is in use, `Tiles` must exist, and no other
// block may be used.
template <typename Element, int rows>
struct TileBlock {
  static_assert(rows == 1 || rows == 2, "the tile registers hold two rows of two tiles of sums beside the operands");
  typedef TileDot<Element> Dot;
  typedef typename Dot::Sum Sum;

  // store_to writes the tile of sums in row r, column c to `to` + r * below + c * beside, its rows `stride` sums apart.
#if SPARSEBERT_TILES == 2
  static_assert(lanes == 16, "a row of a tile register has 16 words");

  void zero() {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" ::);
    if constexpr (rows == 2) asm volatile("tilezero %%tmm2\n\ttilezero %%tmm3" ::);
  }
  void step(const TilePair& left, const TilePair& right) {
    TILE_LOAD(4, left, 0);
    TILE_LOAD(6, right, 0);
    TILE_LOAD(7, right, 1);
    Dot::add_first();
    if constexpr (rows == 2) {
      TILE_LOAD(5, left, 1);
      Dot::add_second();
    }
  }
  void store_to(Sum* to, std::int64_t below, std::int64_t beside, std::int64_t stride) const {
    TILE_STORE(0, to, 4 * stride);
    TILE_STORE(1, to + beside, 4 * stride);
    if constexpr (rows == 2) {
      TILE_STORE(2, to + below, 4 * stride);
      TILE_STORE(3, to + below + beside, 4 * stride);
    }
  }
#else
  void zero() { __builtin_memset(sums, 0, sizeof sums); }
  void step(const TilePair& left, const TilePair& right) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 2; ++c) Dot::add(sums[r][c], left, r, right, c);
    }
  }
  void store_to(Sum* to, std::int64_t below, std::int64_t beside, std::int64_t stride) const {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 2; ++c) {
        for (int m = 0; m < 16; ++m) {
          __builtin_memcpy(to + r * below + c * beside + m * stride, sums[r][c][m], vector_bytes);
        }
      }
    }
  }
  alignas(vector_bytes) Sum sums[rows][2][16][lanes];
#endif
};

}  // namespace
