// Tiles in plain C++, slow, for reference.
#define SPARSEBERT_TILES 0
namespace sparsebert::scalar_tiles {
constexpr int lanes = 16;
#include "../vector.inl"
#include SPARSEBERT_KERNEL
}  // namespace sparsebert::scalar_tiles
#undef SPARSEBERT_TILES
