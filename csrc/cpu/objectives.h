#pragma once
#include "slots.h"

namespace atlas::cpu {

struct ObjectiveJob {
  AtlasObjectives p;
  RowSlots slots;
};

// The range function of an instruction set, for fp64 or fp32 and few or many classes (lanes_*.cpp).
template <Isa isa> struct ObjectiveRange {
  static RangeFunction<ObjectiveJob> range(bool fp64, bool few);
};

}  // namespace atlas::cpu
