// As floats.h, for the instruction sets that multiply int8. The portable path is the reference of the tiles, too.
#include "../isa.h"

#define SPARSEBERT_TILES 0
#include "scalar.h"
#undef SPARSEBERT_TILES
#include "avx2.h"
#include "avx_vnni.h"
#include "avx512.h"
#include "avx512_vnni.h"
#include "amx.h"
#undef SPARSEBERT_KERNEL

namespace sparsebert {
namespace {

// The kernel of this instruction set, or `few`, with vectors of half the width.
const auto& int8_kernel_for([[maybe_unused]] Isa isa, [[maybe_unused]] bool few) {
#if defined(__x86_64__)
  if (isa == Isa::amx && !few) return amx::kernel;
  if (isa >= Isa::avx512_vnni) return few ? avx512_vnni_half::kernel : avx512_vnni::kernel;
  if (isa == Isa::avx512) return few ? avx2::kernel : avx512::kernel;
  if (isa == Isa::avx_vnni) return avx_vnni::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
#endif
  return scalar::kernel;
}

}  // namespace
}  // namespace sparsebert
