// What the driver (topk_mask.cpp) and the kernels (topk_mask.inl) share: the passes over one stretch of scores.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Vectors of up to this length are ranked by comparing every pair: some 300 cycles of AVX-512 for a length of 64.
constexpr std::int64_t ranked_length = 64;

struct TopkMaskKernel {
  // The number of the n scores that are at least `threshold`; a NaN does not count.
  std::int64_t (*count)(const float* scores, std::int64_t n, float threshold);
  // Copies the scores from `low` to `high`, in their order, to out, whose capacity must be n + 1, because one value too
  // many may be written. Returns the number of copied scores, or -1 if there is a NaN; *above becomes the number of
  // scores above `high`.
  std::int64_t (*collect)(const float* scores, std::int64_t n, float low, float high, float* out, std::int64_t* above);
  // keep[i] = score i is above the threshold, or one of the first `ties` that equal it.
  void (*mark)(const float* scores, std::int64_t n, float threshold, std::int64_t ties, bool* keep);
  // Marks the k highest of each of `rows` vectors of length n <= ranked_length. Returns false if there is a NaN.
  bool (*rank)(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, bool* keep);
};


}  // namespace sparsebert
