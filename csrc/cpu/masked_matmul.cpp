// Cuts the three products of a masked layer into blocks of their results; the arithmetic is in masked_matmul.inl.
#include "masked_matmul.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../masked_matmul.inl"
#include "isa/floats.h"
#define SPARSEBERT_KERNEL "../masked_matmul.inl"
#include "isa/tiles.h"

namespace sparsebert {
namespace {

// Max words that are summed in registers at a time: in a task's panels of columns they take 96 KB of a second-level
// cache.
constexpr std::int64_t most_depth = 256;
constexpr std::int64_t task_columns = 96;
// Size of the block of G that a task computes.
constexpr std::int64_t gradient_rows = 96;
constexpr std::int64_t gradient_columns = 192;
// Min values that a packing task reads.
constexpr std::int64_t packed_values = 1 << 15;
// Number of rows whose kept weights are counted to estimate the share.
constexpr std::int64_t sampled_rows = 32;
// From this number of tokens on, it may be faster to multiply only the kept weights.
constexpr std::int64_t sparse_tokens = 128;
// Columns of the result per task of the sparse product, computed one after the other while a part of a panel is in the
// first-level cache; at most 256.
constexpr std::int64_t sparse_columns = 256;
// With fewer products, waking a second core, some 5 us, costs more than it saves.
constexpr std::int64_t serial_products = 1 << 18;

const MaskedMatmulKernel& kernel_for(Isa isa, bool bf16) {
  const bool tiles = bf16 && (isa == Isa::scalar || isa >= Isa::avx512_bf16);
  return tiles ? tile_kernel_for(isa) : kernel_for(isa);
}

// A product's operand; `across` and `grouped` as in MatmulPanels.
MatmulPanels panels_of(const MaskedMatmulKernel& kernel, const MatmulSource& source, bool across, std::int64_t width,
                       bool grouped = false) {
  const std::int64_t values = across ? source.rows : source.cols;
  const std::int64_t run = std::int64_t{kernel.values_a_word} * kernel.word_run;
  return {source, across, width, grouped, ceil_div(values, run) * kernel.word_run, nullptr};
}

std::int64_t count(const MatmulPanels& job) {
  return ceil_div(job.across ? job.source.cols : job.source.rows, job.width);
}

std::int64_t floats(const MatmulPanels& job) { return ceil_div(count(job) * job.words * job.width, 16) * 16; }

void pack(const MaskedMatmulKernel& kernel, const MatmulPanels& job, int threads) {
  const std::int64_t panels = count(job), stride = job.words * job.width;
  // If words run down the columns, a task takes some words of all panels, so that it reads the source's rows one after
  // the other.
  const std::int64_t unit = job.across ? job.source.cols * kernel.values_a_word : stride * kernel.values_a_word;
  const std::int64_t least = job.across ? 16 : 1;  // whole cache lines of a panel
  const std::int64_t step = ceil_div(packed_values / std::max<std::int64_t>(unit, 1) + 1, least) * least;
  const std::int64_t all = job.across ? job.words : panels;
  parallel(ceil_div(all, step), threads, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = std::min(begin + step, all);
    if (job.across) {
      kernel.pack(job, 0, panels, begin, end, job.panels + begin * job.width, stride);
    } else {
      kernel.pack(job, begin, end, 0, job.words, job.panels + begin * stride, stride);
    }
  });
}

std::int64_t work_floats(const MaskedMatmulKernel& kernel, const MatmulJob& job, const MatmulBlock& block) {
  const std::int64_t own = job.right.panels == nullptr ? block.panels * job.depth * kernel.tile_columns : 0;
  const bool once = job.depth >= job.right.words;
  return own + (once ? 0 : block.tiles * block.panels * kernel.tile_rows * kernel.tile_columns);
}

// Multiplies in blocks of `tiles` tiles of rows and `panels` panels of columns, in parallel.
void multiply(const MaskedMatmulKernel& kernel, MatmulJob job, std::int64_t tiles, std::int64_t panels, int threads) {
  const std::int64_t words = std::max<std::int64_t>(job.right.words, 1);
  job.depth = ceil_div(ceil_div(words, ceil_div(words, most_depth)), kernel.word_run) * kernel.word_run;
  const std::int64_t all_tiles = ceil_div(job.rows, kernel.tile_rows), all_panels = count(job.right);
  const std::int64_t across = ceil_div(all_panels, panels);
  parallel(ceil_div(all_tiles, tiles) * across, threads, [&](std::int64_t task) {
    const std::int64_t tile = task / across * tiles, panel = task % across * panels;
    const MatmulBlock block{tile, std::min(tiles, all_tiles - tile), panel, std::min(panels, all_panels - panel)};
    const std::int64_t floats = std::max<std::int64_t>(1, work_floats(kernel, job, block));
    const auto bytes = static_cast<std::size_t>(floats) * sizeof(float);
    kernel.multiply(job, block, static_cast<float*>(scratch(bytes, Scratch::task)));
  });
}

// The share of the weights that is kept, estimated from some of the rows.
double kept_share(const MaskedMatmulKernel& kernel, const MaskedWeight& weight) {
  const std::int64_t step = ceil_div(weight.n_out, sampled_rows);
  std::int64_t kept = 0, rows = 0;
  for (std::int64_t row = 0; row < weight.n_out; row += step, ++rows) kept += kernel.count_kept(weight, row);
  return static_cast<double>(kept) / static_cast<double>(rows * weight.n_in);
}

// times_weight, with only the kept weights multiplied.
void times_kept(const MaskedMatmulKernel& kernel, const MaskedWeight& weight, bool across, const MatmulSource& x,
                const float* bias, int threads, void* out) {
  MatmulPanels left = panels_of(kernel, x, false, kernel.panel_tokens);
  left.panels = static_cast<float*>(scratch(static_cast<std::size_t>(floats(left)) * sizeof(float)));
  pack(kernel, left, threads);
  const MatmulSource kept{weight.weight, false, x.bf16, weight.n_out, weight.n_in, &weight};
  const std::int64_t columns = across ? weight.n_in : weight.n_out;
  const MatmulPanels right = panels_of(kernel, kept, across, kernel.tile_columns);
  const MatmulJob job{left.panels, right, x.rows, columns, 0, x.bf16, out, bias, nullptr, nullptr, nullptr};
  const std::int64_t step = std::min(sparse_columns, ceil_div(ceil_div(columns, 2 * std::int64_t{threads}), 16) * 16);
  const auto bytes = static_cast<std::size_t>(kernel.sparse_floats(job, step)) * sizeof(float);
  parallel(ceil_div(columns, step), threads, [&](std::int64_t task) {
    auto* work = static_cast<float*>(scratch(bytes, Scratch::task));
    kernel.multiply_sparse(job, task * step, std::min((task + 1) * step, columns), work);
  });
}

// out = x (kept weight)ᵀ, or x (kept weight) if `across`.
void times_weight(Isa isa, const MaskedWeight& weight, bool across, const MatmulSource& x, const float* bias,
                  int threads, void* out) {
  const MaskedMatmulKernel& kernel = kernel_for(isa, x.bf16);
  if (x.rows >= sparse_tokens && kernel.sparse_below > 0 && kept_share(kernel, weight) < kernel.sparse_below) {
    return times_kept(kernel_for(isa, false), weight, across, x, bias, threads, out);
  }
  MatmulPanels left = panels_of(kernel, x, false, kernel.tile_rows, kernel.word_run > 1);
  left.panels = static_cast<float*>(scratch(static_cast<std::size_t>(floats(left)) * sizeof(float)));
  pack(kernel, left, threads);
  // Pairs are rounded when they are packed.
  const bool round = x.bf16 && kernel.values_a_word == 1;
  const MatmulSource kept{weight.weight, false, round, weight.n_out, weight.n_in, &weight};
  const MatmulPanels right = panels_of(kernel, kept, across, kernel.tile_columns);
  const std::int64_t columns = across ? weight.n_in : weight.n_out;
  const MatmulJob job{left.panels, right, x.rows, columns, 0, x.bf16, out, bias, nullptr, nullptr, nullptr};
  const std::int64_t panels = std::max<std::int64_t>(1, task_columns / kernel.tile_columns);
  // If there are too few tasks to keep all threads busy to the end, rows are cut too, and each part packs the weights
  // again.
  const std::int64_t tiles = ceil_div(x.rows, kernel.tile_rows);
  const std::int64_t cuts = threads == 1 ? 1 : ceil_div(2 * std::int64_t{threads}, ceil_div(count(right), panels));
  multiply(kernel, job, ceil_div(tiles, cuts), panels, threads);
}

}  // namespace

