// Cuts a sparse_matmul into panels and tasks; the arithmetic is in sparse_matmul.inl.
#include "sparse_matmul.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

// Panels packed at a time, for each thread: what a second-level cache of 1 MiB holds until they are computed.
constexpr std::int64_t scratch_bytes = 1 << 20;
constexpr std::int64_t pack_rows = 128;
constexpr std::int64_t line_floats = 16;
// Floats moved or multiplied below which waking a second core, some 5 us, costs more than it saves.
constexpr std::int64_t serial_work = 1 << 18;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

const SparseMatmulKernel& kernel_for([[maybe_unused]] Isa isa, [[maybe_unused]] std::int64_t tokens) {
#if defined(__x86_64__)
  // Up to 8 tokens leave half of a wide vector empty, and a panel of half the width stays in the first-level cache. The
  // two kernels give the same bits.
  if (isa == Isa::avx512 && tokens > 8) return sparse_matmul_avx512::kernel;
  if (isa != Isa::scalar) return sparse_matmul_avx2::kernel;
#endif
  return sparse_matmul_scalar::kernel;
}

struct Run {
  SparseMatmulJob job;
  const SparseMatmulKernel* kernel;
  std::int64_t parts;  // tasks a panel
};

void pack_task(const void* context, std::int64_t task) {
  const Run& run = *static_cast<const Run*>(context);
  run.kernel->pack(run.job, task / run.parts, task % run.parts);
}

void compute_task(const void* context, std::int64_t task) {
  const Run& run = *static_cast<const Run*>(context);
  run.kernel->compute(run.job, task / run.parts, task % run.parts);
}

}  // namespace

void sparse_matmul(const float* x, std::int64_t tokens, const CsrMatrix& w, const float* bias, Activation activation,
                   Isa isa, int threads, float* y) {
  if (tokens == 0 || w.n_out == 0) return;
  const SparseMatmulKernel& kernel = kernel_for(isa, tokens);
  // As few panels as the widest kernel allows, then all as narrow as that number allows: 65 tokens make two panels of
  // 48 (three vectors of 16), not one of 64 and one of 16 that would read every weight for a single token.
  const std::int64_t n_panels = ceil_div(tokens, kernel.max_width_vectors * kernel.lanes);
  const int width_vectors = static_cast<int>(ceil_div(tokens, n_panels * kernel.lanes));
  const std::int64_t width = std::int64_t{width_vectors} * kernel.lanes;
  const std::int64_t filled_panels = ceil_div(tokens, width);

  const std::int64_t nnz = w.row_ptr[w.n_out];
  if ((nnz + w.n_in) * width * filled_panels < serial_work) threads = 1;

  const std::int64_t panel_floats = w.n_in * width;
  const std::int64_t group = std::clamp<std::int64_t>(
      threads * scratch_bytes / std::max<std::int64_t>(1, panel_floats * static_cast<std::int64_t>(sizeof(float))),
      1, filled_panels);
  auto* panels = static_cast<float*>(scratch(static_cast<std::size_t>(group * panel_floats) * sizeof(float)));
  if (scratch_is_poisoned()) std::fill_n(y, tokens * w.n_out, std::numeric_limits<float>::quiet_NaN());

  for (std::int64_t first = 0; first < filled_panels; first += group) {
    const std::int64_t panels_here = std::min(group, filled_panels - first);
    const std::int64_t token = first * width;
    // Several tasks a thread, so that unequal rows or a busy core even out; each writes whole cache lines of y.
    const std::int64_t blocks = threads == 1 ? 1 : ceil_div(4 * std::int64_t{threads}, panels_here);
    const std::int64_t block_rows = ceil_div(ceil_div(w.n_out, blocks), line_floats) * line_floats;
    const std::int64_t tokens_here = std::min(tokens - token, panels_here * width);
    Run run{{x + token * w.n_in, y + token * w.n_out, panels, tokens_here, w, bias, activation, width_vectors,
             pack_rows, block_rows, scratch_is_poisoned()},
            &kernel,
            ceil_div(w.n_in, pack_rows)};
    parallel_for(panels_here * run.parts, threads, pack_task, &run);
    run.parts = ceil_div(w.n_out, block_rows);
    parallel_for(panels_here * run.parts, threads, compute_task, &run);
  }
}

}  // namespace sparsebert
