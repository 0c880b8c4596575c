// Included once per instruction set, by lanes_*.cpp.
#pragma once
#include "../core/losses.h"
#include "memory.h"
#include "losses.h"
#include "rows.h"

namespace atlas::cpu {

template <class T, Isa isa, bool LanesAreRows> struct LossBody {
  static void run(const LossJob& job, int64_t begin, int64_t end) {
    using R = Row<T, isa, LanesAreRows>;
    const AtlasLosses& p = job.p;
    void* memory = scratch(R::scratch_bytes(job.slots));
    for (int64_t first = begin; first < end; first += R::kRows) {
      LossRow<R> row(job.slots, memory, first, end, p);
      const AtlasParts<LossRow<R>> parts = loss_of(row, p);
      row.write(static_cast<T*>(p.value), value_of(row, p, parts));
      if (T* terms = static_cast<T*>(p.terms)) {
        row.write(terms, parts.adv);
        row.write(terms + p.batch, parts.local);
        if (p.loss == ATLAS_LOSS_atlas_loss) row.write(terms + 2 * p.batch, parts.global);
      }
      row.finish();
    }
  }

  template <class R> struct LossRow : R {
    ATLAS_HD LossRow(const RowSlots& slots, void* scratch, int64_t first, int64_t end, const AtlasLosses& p)
        : R(slots, scratch, first, end), p(p) {}
    ATLAS_HD typename R::I label() const { return this->labels(p.labels); }
    ATLAS_HD typename R::I target() const { return this->labels(p.targets); }
    ATLAS_HD typename R::V weight() const { return this->numbers(static_cast<const T*>(p.weights), T(1)); }
    const AtlasLosses& p;
  };
};

template <Isa isa> RangeFunction<LossJob> LossRange<isa>::range(bool fp64, bool few) {
  if (fp64) return few ? LossBody<double, isa, true>::run : LossBody<double, isa, false>::run;
  return few ? LossBody<float, isa, true>::run : LossBody<float, isa, false>::run;
}

}  // namespace atlas::cpu
