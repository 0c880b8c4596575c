#pragma once
#include "slots.h"

namespace atlas::cpu {

struct LossJob {
  AtlasLosses p;
  RowSlots slots;
};

// The range function of an instruction set, for fp64 or fp32 and few or many classes (lanes_*.cpp).
template <Isa isa> struct LossRange {
  static RangeFunction<LossJob> range(bool fp64, bool few);
};

}  // namespace atlas::cpu
