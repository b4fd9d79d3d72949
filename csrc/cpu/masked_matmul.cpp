#include "masked_matmul.h"

#include <algorithm>
#include <numeric>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

constexpr std::int64_t tokens_a_part = 8192;  // whose gradients are packed at once
// Right panels that are multiplied together with each left tile: of chunk_words they take 576 KiB of a second-level cache.
constexpr std::int64_t group_panels = 4;
constexpr std::int64_t serial_work = 1 << 16;  // products, below which waking threads takes longer

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename T>
const MaskedKernel<T>& kernel_for(Isa isa);

template <>
const MaskedKernel<float>& kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return masked_matmul_avx512::kernel;
  if (isa == Isa::avx2) return masked_matmul_avx2::kernel;
#endif
  (void)isa;
  return masked_matmul_scalar::kernel;
}

template <>
const MaskedKernel<Bf16>& kernel_for(Isa isa) {
#if defined(__x86_64__)
  // Every processor with AMX has the dot products of AVX-512 BF16 as well.
  if (isa >= Isa::avx512_bf16) return masked_matmul_avx512_bf16::kernel_bf16;
  if (isa == Isa::avx512) return masked_matmul_avx512::kernel_bf16;
  if (isa == Isa::avx2) return masked_matmul_avx2::kernel_bf16;
#endif
  (void)isa;
  return masked_matmul_scalar::kernel_bf16;
}

template <typename T>
void run(MaskedJob<T> job, Isa isa, int threads) {
  const MaskedKernel<T>& kernel = kernel_for<T>(isa);
  if (job.rows == 0 || job.columns == 0) return;
  if (job.rows * job.columns * job.depth < serial_work) threads = 1;
  const std::int64_t words = ceil_div(job.depth, kernel.depths_a_word);
  const std::int64_t panels = ceil_div(job.rows, kernel.left_width);
  const std::int64_t rights = ceil_div(job.columns, kernel.right_width);
  job.left = static_cast<float*>(
      scratch(static_cast<std::size_t>(panels * kernel.left_width * words) * sizeof(float)));
  const std::int64_t parts = job.product == Product::grad_w ? ceil_div(job.depth, pack_depth) : panels;
  parallel(parts, threads, [&](std::int64_t part) { kernel.pack_left(job, part); });

  // Rows that share a score are added up by one task.
  const std::int64_t unit =
      job.product == Product::grad_w ? std::lcm<std::int64_t>(job.w.share, kernel.left_width) / kernel.left_width : 1;
  const std::int64_t units = ceil_div(panels, unit);
  const std::int64_t panel_floats = words * kernel.right_width;
  const std::int64_t wanted = 2 * threads;  // tasks, so that none waits long for the other
  const std::int64_t group = std::clamp<std::int64_t>(rights / wanted, 1, group_panels);
  const std::int64_t groups = ceil_div(rights, group);
  const std::int64_t splits = std::min(units, ceil_div(wanted, groups));
  const std::int64_t step = ceil_div(units, splits) * unit;
  parallel(groups * splits, threads, [&](std::int64_t task) {
    const std::int64_t begin = task % splits * step, end = std::min(panels, begin + step);
    if (begin >= end) return;
    const std::int64_t first = task / splits * group, count = std::min(group, rights - first);
    const std::int64_t waiting = words > chunk_words ? left_block * kernel.left_width * group * kernel.right_width : 0;
    auto* right = static_cast<float*>(
        scratch(static_cast<std::size_t>(group * panel_floats + waiting) * sizeof(float), Scratch::task));
    kernel.multiply(job, first, count, begin, end, right, right + group * panel_floats);
  });
}

}  // namespace

template <typename T>
void masked_matmul(const T* x, std::int64_t tokens, const MaskedWeight& w, const float* bias, Isa isa, int threads,
                   T* y) {
  run<T>({Product::forward, w, x, nullptr, bias, y, nullptr, nullptr, false, tokens, w.n_out, w.n_in, nullptr}, isa,
         threads);
}

template <typename T>
void masked_matmul_grad_x(const T* grad_y, std::int64_t tokens, const MaskedWeight& w, Isa isa, int threads,
                          T* grad_x) {
  run<T>({Product::grad_x, w, nullptr, grad_y, nullptr, grad_x, nullptr, nullptr, false, tokens, w.n_in, w.n_out,
          nullptr},
         isa, threads);
}

template <typename T>
void masked_matmul_grad_w(const T* grad_y, const T* x, std::int64_t tokens, const MaskedWeight& w, Isa isa, int threads,
                          float* grad_scores, float* grad_weight) {
  std::int64_t first = 0;
  do {  // no tokens: zeros
    const std::int64_t part = std::min(tokens_a_part, tokens - first);
    run<T>({Product::grad_w, w, x + first * w.n_in, grad_y + first * w.n_out, nullptr, nullptr, grad_scores,
            grad_weight, first > 0, w.n_out, w.n_in, part, nullptr},
           isa, threads);
    first += part;
  } while (first < tokens);
}

template void masked_matmul<float>(const float*, std::int64_t, const MaskedWeight&, const float*, Isa, int, float*);
template void masked_matmul<Bf16>(const Bf16*, std::int64_t, const MaskedWeight&, const float*, Isa, int, Bf16*);
template void masked_matmul_grad_x<float>(const float*, std::int64_t, const MaskedWeight&, Isa, int, float*);
template void masked_matmul_grad_x<Bf16>(const Bf16*, std::int64_t, const MaskedWeight&, Isa, int, Bf16*);
template void masked_matmul_grad_w<float>(const float*, const float*, std::int64_t, const MaskedWeight&, Isa, int,
                                          float*, float*);
template void masked_matmul_grad_w<Bf16>(const Bf16*, const Bf16*, std::int64_t, const MaskedWeight&, Isa, int, float*,
                                         float*);

}  // namespace sparsebert
