// What computes in lanes, for AVX-512. The headers before the switch hold what is not to be compiled for it.
#include <cmath>
#include <type_traits>

#include "losses.h"
#include "memory.h"
#include "objectives.h"

#if ATLAS_X86
ATLAS_BEGIN_V4
#include "losses_rows.h"
#include "objectives_rows.h"
template struct atlas::cpu::LossRange<atlas::cpu::kV4>;
template struct atlas::cpu::ObjectiveRange<atlas::cpu::kV4>;
ATLAS_END_TARGET
#endif
