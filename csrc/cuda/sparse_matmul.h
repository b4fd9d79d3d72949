// sparse_matmul for V:2:M on sparse tensor cores: y = activation(W x + bias) + residual in bf16, sums in float32.
// Tokens are the innermost index of x and y, as in the panels of the CPU engine, so that a kept column of W is a row of
// x that can be copied as it is.
//
// W [n_out, n_in] is cut into groups of v rows. In each block of m columns a group keeps 4 columns, and each row 2 of
// these. The kept columns of a group, in chunks of 32, are what one mma.sp.m16n8k32 multiplies: a tile of 16 rows by 32
// columns, of which 16 are stored per row, with 2 bits each that say which.
//
// A thread block computes a strip of rows of one group for a panel of 128 tokens. Each of its warps computes 32 tokens.
// The rows of x of a chunk are copied into shared memory while the chunks before it are multiplied; weights go from
// global memory straight into registers, in the order in which the lanes hold them.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.h"

namespace sparsebert::cuda {

constexpr int mma_tokens = 8;                          // of mma.sp.m16n8k32; its tile of W is tile_rows x tile_cols
constexpr int panel_tokens = 128;                      // of a thread block
constexpr int warp_tokens = 32;
constexpr int token_warps = panel_tokens / warp_tokens;
constexpr int piece = 8;                               // bf16 of 16 bytes, which are copied at once
constexpr int buffers = 4;                             // chunks of x in shared memory
constexpr int buffer_size = tile_cols * panel_tokens;  // in bf16
constexpr int strip_heights[] = {128, 64, 32};
static_assert(tile_rows == 16 && tile_cols == 32, "the tile of mma.sp.m16n8k32");

// W in V:2:M. All pointers are on the device.
struct VnmMatrix {
  const std::uint16_t* cols;      // [groups, chunks, tile_cols], below n_in; the last chunk is filled up with column 0
  const std::uint32_t* values;    // [strips, chunks, tiles of a strip, warp, 4], two bf16 each; zero where filled up
  const std::uint32_t* metadata;  // [strips, chunks, pairs of tiles, warp]
  std::int64_t v;                 // divides n_out
  std::int64_t strip_rows;        // one of strip_heights; the last strip of a group is filled up with zeros
  std::int64_t chunks;            // of each group
  std::int64_t n_out;
};

struct VnmMatmulJob {
  VnmMatrix weight;
  const Bf16* x;         // [n_in, tokens], rows x_stride apart; 16-byte aligned, x_stride a multiple of 8
  const float* bias;     // [n_out], or null
  const Bf16* residual;  // [n_out, tokens], rows residual_stride apart, or null
  Bf16* y;               // [n_out, tokens], rows y_stride apart; 4-byte aligned, y_stride even
  std::int64_t x_stride;
  std::int64_t residual_stride;
  std::int64_t y_stride;
  std::int64_t tokens;
  Activation activation;
};

// --- The strips of a matrix ---

// The largest height that divides v, else the smallest.
SPARSEBERT_BOTH std::int64_t strip_rows_of(std::int64_t v) { return v % 128 == 0 ? 128 : v % 64 == 0 ? 64 : 32; }
SPARSEBERT_BOTH std::int64_t chunks_of(std::int64_t n_in, std::int64_t m) {
  return round_up(n_in / m * 4, tile_cols) / tile_cols;
}
SPARSEBERT_BOTH std::int64_t strips_per_group(std::int64_t v, std::int64_t strip_rows) {
  return round_up(v, strip_rows) / strip_rows;
}
SPARSEBERT_BOTH std::int64_t strips_of(const VnmMatrix& w) {
  return w.n_out / w.v * strips_per_group(w.v, w.strip_rows);
}

struct Strip {
  std::int64_t group;
  std::int64_t row;    // the first one, of W
  std::int64_t count;  // rows that are not filled up
};

SPARSEBERT_BOTH Strip strip_of(const VnmMatrix& w, std::int64_t strip) {
  const std::int64_t per_group = strips_per_group(w.v, w.strip_rows);
  const std::int64_t within = strip % per_group * w.strip_rows;
  return {strip / per_group, strip / per_group * w.v + within, smaller(w.strip_rows, w.v - within)};
}

// --- How the lanes of a warp hold the matrices of mma.sp.m16n8k32 ([PTX ISA, matrix fragments for sparse
// mma.m16n8k32 with .f16 and .bf16 types]) ---

// W: register `reg` (0 to 3) of a lane holds the stored entries `entry` and `entry + 1` of a row of the tile.
SPARSEBERT_BOTH int weight_row(int lane, int reg) { return lane / 4 + reg % 2 * 8; }
SPARSEBERT_BOTH int weight_entry(int lane, int reg) { return lane % 4 * 2 + reg / 2 * 8; }

// Metadata: each 4 columns of a row have 4 bits, the lower index in the lower two. Two of four lanes hold those of a
// tile; which two is the `selector` of the instruction, so that one register per lane serves a pair of tiles.
SPARSEBERT_BOTH int metadata_lane(int row, int quad, int selector) { return row % 8 * 4 + selector * 2 + quad / 4; }
SPARSEBERT_BOTH int metadata_bit(int row, int quad) { return row / 8 * 16 + quad % 4 * 4; }

// x: by ldmatrix.trans, lane l gives the address of row l of the chunk, for 8 tokens.
// Sums: sum i (0 to 3) of a lane.
SPARSEBERT_BOTH int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
SPARSEBERT_BOTH int sum_token(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Where the weights of a tile and the metadata of a pair begin for a lane.
SPARSEBERT_BOTH std::int64_t values_place(const VnmMatrix& w, std::int64_t strip, std::int64_t chunk, std::int64_t tile,
                                          int lane) {
  return (((strip * w.chunks + chunk) * (w.strip_rows / tile_rows) + tile) * warp + lane) * 4;
}
SPARSEBERT_BOTH std::int64_t metadata_place(const VnmMatrix& w, std::int64_t strip, std::int64_t chunk,
                                            std::int64_t pair, int lane) {
  return ((strip * w.chunks + chunk) * (w.strip_rows / tile_rows / 2) + pair) * warp + lane;
}

// Where 8 tokens of a row of x are in a buffer. Rows are 256 bytes apart; without the exclusive or, the eight rows that
// ldmatrix reads at once would all be in the same banks of shared memory.
SPARSEBERT_BOTH int piece_place(int row, int at) { return row * panel_tokens + (at ^ row % 8) * piece; }

// --- The steps of a thread block ---

// Tiles of rows per warp, and warps one above the other. The other warps are side by side.
template <int tiles_, int row_warps_>
struct VnmShape {
  static constexpr int tiles = tiles_;
  static constexpr int row_warps = row_warps_;
  static constexpr int strip_rows = tiles * tile_rows * row_warps;
  static constexpr int threads = row_warps * token_warps * warp;
};

template <int tiles>
struct VnmWeights {
  std::uint32_t values[tiles][4];
  std::uint32_t metadata[tiles / 2];
};

// Registers of a thread.
template <int tiles>
struct VnmLane {
  float sums[tiles][warp_tokens / mma_tokens][4];
  VnmWeights<tiles> weights;  // of this chunk
  VnmWeights<tiles> next;     // of the next one, on their way
  std::uint32_t x[4];
  int address;                // for ldmatrix, in bf16 from the start of shared memory
};

SPARSEBERT_KERNEL void load_four(const std::uint32_t* from, std::uint32_t (&to)[4]) {
#if defined(__CUDA_ARCH__)
  const uint4 four = *reinterpret_cast<const uint4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
#else
  for (int i = 0; i < 4; ++i) to[i] = from[i];
#endif
}

SPARSEBERT_KERNEL void store_pair(Bf16* to, std::uint32_t pair) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<std::uint32_t*>(to) = pair;
#else
  memcpy(to, &pair, 4);
#endif
}

template <typename Shape>
SPARSEBERT_KERNEL void load_weights(const VnmMatrix& w, std::int64_t strip, std::int64_t chunk, int thread,
                                    VnmWeights<Shape::tiles>& to) {
  if (chunk >= w.chunks) return;
  const int lane = thread % warp, above = thread / (token_warps * warp) * Shape::tiles;
#pragma unroll
  for (int t = 0; t < Shape::tiles; ++t) {
    load_four(w.values + values_place(w, strip, chunk, above + t, lane), to.values[t]);
  }
#pragma unroll
  for (int p = 0; p < Shape::tiles / 2; ++p) {
    to.metadata[p] = w.metadata[metadata_place(w, strip, chunk, above / 2 + p, lane)];
  }
}

// Starts the copies of a chunk's rows of x into its buffer.
template <typename Shape, typename ThreadBlock>
SPARSEBERT_KERNEL void copy_chunk(ThreadBlock& block, const VnmMatmulJob& job, std::int64_t group, std::int64_t first,
                                  std::int64_t chunk, int thread) {
  if (chunk < job.weight.chunks) {
    constexpr int pieces = panel_tokens / piece;
#pragma unroll
    for (int i = thread; i < tile_cols * pieces; i += Shape::threads) {
      const int row = i / pieces, at = i % pieces;
      const std::int64_t col = job.weight.cols[(group * job.weight.chunks + chunk) * tile_cols + row];
      const std::int64_t token = first + at * piece;
      const bool inside = token < job.tokens;  // the last piece may end in the padding of the row
      block.copy(static_cast<int>(chunk % buffers) * buffer_size + piece_place(row, at),
                 job.x + col * job.x_stride + (inside ? token : 0), inside, thread);
    }
  }
  block.commit(thread);
}

SPARSEBERT_KERNEL float from_bf16(Bf16 bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Rounded to nearest, ties to even.
SPARSEBERT_KERNEL Bf16 to_bf16(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return static_cast<Bf16>(bits >> 16 | 0x40);  // stays a NaN
  return static_cast<Bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

SPARSEBERT_KERNEL float activated(float v, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * v * erfcf(v * -0.70710678f);
    case Activation::relu: return v < 0.0f ? 0.0f : v;
    case Activation::tanh: return tanhf(v);
    case Activation::none: break;
  }
  return v;
}

// Writes a thread's sums to y.
template <typename Shape>
SPARSEBERT_KERNEL void write_sums(const VnmMatmulJob& job, const Strip& strip, std::int64_t first, int thread,
                                  const VnmLane<Shape::tiles>& lane) {
  const int within = thread % warp, number = thread / warp;
#pragma unroll
  for (int t = 0; t < Shape::tiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (number / token_warps * Shape::tiles + t) * tile_rows + sum_row(within, half * 2);
      if (row >= strip.count) continue;
      const float bias = job.bias != nullptr ? job.bias[strip.row + row] : 0.0f;
#pragma unroll
      for (int n = 0; n < warp_tokens / mma_tokens; ++n) {
        const std::int64_t token = first + number % token_warps * warp_tokens + n * mma_tokens + sum_token(within, 0);
        if (token >= job.tokens) continue;
        const bool both = token + 1 < job.tokens;
        float v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          v[i] = activated(lane.sums[t][n][half * 2 + i] + bias, job.activation);
          if (job.residual != nullptr && (i == 0 || both)) {
            v[i] += from_bf16(job.residual[(strip.row + row) * job.residual_stride + token + i]);
          }
        }
        Bf16* to = job.y + (strip.row + row) * job.y_stride + token;
        if (both) {
          const std::uint32_t pair = to_bf16(v[0]) | static_cast<std::uint32_t>(to_bf16(v[1])) << 16;
          store_pair(to, pair);
        } else {
          *to = to_bf16(v[0]);
        }
      }
    }
  }
}

