// Cuts a sparse_matmul into panels and tasks; the arithmetic is in sparse_matmul.inl.
#include "sparse_matmul.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../sparse_matmul.inl"
#include "isa/floats.h"
#define SPARSEBERT_KERNEL "../sparse_matmul_tiled.inl"
#include "isa/tiles.h"

namespace sparsebert {
namespace {

// Bytes of panels per thread at a time: as much as a second-level cache of 1 MiB holds from packing to unpacking.
constexpr std::int64_t scratch_bytes = 1 << 20;
constexpr std::int64_t transposed = 128;  // inputs or outputs that one task transposes
// With fewer floats to move or multiply, waking a second core, some 5 us, costs more than it saves.
constexpr std::int64_t serial_work = 1 << 18;

std::int64_t entries_in_groups(const Linear& linear) {
  const GroupedMatrix& w = *linear.grouped;
  std::int64_t sum = 0;
  for (std::int64_t g = 0; g < w.groups; ++g) sum += w.col_count[g] * group_rows;
  return sum;
}

std::int64_t entries_in_tiles(const Linear& linear) {
  const TiledMatrix& w = *linear.tiled;
  std::int64_t sum = 0;
  for (std::int64_t g = 0; g < w.groups; ++g) sum += std::int64_t{w.chunks[g]} * w.tiles[g] * tile_rows * tile_cols;
  return sum;
}

// In the order of Form.
constexpr Format formats[] = {
    {false, false, [](const Linear& linear) { return linear.sliced->blocks; },
     [](const Linear& linear) { return linear.sliced->entries * slice_rows; }},
    {false, true, [](const Linear& linear) { return linear.grouped->groups; }, entries_in_groups},
    {true, true, [](const Linear& linear) { return linear.tiled->groups; }, entries_in_tiles},
    {false, true, [](const Linear& linear) { return linear.int8->groups; },
     [](const Linear& linear) { return linear.int8->entries; }},
};

template <typename T>
void transpose(const TransposeJob<T>& job, void (*task)(const TransposeJob<T>&, std::int64_t, std::int64_t),
               int threads) {
  const std::int64_t parts = ceil_div(job.n, job.part);
  parallel(job.shape.panels * parts, threads, [&](std::int64_t i) { task(job, i / parts, i % parts); });
}

template <typename T>
void multiply_rows(const float* x, std::int64_t tokens, const Linear& linear, cpu::Context context, float* y) {
  const Format& format = format_of(linear);
  Int8Sizes sizes;
  if (linear.form == Form::int8) sizes.add(linear);
  const Int8Kernel* int8 = linear.form == Form::int8 ? &int8_kernel(context.isa, tokens, sizes) : nullptr;
  const SparseMatmulKernel<T>& kernel =
      sparse_matmul_kernel<T>(int8 != nullptr ? floats_beside(*int8) : isa_for<T>(context.isa, tokens));
  const PanelShape whole = int8 != nullptr ? panel_shape(*int8, tokens) : panel_shape(kernel, tokens, format.groups);
  const std::int64_t width = whole.width();
  if ((format.stored(linear) + linear.n_in) * width * whole.panels < serial_work) context.threads = 1;

  const std::int64_t elements = (linear.n_in + linear.n_out) * width;  // a panel of x and one of y
  const std::int64_t at_once = std::clamp<std::int64_t>(
      context.threads * scratch_bytes / (elements * static_cast<std::int64_t>(sizeof(T))), 1, whole.panels);
  // Bytes of x are at most a quarter of its floats.
  const std::int64_t byte_room = int8 != nullptr ? at_once * linear.n_in * width : 0;
  auto* x_panels = static_cast<T*>(
      scratch(static_cast<std::size_t>(at_once * elements) * sizeof(T) + static_cast<std::size_t>(byte_room)));
  T* y_panels = x_panels + at_once * linear.n_in * width;
  auto* bytes = reinterpret_cast<std::uint8_t*>(y_panels + at_once * linear.n_out * width);

  for (std::int64_t first = 0; first < whole.panels; first += at_once) {
    PanelShape shape = whole;
    shape.panels = std::min(at_once, whole.panels - first);
    shape.tokens = std::min(tokens - first * width, shape.panels * width);
    // Packing only reads the rows.
    const TransposeJob<T> in{shape, const_cast<float*>(x) + first * width * linear.n_in, x_panels, linear.n_in,
                             transposed};
    transpose(in, kernel.pack, context.threads);
    LinearJob<T> job{shape, &linear, x_panels, nullptr, y_panels, nullptr, nullptr, false, 0};
    if constexpr (std::is_same_v<T, float>) {
      if (int8 != nullptr) {
        quantize(kernel, shape, x_panels, linear.n_in, linear.int8->input, bytes, context.threads);
        job.bytes = bytes;
      }
      run_linear(int8 != nullptr ? int8->linear : kernel.linear, job, context.threads);
    } else {
      run_linear(kernel.linear, job, context.threads);
    }
    transpose({shape, y + first * width * linear.n_out, y_panels, linear.n_out, transposed}, kernel.unpack, context.threads);
  }
}

template <typename Kernel>
double peak_flops(const Kernel& kernel) {
  const std::int64_t steps = (std::int64_t{1} << 24) / kernel.saturated_flops;
  double best = std::numeric_limits<double>::infinity();
  volatile float kept = 0.0f;  // without it the compiler would leave the work out
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    kept = kept + kernel.saturate(steps);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return static_cast<double>(steps * kernel.saturated_flops) / best;
}

}  // namespace

const Format& format_of(const Linear& linear) { return formats[static_cast<int>(linear.form)]; }

template <>
const SparseMatmulKernel<float>& sparse_matmul_kernel(Isa isa) {
  return kernel_for(isa);
}

template <>
const SparseMatmulKernel<Bf16>& sparse_matmul_kernel(Isa isa) {
  return tile_kernel_for(isa);
}

template <typename T>
PanelShape panel_shape(const SparseMatmulKernel<T>& kernel, std::int64_t tokens, bool groups) {
  const std::int64_t widest = groups ? kernel.widest_groups : kernel.widest_rows;
  const std::int64_t least = ceil_div(tokens, widest * kernel.lanes);
  const int width_vectors = static_cast<int>(ceil_div(tokens, least * kernel.lanes));
  return {tokens, ceil_div(tokens, std::int64_t{width_vectors} * kernel.lanes), width_vectors, kernel.lanes};
}

template <typename T>
void run_linear(const LinearKernel<T>& kernel, LinearJob<T> job, int threads) {
  const std::int64_t all = format_of(*job.linear).units(*job.linear);
  const std::int64_t blocks = ceil_div(job.shape.panels, kernel.task_panels);
  // Several tasks per thread, so that unequal rows or a busy core even out.
  const std::int64_t wanted = threads == 1 ? 1 : ceil_div(4 * std::int64_t{threads}, blocks);
  const std::int64_t unit = std::max<std::int64_t>(1, ceil_div(all, wanted));
  const std::int64_t parts = ceil_div(all, unit);
  job.unit = unit;
  const auto bytes = static_cast<std::size_t>(kernel.work_bytes(job));
  parallel(blocks * parts, threads, [&](std::int64_t i) {
    const std::int64_t panel = i / parts * kernel.task_panels;
    const std::int64_t panels = std::min<std::int64_t>(kernel.task_panels, job.shape.panels - panel);
    kernel.multiply(job, panel, panels, i % parts, bytes == 0 ? nullptr : scratch(bytes, Scratch::task));
  });
}

template PanelShape panel_shape(const SparseMatmulKernel<float>&, std::int64_t, bool);
template PanelShape panel_shape(const SparseMatmulKernel<Bf16>&, std::int64_t, bool);
template void run_linear(const LinearKernel<float>&, LinearJob<float>, int);
template void run_linear(const LinearKernel<Bf16>&, LinearJob<Bf16>, int);

void quantize(const SparseMatmulKernel<float>& kernel, const PanelShape& shape, const float* x, std::int64_t n,
              const Quantizer& by, std::uint8_t* bytes, int threads) {
  const std::int64_t parts = ceil_div(n, transposed);
  const QuantizeJob job{shape, x, bytes, by, n, transposed};
  parallel(shape.panels * parts, threads, [&](std::int64_t i) { kernel.quantize(job, i / parts, i % parts); });
}

void sparse_matmul(const float* x, std::int64_t tokens, const Linear& linear, cpu::Context context, float* y) {
  if (tokens == 0 || linear.n_out == 0) return;
  if (scratch_is_poisoned()) std::fill_n(y, tokens * linear.n_out, std::numeric_limits<float>::quiet_NaN());
  if (format_of(linear).bf16) {
    multiply_rows<Bf16>(x, tokens, linear, context, y);
  } else {
    multiply_rows<float>(x, tokens, linear, context, y);
  }
}

double peak_flops(Isa isa, Form form) {
  if (form == Form::int8) return peak_flops(int8_kernel(isa, 1024, {}));
  return form == Form::tiles ? peak_flops(sparse_matmul_kernel<Bf16>(isa)) : peak_flops(sparse_matmul_kernel<float>(isa));
}

}  // namespace sparsebert
