#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsebert {
namespace {

#if defined(__x86_64__)
// Linux lets a process use the tile registers only after it has asked for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
// GCC 12 has no name for it.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1u) != 0;
}
#endif

}  // namespace

bool isa_supported(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__)
  // The compiler's run-time library also asks the operating system (xgetbv): if that does not save the wide registers,
  // they count as missing.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx_vnni) return avx2 && has_avx_vnni();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("popcnt");
  if (isa == Isa::avx512) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::avx512_vnni) return vnni;
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  if (isa == Isa::avx512_bf16) return bf16;
  if (isa == Isa::amx) {
    return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && may_use_tiles();
  }
#endif
  return false;
}

}  // namespace sparsebert