// Computes one strip for one panel. `block` has, besides each(step):
//   copy(to, from, inside, thread)  starts to copy 16 bytes into shared memory, of zeros if not inside
//   commit(thread)                  the copies so far, of this thread, are one set
//   wait()                          until all but the last buffers - 2 sets have arrived, of all threads
//   load_x()                        by all lanes of each warp: ldmatrix.x4.trans of `address` into `x`
//   multiply<t>(n)                  likewise: mma.sp of tile t and x into sums[t][n]
template <typename Shape, typename ThreadBlock>
SPARSEBERT_KERNEL void multiply_strip(ThreadBlock& block, const VnmMatmulJob& job, std::int64_t number) {
  using Lane = VnmLane<Shape::tiles>;
  const std::int64_t strips = strips_of(job.weight);
  // The strips of one panel run at about the same time, so that they find its x in the second-level cache.
  const Strip strip = strip_of(job.weight, number % strips);
  const std::int64_t first = number / strips * panel_tokens;

  block.each([&](int thread, Lane& lane) {
#pragma unroll
    for (int t = 0; t < Shape::tiles; ++t) {
#pragma unroll
      for (int n = 0; n < warp_tokens / mma_tokens; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) lane.sums[t][n][i] = 0.0f;
      }
    }
    for (int chunk = 0; chunk < buffers - 1; ++chunk) copy_chunk<Shape>(block, job, strip.group, first, chunk, thread);
    load_weights<Shape>(job.weight, number % strips, 0, thread, lane.next);
  });
  for (std::int64_t chunk = 0; chunk < job.weight.chunks; ++chunk) {
    block.wait();  // also for the warps that still read the buffer that is filled next
    block.each([&](int thread, Lane& lane) {
      copy_chunk<Shape>(block, job, strip.group, first, chunk + buffers - 1, thread);
      lane.weights = lane.next;
      load_weights<Shape>(job.weight, number % strips, chunk + 1, thread, lane.next);
    });
#pragma unroll
    for (int n = 0; n < warp_tokens / mma_tokens; ++n) {
      block.each([&](int thread, Lane& lane) {
        const int at = thread / warp % token_warps * (warp_tokens / piece) + n;
        lane.address = static_cast<int>(chunk % buffers) * buffer_size + piece_place(thread % warp, at);
      });
      block.load_x();
      block.multiply(n);
    }
  }
  block.each([&](int thread, const Lane& lane) { write_sums<Shape>(job, strip, first, thread, lane); });
}

// Runs a job on a stream, without waiting for it. Returns a cudaError_t, 0 for success.
int sparse_matmul_vnm(const VnmMatmulJob& job, void* stream);

}  // namespace sparsebert::cuda
