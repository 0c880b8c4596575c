// How the rows of a loss are shared out. Nothing here depends on the instruction set.
#pragma once
#include "../api.h"
#include "../core/slots.h"
#include "isa.h"

namespace atlas::cpu {

constexpr int64_t kFewClasses = 64;  // from here on a row fills vectors of its own

// Runs the function for the instruction set, the compute type and the number of classes, which Chosen<isa> knows.
template <template <Isa> class Chosen, class Job> void run_rows(const Job& job, int threads) {
  const bool fp64 = job.slots.dtype == kFloat64, few = job.slots.classes < kFewClasses;
#if ATLAS_X86
  static constexpr RangeFunction<Job> (*table[])(bool, bool) = {Chosen<kBaseline>::range, Chosen<kV3>::range,
                                                                Chosen<kV4>::range};
  const RangeFunction<Job> range = table[current_isa()](fp64, few);
#else
  const RangeFunction<Job> range = Chosen<kBaseline>::range(fp64, few);
#endif
  // Rows that make up what a thread must do to be worth waking.
  const int64_t grain = 16384 / (job.slots.classes * job.slots.count()) + 1;
  parallel_ranges(range, job, job.slots.batch, grain, threads);
}

}  // namespace atlas::cpu
