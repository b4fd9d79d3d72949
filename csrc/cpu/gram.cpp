// Cuts a gram into groups of tokens, and a group into blocks of sums; the arithmetic is in gram.inl.
#include "gram.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

// Floats packed at a time: a good part of a shared third-level cache, and tokens enough to read the sums seldom.
constexpr std::int64_t group_floats = 1 << 20;
constexpr std::int64_t pack_tokens = 32;
// Columns of a block: both sides of it, 256 tokens deep, stay in a second-level cache. A multiple of every width.
constexpr std::int64_t block_columns = 192;
// Parts of a sum over tokens; a number that depends on no machine, so that neither does the result.
constexpr std::int64_t max_parts = 64;
// Floats moved or multiplied below which waking a second core, some 5 us, costs more than it saves.
constexpr std::int64_t serial_work = 1 << 18;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

const GramKernel& kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return gram_avx512::kernel;
  if (isa == Isa::avx2) return gram_avx2::kernel;
#endif
  return gram_scalar::kernel;
}

struct SumsRun {
  TokenSumsJob job;
  const GramKernel* kernel;
};

void sums_task(const void* context, std::int64_t task) {
  const SumsRun& run = *static_cast<const SumsRun*>(context);
  run.kernel->token_sums(run.job, task);
}

struct GroupRun {
  GramPackJob x, y;  // y.operand.values is null where there is none
  double* sum_xx;
  double* sum_yx;
  const GramKernel* kernel;
};

std::int64_t blocks(std::int64_t n) { return ceil_div(n, block_columns); }
std::int64_t pack_parts(const GroupRun& run) { return ceil_div(run.x.tokens, run.x.part_tokens); }

void pack_task(const void* context, std::int64_t task) {
  const GroupRun& run = *static_cast<const GroupRun*>(context);
  const std::int64_t parts = pack_parts(run);
  run.kernel->pack(task < parts ? run.x : run.y, task % parts);
}

void multiply(const GroupRun& run, const GramOperand& rows, double* sums, std::int64_t i, std::int64_t j, bool upper) {
  const std::int64_t n_in = run.x.operand.n;
  const std::int64_t tokens = run.x.tokens;
  const std::int64_t row = i * block_columns;
  const std::int64_t column = j * block_columns;
  run.kernel->multiply({rows.panels + row * tokens, run.x.operand.panels + column * tokens, tokens,
                        std::min(block_columns, rows.n - row), std::min(block_columns, n_in - column), upper,
                        sums + row * n_in + column, n_in});
}

// Whole blocks first, the halves on the diagonal last, where they even out the end.
void multiply_task(const void* context, std::int64_t task) {
  const GroupRun& run = *static_cast<const GroupRun*>(context);
  const std::int64_t side = blocks(run.x.operand.n);
  const std::int64_t crossing = blocks(run.y.operand.n) * side;
  if (task < crossing) return multiply(run, run.y.operand, run.sum_yx, task / side, task % side, false);
  task -= crossing;
  std::int64_t distance = side - 1;  // of the block from the diagonal
  while (distance > 0 && task >= side - distance) task -= side - distance--;
  multiply(run, run.x.operand, run.sum_xx, task, task + distance, distance == 0);
}

}  // namespace

void token_sums(const float* values, std::int64_t tokens, std::int64_t n, const float* weights, const float* shift,
                Isa isa, int threads, double* sums) {
  if (tokens * n < serial_work) threads = 1;
  const std::int64_t part_tokens = std::max(gram_depth, ceil_div(tokens, max_parts));
  const std::int64_t parts = ceil_div(tokens, part_tokens);
  auto* partial = static_cast<double*>(scratch(static_cast<std::size_t>(parts * n) * sizeof(double)));
  const SumsRun run{{values, weights, shift, tokens, n, part_tokens, partial}, &kernel_for(isa)};
  parallel_for(parts, threads, sums_task, &run);
  std::fill_n(sums, n, 0.0);
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < n; ++c) sums[c] += partial[part * n + c];
  }
}

void gram(const float* x, std::int64_t n_in, const float* shift_x, const float* y, std::int64_t n_y,
          const float* shift_y, const float* weights, std::int64_t tokens, Isa isa, int threads, double* sum_xx,
          double* sum_yx) {
  if (y == nullptr) n_y = 0;
  const GramKernel& kernel = kernel_for(isa);
  const std::int64_t x_columns = ceil_div(n_in, kernel.width) * kernel.width;
  const std::int64_t y_columns = ceil_div(n_y, kernel.width) * kernel.width;
  // Whole depths, so that which tokens share a float32 sum depends on their place in the batch alone.
  const std::int64_t wanted = std::max<std::int64_t>(1, group_floats / (x_columns + y_columns) / gram_depth);
  const std::int64_t group = std::min(tokens, wanted * gram_depth);
  auto* packed = static_cast<float*>(
      scratch(static_cast<std::size_t>(group * (x_columns + y_columns + 1)) * sizeof(float)));
  float* roots = packed + group * (x_columns + y_columns);

  for (std::int64_t first = 0; first < tokens; first += group) {
    const std::int64_t here = std::min(group, tokens - first);
    if (weights != nullptr) {
      for (std::int64_t t = 0; t < here; ++t) roots[t] = std::sqrt(weights[first + t]);
    }
    const float* scale = weights != nullptr ? roots : nullptr;
    const GroupRun run{
        {{x + first * n_in, shift_x, packed, n_in}, scale, here, pack_tokens},
        {{n_y > 0 ? y + first * n_y : nullptr, shift_y, packed + group * x_columns, n_y}, scale, here, pack_tokens},
        sum_xx, sum_yx, &kernel};
    const int useful = here * n_in * (n_in + n_y) < serial_work ? 1 : threads;
    parallel_for(pack_parts(run) * (n_y > 0 ? 2 : 1), useful, pack_task, &run);
    const std::int64_t side = blocks(n_in);
    parallel_for(side * (side + 1) / 2 + blocks(n_y) * side, useful, multiply_task, &run);
  }
}

}  // namespace sparsebert
