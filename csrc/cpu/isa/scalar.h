// No instruction set in particular: vectors of four floats, which the compiler lowers to whatever its baseline has
// (SSE2, NEON, or single floats).
namespace sparsebert::scalar {
constexpr int lanes = 4;
constexpr int registers = 16;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::scalar
