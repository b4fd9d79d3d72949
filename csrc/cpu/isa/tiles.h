// As floats.h, for the instruction sets that multiply bf16 in tiles.
#include "../isa.h"

#include "scalar_tiles.h"
#include "avx512_bf16.h"
#include "amx.h"
#undef SPARSEBERT_KERNEL

namespace sparsebert {
namespace {

const auto& tile_kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return amx::kernel;
  if (isa == Isa::avx512_bf16) return avx512_bf16::kernel;
#endif
  return scalar_tiles::kernel;
}

}  // namespace
}  // namespace sparsebert
