// sparse_encoder between its linears, on bf16 tiles. Compiled by isa/tiles.h.

#include "panel.inl"
#include "tile.inl"

namespace {

void embed(const EmbedJob<Bf16>& job, std::int64_t panel) {
  const std::int64_t n = job.encoder->embedding;
  pack_tokens(0, n, job.shape.tokens - panel * panel_width, job.out + panel * n * panel_width,
              embedding(job, panel * panel_width));
}

void normalize(const NormJob<Bf16>& job, std::int64_t panel, std::int64_t) {
  Bf16* x = job.x + panel * job.n * panel_width;
  const float share = 1.0f / static_cast<float>(job.n);
  const auto value = [&](std::int64_t k, int half) {
    const u16 both = load(x + k * panel_width);
    return half == 0 ? even(both) : odd(both);
  };
  f32 mean[2], scale[2];
  for (int half = 0; half < 2; ++half) {
    mean[half] = sum_of(job.n, [&](std::int64_t k) { return value(k, half); }) * share;
    const f32 variance = sum_of(job.n, [&](std::int64_t k) {
      const f32 d = value(k, half) - mean[half];
      return d * d;
    }) * share;
    for (int i = 0; i < lanes; ++i) scale[half][i] = 1.0f / __builtin_sqrtf(variance[i] + job.eps);
  }
  for (std::int64_t k = 0; k < job.n; ++k) {
    const float weight = job.norm.weight[k], bias = job.norm.bias[k];
    store(x + k * panel_width, round_pairs((value(k, 0) - mean[0]) * scale[0] * weight + bias,
                                           (value(k, 1) - mean[1]) * scale[1] * weight + bias));
  }
}

// The layout of one head of a sequence in working memory, in whole blocks of 32 tokens and 32 values. Where sums run
// over the padding, it is zero.
struct HeadLayout {
  std::int64_t blocks;   // blocks of tokens
  std::int64_t chunks;   // chunks of the head's values that queries and keys are multiplied over
  std::int64_t v_tiles;  // tiles of 16 of the head's values, for the product with V
  std::int64_t rows() const { return chunks * 32; }
  std::int64_t stride() const { return blocks * 32; }
};

HeadLayout head_layout(std::int64_t n, std::int64_t head_size) {
  return {(n + 31) / 32, (head_size + 31) / 32, (head_size + 15) / 16};
}

constexpr std::int64_t tile_words = 256;

// Bytes for: the rows of queries, keys and values, with slack for whole vectors; the tiles made of queries and of keys;
// the scores and weights of two tiles of queries; and two tiles of sums.
std::int64_t attention_bytes(std::int64_t n, std::int64_t head_size) {
  const HeadLayout head = head_layout(n, head_size);
  return (3 * head.rows() * head.stride() + 32) * 2 + 2 * head.blocks * head.chunks * 2 * tile_words * 4 +
         head.stride() * 2 * 16 * 4 + head.blocks * 2 * tile_words * 4 + 4 * tile_words * 4;
}

// 32 rows of values of 32 tokens -> two tiles, of the even and of the odd tokens, whose words hold two consecutive
// values.
inline void pair_rows(const Bf16* rows, std::int64_t stride, f32 (&evens)[16], f32 (&odds)[16]) {
  for (int i = 0; i < 16; ++i) {
    const u16 a = load(rows + 2 * i * stride), b = load(rows + (2 * i + 1) * stride);
    evens[i] = reinterpret_cast<f32>(pair_even(a, b));
    odds[i] = reinterpret_cast<f32>(pair_odd(a, b));
  }
}

// scores [blocks][key even, odd][16][query even, odd][16] of n keys -> weights as tiles [query even, odd][blocks],
// whose words hold two keys. The weights are not normalised: `sum` becomes 1 / their sum.
inline void softmax(const float* scores, std::int64_t n, float share, float* weights, std::int64_t blocks,
                    f32 (&sum)[2]) {
  f32 most[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  f32 total[2][2] = {};
  const auto at = [&](std::int64_t block, int key, int i, int query) {
    return load(scores + block * 4 * tile_words + key * 2 * tile_words + i * 32 + query * 16);
  };
  const auto keys = [&](std::int64_t block) { return n - block * 32 < 32 ? static_cast<int>(n - block * 32) : 32; };
  for (std::int64_t block = 0; block < blocks; ++block) {
    const int here = keys(block);
    for (int i = 0; 2 * i < here; ++i) {
      for (int query = 0; query < 2; ++query) {
        const f32 a = at(block, 0, i, query), b = 2 * i + 1 < here ? at(block, 1, i, query) : a;
        const f32 larger = a > b ? a : b;
        most[query] = larger > most[query] ? larger : most[query];
      }
    }
  }
  for (int query = 0; query < 2; ++query) most[query] *= share;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const int here = keys(block);
    for (int i = 0; i < 16; ++i) {
      for (int query = 0; query < 2; ++query) {
        f32 a{}, b{};
        if (2 * i < here) a = exp2_roughly(at(block, 0, i, query) * share - most[query]);
        if (2 * i + 1 < here) b = exp2_roughly(at(block, 1, i, query) * share - most[query]);
        total[query][0] += a;
        total[query][1] += b;
        store(weights + (query * blocks + block) * tile_words + i * 16, reinterpret_cast<f32>(round_pairs(a, b)));
      }
    }
  }
  for (int query = 0; query < 2; ++query) sum[query] = 1.0f / (total[query][0] + total[query][1]);
}

// Tokens are taken in blocks of 32: their even tokens make one tile, their odd tokens another. Queries are columns,
// keys are rows. The words of the weights then hold a key and the next one, as the product with the values needs them.
void attend(const AttentionJob<Bf16>& job, std::int64_t start, std::int64_t stop, std::int64_t head_index,
            void* memory) {
  const std::int64_t n = stop - start, size = job.hidden / job.heads;
  const HeadLayout head = head_layout(n, size);
  const std::int64_t stride = head.stride();
  auto* rows = static_cast<Bf16*>(memory);  // [3][head.rows()][stride]
  auto* q_tiles = reinterpret_cast<float*>(rows + 3 * head.rows() * stride + 32);  // [blocks][even, odd][chunks] tiles
  float* k_tiles = q_tiles + head.blocks * head.chunks * 2 * tile_words;           // likewise
  // [blocks][key even, odd][16][query even, odd][16]
  float* scores = k_tiles + head.blocks * head.chunks * 2 * tile_words;
  float* weights = scores + stride * 2 * 16;  // [query even, odd][blocks] tiles
  float* sums = weights + head.blocks * 2 * tile_words;

  for (int part = 0; part < 3; ++part) {
    Bf16* to = rows + part * head.rows() * stride;
    for_pieces(start, stop, panel_width, [&](std::int64_t token, std::int64_t panel, std::int64_t lane,
                                             std::int64_t count) {
      const Bf16* from = job.qkv + ((3 * panel + part) * job.hidden + head_index * size) * panel_width + lane;
      if (count == panel_width) {
        for (std::int64_t i = 0; i < size; ++i) store(to + i * stride + token, load(from + i * panel_width));
      } else {
        for (std::int64_t i = 0; i < size; ++i) copy(from + i * panel_width, to + i * stride + token, count);
      }
    });
    for (std::int64_t i = 0; i < head.rows(); ++i) {
      for (std::int64_t t = i < size ? n : 0; t < stride; ++t) to[i * stride + t] = 0;
    }
  }
  for (std::int64_t block = 0; block < head.blocks; ++block) {
    for (std::int64_t chunk = 0; chunk < head.chunks; ++chunk) {
      f32 evens[16], odds[16];
      const std::int64_t at = (2 * block * head.chunks + chunk) * tile_words, other = at + head.chunks * tile_words;
      pair_rows(rows + chunk * 32 * stride + block * 32, stride, evens, odds);
      for (int i = 0; i < 16; ++i) {
        store(q_tiles + at + i * 16, evens[i]);
        store(q_tiles + other + i * 16, odds[i]);
      }
      pair_rows(rows + (head.rows() + chunk * 32) * stride + block * 32, stride, evens, odds);
      transpose(evens);
      transpose(odds);
      for (int i = 0; i < 16; ++i) {
        store(k_tiles + at + i * 16, evens[i]);
        store(k_tiles + other + i * 16, odds[i]);
      }
    }
  }

  const float share = 1.44269504f / __builtin_sqrtf(static_cast<float>(size));  // includes log2(e): powers are of two
  const Bf16* values = rows + 2 * head.rows() * stride;
  Bf16* result = rows;  // overwrites the queries' rows, whose tiles are made already
  [[maybe_unused]] const Tiles tiles;
  const std::int64_t wanted = queries_of(job, n);
  for (std::int64_t queries = 0; queries * 32 < wanted; ++queries) {
    for (std::int64_t keys = 0; keys < head.blocks; ++keys) {
      const float* right = q_tiles + 2 * queries * head.chunks * tile_words;
      const float* left = k_tiles + 2 * keys * head.chunks * tile_words;
      float* to = scores + keys * 4 * tile_words;
      TileBlock<Bf16, 2> block;
      block.zero();
      for (std::int64_t chunk = 0; chunk < head.chunks; ++chunk) {
        const std::int64_t other = head.chunks * tile_words * 4;
        block.step({left + chunk * tile_words, other, 64}, {right + chunk * tile_words, other, 64});
      }
      block.store_to(to, 2 * tile_words, 16, 32);
    }
    f32 sum[2];
    softmax(scores, n, share, weights, head.blocks, sum);
    for (std::int64_t tile = 0; tile < head.v_tiles; ++tile) {
      TileBlock<Bf16, 1> block;
      block.zero();
      for (std::int64_t keys = 0; keys < head.blocks; ++keys) {
        block.step({values + tile * 16 * stride + keys * 32, 0, stride * 2},
                   {weights + keys * tile_words, head.blocks * tile_words * 4, 64});
      }
      block.store_to(sums, 0, tile_words, 16);
      for (int i = 0; i < 16; ++i) {
        store(result + (tile * 16 + i) * stride + queries * 32,
              round_pairs(load(sums + i * 16) * sum[0], load(sums + tile_words + i * 16) * sum[1]));
      }
    }
  }
  for_pieces(start, start + wanted, panel_width, [&](std::int64_t token, std::int64_t panel, std::int64_t lane,
                                                     std::int64_t count) {
    Bf16* to = job.out + (panel * job.hidden + head_index * size) * panel_width + lane;
    for (std::int64_t i = 0; i < size; ++i) copy(result + i * stride + token, to + i * panel_width, count);
  });
}

}  // namespace

const SparseEncoderKernel<Bf16> kernel = {embed, normalize, {attention_bytes, attend}};
