// Which logits a loss reads, and how its rows are shared out. Nothing here depends on the instruction set.
#pragma once
#include "../api.h"
#include "isa.h"

namespace atlas::cpu {

// The logits of a loss, each [batch, classes], and where their gradients go. `parts`: batches in one tensor.
struct RowSlots {
  static constexpr int kTensors = 2;
  const void* logits[kTensors];
  void* gradients[kTensors];
  int64_t batch, classes;
  int parts;  // slots that the first tensor holds; each other tensor is one more slot
  int32_t dtype;

  ATLAS_HD int count() const { return parts + (logits[1] != nullptr); }
  ATLAS_HD int tensor(int slot) const { return slot >= parts; }
  ATLAS_HD int64_t offset(int slot, int64_t row) const { return ((slot < parts ? slot : 0) * batch + row) * classes; }
};

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
