// What the drivers (sparse_matmul.cpp, sparse_encoder.cpp) and the kernels (sparse_matmul.inl) share.
#pragma once

#include "../ops.h"

namespace sparsebert {

// Tokens are cut into panels of `width`, with the token innermost, so that one kept weight is multiplied by `width`
// tokens with plain vector loads: [n_panels][n][width], aligned to 64 bytes. The width is one to a few vectors of the
// kernel's ISA; only the last panel may be partly filled.
struct PanelShape {
  std::int64_t tokens;
  std::int64_t panels;
  int width_vectors;
  int lanes;
  std::int64_t width() const { return std::int64_t{width_vectors} * lanes; }
};

// A job that moves values between rows, [tokens, n] row-major float32, and panels of float or Bf16.
template <typename T>
struct TransposeJob {
  PanelShape shape;
  float* rows;
  T* panels;  // tokens past the last one: zeros after packing
  std::int64_t n;
  std::int64_t part;  // how many of the n values one task moves, a multiple of 16
};

// Panels of x -> panels of y.
template <typename T>
struct LinearJob {
  PanelShape shape;
  const Linear* linear;
  const T* x;                    // or null for a linear in int8, whose input is
  const std::uint8_t* bytes;     // panels of bytes
  T* y;                          // or null, if a linear in int8 writes
  std::uint8_t* y_bytes;         // panels of bytes, made
  const Quantizer* output;       // by this
  bool add;           // y += linear(x); only without an activation
  std::int64_t unit;  // blocks of rows, or groups, that one task covers
};

// Panels of floats, four vectors wide -> panels of bytes. A task is a part of the n values of a panel.
struct QuantizeJob {
  PanelShape shape;
  const float* x;
  std::uint8_t* bytes;
  Quantizer by;
  std::int64_t n;
  std::int64_t part;
};

template <typename T>
struct LinearKernel {
  int task_panels;  // max panels that a task covers
  // Multiplies one part of the rows by these panels; `work` is work_bytes(job) of working memory.
  void (*multiply)(const LinearJob<T>& job, std::int64_t panel, std::int64_t panels, std::int64_t part, void* work);
  std::int64_t (*work_bytes)(const LinearJob<T>& job);
};

template <typename T>
struct SparseMatmulKernel {
  int lanes;          // tokens in a vector
  int widest_rows;    // vectors in the widest panel for a matrix in the form rows
  int widest_groups;  // the same for groups or tiles; at most widest_rows
  LinearKernel<T> linear;
  void (*pack)(const TransposeJob<T>& job, std::int64_t panel, std::int64_t part);
  void (*unpack)(const TransposeJob<T>& job, std::int64_t panel, std::int64_t part);
  void (*quantize)(const QuantizeJob& job, std::int64_t panel, std::int64_t part);  // null for bf16
  // Computes `steps` times saturated_flops operations at full speed, from registers or from tiles in the cache.
  float (*saturate)(std::int64_t steps);
  std::int64_t saturated_flops;
};

// Linears in int8. Floats beside them go through the kernel for float32 with as many lanes, in panels of four vectors.
struct Int8Kernel {
  int lanes;
  LinearKernel<float> linear;
  float (*saturate)(std::int64_t steps);
  std::int64_t saturated_flops;
};

template <typename T>
const SparseMatmulKernel<T>& sparse_matmul_kernel(Isa isa);

// What the int8 kernel is chosen by: of one weight, or of all of an encoder.
struct Int8Sizes {
  std::int64_t rows = 0, entries = 0, tall_entries = 0;

  void add(const Linear& linear) {
    rows += linear.n_out;
    entries += linear.int8->entries;
    tall_entries += linear.int8->tall_entries;
  }
};

// The kernel for this number of tokens: the narrower of two if that leaves fewer places of a panel empty, or costs less
// than tiles do.
const Int8Kernel& int8_kernel(Isa isa, std::int64_t tokens, const Int8Sizes& sizes);
// The instruction set of the float32 kernels beside it, and how it cuts tokens.
Isa floats_beside(const Int8Kernel& kernel);
PanelShape panel_shape(const Int8Kernel& kernel, std::int64_t tokens);

// The instruction set whose kernels multiply this number of tokens. Up to 8 tokens would leave half of a wide vector
// empty, and a panel of half the width stays in the first-level cache; the results are the same bits.
template <typename T>
Isa isa_for(Isa isa, std::int64_t tokens) {
  return sizeof(T) == sizeof(float) && isa >= Isa::avx512 && tokens <= 8 ? Isa::avx2 : isa;
}

// What the drivers need to know about a form.
struct Format {
  bool bf16;    // the elements of its panels, else floats, or bytes for its input
  bool groups;  // which of a kernel's widest panels suits it
  std::int64_t (*units)(const Linear& linear);   // blocks of rows, or groups, which are multiplied one by one
  std::int64_t (*stored)(const Linear& linear);  // entries that are multiplied
};
const Format& format_of(const Linear& linear);

// How tokens are cut: into as few panels as the widest panel for rows, or for `groups`, allows, and these as narrow as
// their number allows. 65 tokens make two panels of 48 (three vectors of 16), not one of 64 and one of 16 that would
// read every weight for a single token.
template <typename T>
PanelShape panel_shape(const SparseMatmulKernel<T>& kernel, std::int64_t tokens, bool groups);

// Computes one linear layer on all panels. Throws std::bad_alloc if the working memory cannot be allocated.
template <typename T>
void run_linear(const LinearKernel<T>& kernel, LinearJob<T> job, int threads);

// How many bytes of panels of n values are the first or the last one.
std::int64_t count_clipped(const PanelShape& shape, const std::uint8_t* bytes, std::int64_t n);

// The bytes of panels of n floats.
void quantize(const SparseMatmulKernel<float>& kernel, const PanelShape& shape, const float* x, std::int64_t n,
              const Quantizer& by, std::uint8_t* bytes, int threads);

}  // namespace sparsebert
