#include "../core/losses.h"

#include "rows.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasLosses p;
  RowSlots slots;
};

template <class T, bool LanesAreRows> struct Body {
  template <Isa isa> static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    using R = Row<T, isa, LanesAreRows>;
    const AtlasLosses& p = job.p;
    void* scratch = row_scratch.get(R::scratch_bytes(job.slots));
    for (int64_t first = begin; first < end; first += R::kRows) {
      LossRow<R> row(job.slots, scratch, first, end, p);
      const AtlasParts<LossRow<R>> parts = loss_of(row, p);
      const auto total = parts.adv + parts.local * T(p.local_weight) + parts.global * T(p.global_weight);
      row.write(static_cast<T*>(p.value), (p.loss == ATLAS_LOSS_ATLAS ? total : parts.adv) * row.weight());
      if (T* terms = static_cast<T*>(p.terms)) {
        row.write(terms, parts.adv);
        row.write(terms + p.batch, parts.local);
        row.write(terms + 2 * p.batch, parts.global);
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

template <class T> int run(const AtlasLosses& p, int threads) {
  const int parts = p.loss == ATLAS_LOSS_ATLAS ? int(p.neighbours) + (p.global == ATLAS_TERM_NONE ? 1 : 2) : 1;
  const Job job = {p, {{p.logits, p.adv_logits}, {p.grad, p.adv_grad}, p.batch, p.classes, parts, p.dtype}};
  const int64_t grain = rows_grain(job.slots);
  if (p.classes < kFewClasses)
    parallel_ranges<Body<T, true>>(job, p.batch, grain, threads);
  else
    parallel_ranges<Body<T, false>>(job, p.batch, grain, threads);
  if (p.total) {
    double sum = 0;
    for (int64_t row = 0; row < p.batch; ++row) sum += static_cast<const T*>(p.value)[row];
    *static_cast<T*>(p.total) = T(sum * p.scale);
  }
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_losses(const AtlasLosses* params, const AtlasWhere* where) {
  if (params->batch < 0 || params->classes < 1 || params->neighbours < 0) return ATLAS_BAD_SIZE;
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params, where->threads)
                                          : atlas::cpu::run<float>(*params, where->threads);
}

// Normalised by the largest before the sum: a batch whose weights all underflow has weights all the same.
extern "C" int atlas_gairat_weights(const AtlasGairatWeights* params, const AtlasWhere*) {
  const AtlasGairatWeights& p = *params;
  if (p.batch < 0 || p.steps < 2) return ATLAS_BAD_SIZE;
  const double half = double(p.steps / 2), lam = p.lam;
  const auto log_weight = [&](int64_t kappa) {
    const double a = 2 * lam + 10 / half * (half - double(kappa));
    return a < 0 ? a - std::log1p(std::exp(a)) : -std::log1p(std::exp(-a));
  };
  double largest = -HUGE_VAL, sum = 0;
  for (int64_t i = 0; i < p.batch; ++i) largest = std::fmax(largest, log_weight(p.kappa[i]));
  for (int64_t i = 0; i < p.batch; ++i) sum += std::exp(log_weight(p.kappa[i]) - largest);
  for (int64_t i = 0; i < p.batch; ++i)
    p.out[i] = float(std::exp(log_weight(p.kappa[i]) - largest) * double(p.batch) / sum);
  return ATLAS_OK;
}
