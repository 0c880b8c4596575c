#include "../core/objectives.h"

#include "rows.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasObjectives p;
  RowSlots slots;
};

template <class T, bool LanesAreRows> struct Body {
  template <Isa isa> static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    using R = Row<T, isa, LanesAreRows>;
    const AtlasObjectives& p = job.p;
    void* scratch = row_scratch.get(R::scratch_bytes(job.slots));
    for (int64_t first = begin; first < end; first += R::kRows) {
      ObjectiveRow<R> row(job.slots, scratch, first, end, p);
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
      if (p.kappa) p.kappa[first + r] += correct;
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

template <class T> int run(const AtlasObjectives& p, int threads) {
  const Job job = {p, {{p.logits, p.reference}, {p.cotangent, nullptr}, p.batch, p.classes, 1, p.dtype}};
  const int64_t grain = rows_grain(job.slots);
  if (p.classes < kFewClasses)
    parallel_ranges<Body<T, true>>(job, p.batch, grain, threads);
  else
    parallel_ranges<Body<T, false>>(job, p.batch, grain, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where) {
  if (params->batch < 0 || params->classes < 1) return ATLAS_BAD_SIZE;
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params, where->threads)
                                          : atlas::cpu::run<float>(*params, where->threads);
}
