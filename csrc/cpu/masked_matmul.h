// What the driver (masked_matmul.cpp) and the kernels (masked_matmul_<isa>.cpp) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

enum class Product : int { forward, grad_x, grad_w };

// One product as left [rows, depth] times right [depth, columns]:
//   forward  x      times Wᵀ   tokens x n_out, over n_in
//   grad_x   grad_y times W    tokens x n_in, over n_out
//   grad_w   grad_yᵀ times x   n_out x n_in, over tokens
// Both sides are packed into panels, a depth of all their rows or columns side by side, so that a tile's operands step
// through memory; with pairs, two depths make one word. W is masked as it is packed: nowhere else is there a mask.
template <typename T>
struct MaskedJob {
  Product product;
  MaskedWeight w;
  const T* x;
  const T* grad_y;
  const float* bias;
  T* out;              // y or grad_x
  float* grad_scores;  // or null
  float* grad_weight;  // or null
  bool add;            // grad_w: to what an earlier part of the tokens gave
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;
  float* left;  // panels of the left side, each [words of depth, left_width]
};

template <typename T>
struct MaskedKernel {
  int left_width;     // rows of a left panel
  int right_width;    // columns of a right panel
  int depths_a_word;  // 1 or 2
  // Packs a part of the left side: a panel, or in grad_w, whose depth are rows in memory, all panels of pack_depth.
  void (*pack_left)(const MaskedJob<T>& job, std::int64_t part);
  // Packs `count` right panels from `panel` on into `right`, each [words of depth, right_width], and multiplies them with
  // the left panels from begin to end. Sums wait in `sums`, [left_block * left_width, count * right_width], between
  // stretches of chunk_words.
  void (*multiply)(const MaskedJob<T>& job, std::int64_t panel, std::int64_t count, std::int64_t begin,
                   std::int64_t end, float* right, float* sums);
};

constexpr std::int64_t pack_depth = 64;

// A tile's left side of so many words stays in the first-level cache, a group's right side of them in the second.
constexpr std::int64_t chunk_words = 768;
constexpr std::int64_t left_block = 16;  // panels whose sums wait together

namespace masked_matmul_scalar {
extern const MaskedKernel<float> kernel;
extern const MaskedKernel<Bf16> kernel_bf16;
}
#if defined(__x86_64__)
namespace masked_matmul_avx2 {
extern const MaskedKernel<float> kernel;
extern const MaskedKernel<Bf16> kernel_bf16;
}
namespace masked_matmul_avx512 {
extern const MaskedKernel<float> kernel;
extern const MaskedKernel<Bf16> kernel_bf16;
}
namespace masked_matmul_avx512_bf16 {
extern const MaskedKernel<Bf16> kernel_bf16;
}
#endif

}  // namespace sparsebert
