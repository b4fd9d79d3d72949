// The portable kernel, see gram_scalar.cpp.
#include "masked_matmul.h"

#define SPARSEBERT_PAIRS 0
namespace sparsebert::masked_matmul_scalar {
constexpr int lanes = 4;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;
#include "vector.inl"
#include "panel.inl"
#include "masked_matmul.inl"
}  // namespace sparsebert::masked_matmul_scalar
