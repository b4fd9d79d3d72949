// What the driver (topk_mask.cpp) and the kernels (topk_mask_<isa>.cpp) share: the passes over one stretch of scores.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Scores are compared as keys, unsigned integers in the order of the floats, -0 and +0 the same. Their first digit is the
// sign, the exponent and two bits of the mantissa.
constexpr int key_bits = 32;
constexpr int digit_bits = 11;
constexpr int digits = 1 << digit_bits;

// Vectors of up to this length are ranked by comparing every pair: 64 * 64 comparisons are 256 vectors of 16.
constexpr std::int64_t ranked_length = 64;

struct TopkMaskKernel {
  // Counts the first digit of n scores' keys in counts [digits], which it clears first. False where there is a NaN.
  bool (*count)(const float* scores, std::int64_t n, std::int32_t* counts);
  // Writes the keys whose first digit is `digit`, in their order.
  void (*collect)(const float* scores, std::int64_t n, std::uint32_t digit, std::uint32_t* keys);
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
