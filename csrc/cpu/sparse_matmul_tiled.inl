// sparse_matmul on bf16 tiles. Compiled by isa/tiles.h. A panel is 32 tokens wide on any processor.

#include "panel.inl"
#include "tile.inl"

namespace {

// Words of a gathered chunk of a column list: a tile of the even tokens and one of the odd tokens.
constexpr std::int64_t chunk_words = 2 * 16 * 16;
constexpr std::int64_t task_panels = 4;

void pack(const TransposeJob<Bf16>& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t n = job.n;
  const std::int64_t end = (part + 1) * job.part < n ? (part + 1) * job.part : n;
  const float* x = job.rows + panel * panel_width * n;
  pack_tokens(part * job.part, end, job.shape.tokens - panel * panel_width, job.panels + panel * n * panel_width,
              [&](std::int64_t t, std::int64_t k, auto read) { return read(x + t * n + k); });
}

void unpack(const TransposeJob<Bf16>& job, std::int64_t panel, std::int64_t part) {
  const std::int64_t n = job.n;
  const std::int64_t end = (part + 1) * job.part < n ? (part + 1) * job.part : n;
  const Bf16* in = job.panels + panel * n * panel_width;
  float* y = job.rows + panel * panel_width * n;
  const std::int64_t filled = job.shape.tokens - panel * panel_width;
  for (std::int64_t k = part * job.part; k < end; k += lanes) {
    const std::int64_t here = end - k < lanes ? end - k : lanes;
    f32 v[2][lanes] = {};
    for (std::int64_t i = 0; i < here; ++i) {
      v[0][i] = even(load(in + (k + i) * panel_width));
      v[1][i] = odd(load(in + (k + i) * panel_width));
    }
    transpose(v[0]);
    transpose(v[1]);
    for (std::int64_t t = 0; t < panel_width && t < filled; ++t) {
      if (here == lanes) {
        store(y + t * n + k, v[t % 2][t / 2]);
      } else {
        for (std::int64_t i = 0; i < here; ++i) y[t * n + k + i] = v[t % 2][t / 2][i];
      }
    }
  }
}

// Gathers the listed rows of a panel into right-hand tiles.
inline void gather(const Bf16* x, const std::uint16_t* cols, std::int64_t chunks, std::uint32_t* words) {
  for (std::int64_t i = 0; i < chunks * 16; ++i) {
    const u16 a = load(x + std::int64_t{cols[2 * i]} * panel_width);
    const u16 b = load(x + std::int64_t{cols[2 * i + 1]} * panel_width);
    std::uint32_t* to = words + i / 16 * chunk_words + i % 16 * 16;
    store(to, pair_even(a, b));
    store(to + chunk_words / 2, pair_odd(a, b));
  }
}

// Expands a group's tiles from masks and values to whole tiles.
inline void expand(const std::uint32_t* masks, const Bf16* values, std::int64_t rows, Bf16* tiles) {
  for (std::int64_t r = 0; r < rows; ++r, tiles += tile_cols) {
#if SPARSEBERT_TILES >= 1
    store(tiles, reinterpret_cast<u16>(_mm512_maskz_expandloadu_epi16(masks[r], values)));
    values += __builtin_popcount(masks[r]);
#else
    for (int c = 0; c < tile_cols; ++c) tiles[c] = masks[r] >> c & 1u ? *values++ : Bf16{0};
#endif
  }
}

// Finishes the sums of a tile's rows, for the even and the odd tokens of a panel, and writes them to y.
template <Activation activation, bool add>
inline void finish_rows(const std::int32_t* rows, const float* bias, const float* evens, const float* odds, Bf16* y) {
#pragma GCC unroll 4
  for (int r = 0; r < tile_rows; ++r) {
    if (rows[r] < 0) continue;
    const float own = bias != nullptr ? bias[rows[r]] : 0.0f;
    f32 a = load(evens + r * 16) + own, b = load(odds + r * 16) + own;
    if constexpr (activation == Activation::gelu) {
      a = gelu_roughly(a);
      b = gelu_roughly(b);
    } else {
      a = activate(a, activation);
      b = activate(b, activation);
    }
    Bf16* out = y + std::int64_t{rows[r]} * panel_width;
    if constexpr (add) {
      const u16 before = load(out);
      a += even(before);
      b += odd(before);
    }
    store(out, round_pairs(a, b));
  }
}

template <int group_tiles>
inline void multiply_group(const Bf16* left, const std::uint32_t* right, std::int64_t chunks, float* sums) {
  TileBlock<Bf16, group_tiles> block;
  block.zero();
  for (std::int64_t c = 0; c < chunks; ++c, left += group_tiles * tile_rows * tile_cols, right += chunk_words) {
    block.step({left, tile_rows * tile_cols * 2, 64}, {right, chunk_words / 2 * 4, 64});
  }
  block.store_to(sums, 512, 256, 16);
}

// Bytes for the sums of a group, one group's tiles, and the gathered lists of a task's panels.
std::int64_t work_bytes(const LinearJob<Bf16>& job) {
  const std::int64_t chunks = job.linear->tiled->most_chunks;
  return 4 * 1024 + chunks * (2 * tile_rows * tile_cols * 2 + task_panels * chunk_words * 4);
}

template <Activation activation, bool add>
void multiply_as(const LinearJob<Bf16>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void* work) {
  const TiledMatrix& w = *job.linear->tiled;
  auto* sums = static_cast<float*>(work);
  auto* expanded = reinterpret_cast<Bf16*>(sums + 1024);
  const std::int64_t end = (part + 1) * job.unit < w.groups ? (part + 1) * job.unit : w.groups;
  const std::int64_t x_floats = job.linear->n_in * panel_width, y_floats = job.linear->n_out * panel_width;
  auto* gathered = reinterpret_cast<std::uint32_t*>(expanded + w.most_chunks * 2 * tile_rows * tile_cols);
  [[maybe_unused]] const Tiles tiles;
  std::int64_t list = -1, gathered_chunks = 0;
  for (std::int64_t g = part * job.unit; g < end; ++g) {
    const std::int64_t chunks = w.chunks[g], rows = w.tiles[g] * tile_rows;
    if (w.col_begin[g] != list || chunks > gathered_chunks) {  // an empty list may begin where another list does
      list = w.col_begin[g];
      gathered_chunks = chunks;
      for (std::int64_t p = 0; p < panels; ++p) {
        gather(job.x + (panel + p) * x_floats, w.cols + list, chunks, gathered + p * w.most_chunks * chunk_words);
      }
    }
    const Bf16* left = w.values + w.value_begin[g];
    if (w.mask_begin[g] >= 0) {
      expand(w.masks + w.mask_begin[g], left, chunks * rows, expanded);
      left = expanded;
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::uint32_t* right = gathered + p * w.most_chunks * chunk_words;
      Bf16* y = job.y + (panel + p) * y_floats;
      const std::int32_t* ids = w.rows + g * 2 * tile_rows;
      if (w.tiles[g] == 2) {
        multiply_group<2>(left, right, chunks, sums);
        finish_rows<activation, add>(ids + tile_rows, job.linear->bias, sums + 512, sums + 768, y);
      } else {
        multiply_group<1>(left, right, chunks, sums);
      }
      finish_rows<activation, add>(ids, job.linear->bias, sums, sums + 256, y);
    }
  }
}

void multiply(const LinearJob<Bf16>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void* work) {
  switch (job.linear->activation) {
    case Activation::none:
      if (job.add) return multiply_as<Activation::none, true>(job, panel, panels, part, work);
      return multiply_as<Activation::none, false>(job, panel, panels, part, work);
    case Activation::gelu: return multiply_as<Activation::gelu, false>(job, panel, panels, part, work);
    case Activation::relu: return multiply_as<Activation::relu, false>(job, panel, panels, part, work);
    case Activation::tanh: return multiply_as<Activation::tanh, false>(job, panel, panels, part, work);
  }
}

// Repeats four independent products of tiles that stay in the first-level cache.
float saturate(std::int64_t steps) {
  alignas(64) std::uint32_t words[16][16];
  alignas(64) float sums[4][16][16];
  for (auto& row : words) store(row, splat(std::uint32_t{0x3f803f80u}));
  [[maybe_unused]] const Tiles tiles;
  TileBlock<Bf16, 2> block;
  block.zero();
  for (std::int64_t step = 0; step < steps; ++step) block.step({words, 0, 64}, {words, 0, 64});
  block.store_to(sums[0][0], 512, 256, 16);
  return (sums[0][0][0] + sums[1][0][0]) + (sums[2][0][0] + sums[3][0][0]);  // all, or the compiler would drop some
}

}  // namespace

const SparseMatmulKernel<Bf16> kernel = {panel_width, 1,      1,       {task_panels, multiply, work_bytes},
                                         pack,        unpack, nullptr, saturate, 4 * 2 * 16 * 16 * 32};
