#include "isa.h"

namespace atlas::cpu {

Isa best_isa() {
#if ATLAS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") ||
      !__builtin_cpu_supports("fma"))
    return kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return kV3;
  return kV4;
#else
  return kBaseline;
#endif
}

static Isa& chosen() {
  static Isa isa = best_isa();
  return isa;
}

Isa current_isa() { return chosen(); }

bool force_isa(Isa isa) {
  if (isa < kBaseline || isa > best_isa()) return false;
  chosen() = isa;
  return true;
}

}  // namespace atlas::cpu
