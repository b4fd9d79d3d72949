// Cuts a gram into groups of tokens, and a group into blocks of sums; the arithmetic is in gram.inl.
#include "gram.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../gram.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Floats packed at a time: 4 MiB, a part of a shared third-level cache. 8 and 16 MiB were slower, 1 MiB no faster.
constexpr std::int64_t group_floats = 1 << 20;
constexpr std::int64_t pack_tokens = 64;
// Columns of a block, a multiple of every width; both sides, 256 tokens deep, take 196 KB of a second-level cache.
constexpr std::int64_t block_columns = 96;
// Max parts of a sum over tokens: fixed, so that the result does not depend on the threads.
constexpr std::int64_t max_parts = 64;
// With fewer floats to move or multiply, waking a second core, some 5 us, costs more than it saves.
constexpr std::int64_t serial_work = 1 << 18;

struct SumsRun {
  TokenSumsJob job;
  const GramKernel* kernel;
};

void sums_task(const void* context, std::int64_t task) {
  const SumsRun& run = *static_cast<const SumsRun*>(context);
  run.kernel->token_sums(run.job, task);
}

struct GroupRun {
  GramPackJob x, y;  // y.operand.n is 0 if there is no y
  GramSums sums;
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

// Whole blocks come first. The half blocks on the diagonal come last, so that the threads finish at similar times.
void multiply_task(const void* context, std::int64_t task) {
  const GroupRun& run = *static_cast<const GroupRun*>(context);
  const std::int64_t side = blocks(run.x.operand.n);
  const std::int64_t crossing = blocks(run.y.operand.n) * side;
  if (task < crossing) return multiply(run, run.y.operand, run.sums.yx, task / side, task % side, false);
  task -= crossing;
  std::int64_t distance = side - 1;  // of the block from the diagonal
  while (distance > 0 && task >= side - distance) task -= side - distance--;
  multiply(run, run.x.operand, run.sums.xx, task, task + distance, distance == 0);
}

// out[c] += the sums of the parts. Returns false if a result is not finite.
bool add_parts(const GramPackJob& job, double* out) {
  const std::int64_t parts = ceil_div(job.tokens, job.part_tokens);
  const std::int64_t n = job.operand.n;
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < n; ++c) out[c] += job.partial[part * n + c];
  }
  return std::all_of(out, out + n, [](double sum) { return std::isfinite(sum); });
}

void pack_group(const GroupRun& run, int threads) {
  parallel_for(pack_parts(run) * (run.y.operand.n > 0 ? 2 : 1), threads, pack_task, &run);
}

void multiply_group(const GroupRun& run, int threads) {
  const std::int64_t side = blocks(run.x.operand.n);
  parallel_for(side * (side + 1) / 2 + blocks(run.y.operand.n) * side, threads, multiply_task, &run);
}

}  // namespace

void token_sums(const float* values, std::int64_t tokens, std::int64_t n, const float* weights, const float* shift,
                cpu::Context context, double* sums) {
  if (tokens * n < serial_work) context.threads = 1;
  const std::int64_t part_tokens = std::max(gram_depth, ceil_div(tokens, max_parts));
  const std::int64_t parts = ceil_div(tokens, part_tokens);
  auto* partial = static_cast<double*>(scratch(static_cast<std::size_t>(parts * n) * sizeof(double)));
  const SumsRun run{{values, weights, shift, tokens, n, part_tokens, partial}, &kernel_for(context.isa)};
  parallel_for(parts, context.threads, sums_task, &run);
  std::fill_n(sums, n, 0.0);
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < n; ++c) sums[c] += partial[part * n + c];
  }
}

bool gram(const float* x, std::int64_t n_in, const float* shift_x, const float* y, std::int64_t n_y,
          const float* shift_y, const float* weights, std::int64_t tokens, cpu::Context context, const GramSums& sums) {
  if (y == nullptr) n_y = 0;
  const GramKernel& kernel = kernel_for(context.isa);
  const std::int64_t x_columns = ceil_div(n_in, kernel.width) * kernel.width;
  const std::int64_t y_columns = ceil_div(n_y, kernel.width) * kernel.width;
  // Whole depths, so that only a token's place in the batch decides with which tokens it shares a float32 sum. Whole
  // blocks of columns, so that the size of a group does not depend on the kernel's width.
  const std::int64_t columns = (blocks(n_in) + blocks(n_y)) * block_columns;
  const std::int64_t depths = std::max<std::int64_t>(1, group_floats / columns / gram_depth);
  const std::int64_t group = std::min(tokens, depths * gram_depth);
  const std::int64_t packed = group * (x_columns + y_columns);
  const std::int64_t parts = ceil_div(group, pack_tokens);

  const std::int64_t bytes = (packed + parts * (n_in + n_y) + tokens) * std::int64_t{sizeof(float)} +
                             (n_in + n_y) * std::int64_t{sizeof(double)};
  auto* panels = static_cast<float*>(scratch(static_cast<std::size_t>(bytes)));
  auto* sum_x = reinterpret_cast<double*>(panels + packed);  // a panel is an even number of floats
  double* sum_y = sum_x + n_in;
  auto* partial = reinterpret_cast<float*>(sum_y + n_y);
  float* roots = nullptr;
  if (weights != nullptr) {
    roots = partial + parts * (n_in + n_y);
    for (std::int64_t t = 0; t < tokens; ++t) roots[t] = std::sqrt(weights[t]);
  }
  if (group * n_in * (n_in + n_y) < serial_work) context.threads = 1;

  const auto group_from = [&](std::int64_t first, bool keep) {
    const std::int64_t here = std::min(group, tokens - first);
    const float* roots_here = roots != nullptr ? roots + first : nullptr;
    const float* y_here = y != nullptr ? y + first * n_y : nullptr;
    const GramOperand x_part{x + first * n_in, shift_x, panels, n_in};
    const GramOperand y_part{y_here, shift_y, panels + group * x_columns, n_y};
    return GroupRun{
        {x_part, roots_here, partial, here, pack_tokens, keep},
        {y_part, roots_here, partial + parts * n_in, here, pack_tokens, keep},
        sums,
        &kernel};
  };
  // Nothing is added before all sums are known to be finite. The last group stays packed and is multiplied first.
  std::fill_n(sum_x, n_in + n_y, 0.0);
  const std::int64_t last = (tokens - 1) / group * group;
  for (std::int64_t first = 0; first <= last; first += group) {
    const GroupRun run = group_from(first, first == last);
    pack_group(run, context.threads);
    if (!add_parts(run.x, sum_x) || !add_parts(run.y, sum_y)) return false;
  }
  for (std::int64_t c = 0; c < n_in; ++c) sums.x[c] += sum_x[c];
  for (std::int64_t c = 0; c < n_y; ++c) sums.y[c] += sum_y[c];
  for (std::int64_t first = last; first >= 0; first -= group) {
    const GroupRun run = group_from(first, true);
    if (first < last) pack_group(run, context.threads);
    multiply_group(run, context.threads);
  }
  return true;
}

}  // namespace sparsebert