void masked_matmul(const MaskedWeight& weight, const void* x, std::int64_t tokens, bool bf16, const float* bias,
                   cpu::Context context, void* y) {
  if (tokens == 0) return;
  if (tokens * weight.n_in * weight.n_out < serial_products) context.threads = 1;
  times_weight(context.isa, weight, false, {x, bf16, false, tokens, weight.n_in, nullptr}, bias, context.threads, y);
}

void masked_matmul_backward(const MaskedWeight& weight, const void* x, const void* dy, std::int64_t tokens, bool bf16,
                            cpu::Context context, void* dx, float* d_weight, float* d_scores) {
  if (tokens == 0) {  // empty sums
    if (d_weight != nullptr) std::fill_n(d_weight, weight.n_out * weight.n_in, 0.0f);
    if (d_scores != nullptr) std::fill_n(d_scores, weight.n_out / weight.score_rows * weight.n_in, 0.0f);
    return;
  }
  if (tokens * weight.n_in * weight.n_out < serial_products) context.threads = 1;
  const MaskedMatmulKernel& kernel = kernel_for(context.isa, bf16);
  const MatmulSource inputs{x, bf16, false, tokens, weight.n_in, nullptr};
  const MatmulSource gradients{dy, bf16, false, tokens, weight.n_out, nullptr};
  if (dx != nullptr) times_weight(context.isa, weight, true, gradients, nullptr, context.threads, dx);
  if (d_weight == nullptr && d_scores == nullptr) return;
  MatmulPanels left = panels_of(kernel, gradients, true, kernel.tile_rows, kernel.word_run > 1);
  MatmulPanels right = panels_of(kernel, inputs, true, kernel.tile_columns);
  left.panels = static_cast<float*>(scratch(static_cast<std::size_t>(floats(left) + floats(right)) * sizeof(float)));
  right.panels = left.panels + floats(left);
  pack(kernel, left, context.threads);
  pack(kernel, right, context.threads);
  // Whole tiles and whole sets of rows that share a score, so that only one task writes to a score.
  const std::int64_t unit = std::lcm(weight.score_rows, std::int64_t{kernel.tile_rows});
  const std::int64_t tiles = unit * std::max<std::int64_t>(1, gradient_rows / unit) / kernel.tile_rows;
  multiply(kernel, {left.panels, right, weight.n_out, weight.n_in, 0, false, nullptr, nullptr, &weight, d_weight,
            d_scores},
           tiles, std::max<std::int64_t>(1, gradient_columns / kernel.tile_columns), context.threads);
}

}  // namespace sparsebert
