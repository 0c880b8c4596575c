// Included once per instruction set, by lanes_*.cpp.
#pragma once
#include "../core/objectives.h"
#include "memory.h"
#include "objectives.h"
#include "rows.h"

namespace atlas::cpu {

template <class T, Isa isa, bool LanesAreRows> struct ObjectiveBody {
  static void run(const ObjectiveJob& job, int64_t begin, int64_t end) {
    using R = Row<T, isa, LanesAreRows>;
    const AtlasObjectives& p = job.p;
    void* memory = scratch(R::scratch_bytes(job.slots));
    for (int64_t first = begin; first < end; first += R::kRows) {
      ObjectiveRow<R> row(job.slots, memory, first, end, p);
      const Objective<ObjectiveRow<R>> found = objective_of(row, p);
      if (p.value) row.write(static_cast<T*>(p.value), found.value);
      if (row.wants_prediction()) judge(p, row.label(), found, first, row.rows());
      row.finish();
    }
  }

  template <class I, class Found>
  static ATLAS_HD void judge(const AtlasObjectives& p, I label, const Found& found, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const bool correct = label[r] == found.prediction[r] && found.nan[r] == found.nan[r];
      if (p.correct) p.correct[first + r] = correct;
      if (p.kappa) p.kappa[first + r] = wrapping_sum(p.kappa[first + r], correct);
    }
  }

  template <class R> struct ObjectiveRow : R {
    ATLAS_HD ObjectiveRow(const RowSlots& slots, void* scratch, int64_t first, int64_t end, const AtlasObjectives& p)
        : R(slots, scratch, first, end), p(p) {}
    ATLAS_HD typename R::I label() const { return this->labels(p.labels); }
    ATLAS_HD typename R::I target() const { return this->labels(p.targets); }
    ATLAS_HD bool wants_prediction() const { return p.correct || p.kappa; }
    const AtlasObjectives& p;
  };
};

template <Isa isa> RangeFunction<ObjectiveJob> ObjectiveRange<isa>::range(bool fp64, bool few) {
  if (fp64) return few ? ObjectiveBody<double, isa, true>::run : ObjectiveBody<double, isa, false>::run;
  return few ? ObjectiveBody<float, isa, true>::run : ObjectiveBody<float, isa, false>::run;
}

}  // namespace atlas::cpu
