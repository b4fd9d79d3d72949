// What the driver (sparse_encoder.cpp) and the kernels (sparse_encoder.inl) share: the steps between the linears,
// all on panels as in sparse_matmul.h.
#pragma once

#include "sparse_matmul.h"

namespace sparsebert {

// Word vectors plus position vectors -> panels, zeros past the last token. A task is one panel.
template <typename T>
struct EmbedJob {
  PanelShape shape;
  const Encoder* encoder;
  const std::int32_t* ids;        // [tokens]
  const std::int32_t* types;      // [tokens]
  const std::int32_t* positions;  // [tokens], the position in the token's sequence
  T* out;                         // panels of [embedding]
};

// Layer norm over the n values of each token, in place. A task is one vector of tokens.
template <typename T>
struct NormJob {
  PanelShape shape;
  T* x;  // panels of [n]
  std::int64_t n;
  LayerNorm norm;
  float eps;
};

// Softmax attention. A task is one head of one sequence.
template <typename T>
struct AttentionJob {
  PanelShape shape;
  const T* qkv;  // panels of [3 * hidden]; up to a vector may be read past the last panel
  T* out;        // panels of [hidden]
  std::int64_t hidden;
  std::int64_t heads;
  std::int64_t queries;  // only so many first tokens of each sequence attend to its tokens, and are written
};

template <typename T>
struct AttentionKernel {
  // Bytes of working memory for a sequence of n tokens and heads of `head_size` values.
  std::int64_t (*bytes)(std::int64_t n, std::int64_t head_size);
  void (*attend)(const AttentionJob<T>& job, std::int64_t start, std::int64_t stop, std::int64_t head, void* work);
};

template <typename T>
struct SparseEncoderKernel {
  void (*embed)(const EmbedJob<T>& job, std::int64_t panel);
  void (*normalize)(const NormJob<T>& job, std::int64_t panel, std::int64_t vector);
  AttentionKernel<T> attention;
};

// Attention beside linears in int8.
const AttentionKernel<float>& int8_attention(Isa isa, int lanes);

}  // namespace sparsebert
