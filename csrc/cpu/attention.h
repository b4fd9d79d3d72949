// What the driver (attention.cpp) and the kernels (attention.inl) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

struct AttentionKernel {
  // Floats of working memory that a task needs.
  std::int64_t (*floats)(const Attention& job, bool backward);
  // Compute one head of one sequence, with task = sequence * heads + head.
  void (*attend)(const Attention& job, std::int64_t task, float* work, void* out, float* stats);
  void (*attend_backward)(const Attention& job, std::int64_t task, float* work, const float* stats, const void* d_out,
                          void* dq, void* dk, void* dv);
};


}  // namespace sparsebert
