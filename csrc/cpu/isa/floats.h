// Compiles SPARSEBERT_KERNEL, a file that defines `kernel`, once for each instruction set with float32 kernels of its own.
// A new instruction set is a header here and a line in both lists of this file. The kernel file includes no header and
// calls no library template: see vector.inl.
#include "../isa.h"

#include "scalar.h"
#include "avx2.h"
#include "avx512.h"
#undef SPARSEBERT_KERNEL

namespace sparsebert {
namespace {

// The kernel of this instruction set, or of the next slower one that has its own.
const auto& kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::kernel;
  if (isa >= Isa::avx2) return avx2::kernel;
#endif
  return scalar::kernel;
}

}  // namespace
}  // namespace sparsebert
