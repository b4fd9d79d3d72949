// What the driver (topk_mask.cpp) and the kernels (topk_mask_<isa>.cpp) share: the passes over one stretch of scores.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Vectors of up to this length are ranked by comparing every pair: at 64 some 300 cycles of AVX-512.
constexpr std::int64_t ranked_length = 64;

struct TopkMaskKernel {
  // How many of n scores are at least `threshold`; a NaN is not.
  std::int64_t (*count)(const float* scores, std::int64_t n, float threshold);
  // Copies the scores from `low` to `high`, in their order, to out, which has room for n + 1 as it is written ahead.
  // Returns how many, or -1 where there is a NaN; *above becomes the number of scores above `high`.
  std::int64_t (*collect)(const float* scores, std::int64_t n, float low, float high, float* out, std::int64_t* above);
  // keep[i] = score i is above the threshold, or one of the first `ties` that equal it.
  void (*mark)(const float* scores, std::int64_t n, float threshold, std::int64_t ties, bool* keep);
  // The k highest of each of `rows` vectors of length n <= ranked_length. False where there is a NaN.
  bool (*rank)(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep);
};

namespace topk_mask_scalar { extern const TopkMaskKernel kernel; }
#if defined(__x86_64__)
namespace topk_mask_avx2 { extern const TopkMaskKernel kernel; }
namespace topk_mask_avx512 { extern const TopkMaskKernel kernel; }
#endif

}  // namespace sparsebert
