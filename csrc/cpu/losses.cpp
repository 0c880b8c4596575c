#include "losses.h"

#include "../core/gairat.h"
#include "../core/losses.h"

namespace atlas::cpu {
namespace {

template <class T> void sum_up(const AtlasLosses& p) {
  double sum = 0;
  for (int64_t row = 0; row < p.batch; ++row) sum += static_cast<const T*>(p.value)[row];
  *static_cast<T*>(p.total) = T(sum * p.scale);
}

int run(AtlasLosses p, int threads) {
  int parts;
  if (const int status = count_parts(p, parts)) return status;
  const LossJob job = {
      p, {{p.logits, p.adv_logits}, {p.grad, p.adv_grad}, p.batch, p.classes, parts, p.dtype, p.distributions}};
  run_rows<LossRange>(job, threads);
  if (p.total) p.dtype == kFloat64 ? sum_up<double>(p) : sum_up<float>(p);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_losses(const AtlasLosses* params, const AtlasWhere* where) {
  return atlas::cpu::run(*params, where->threads);
}

// Normalised by the largest before the sum: a batch whose weights all underflow has weights all the same.
extern "C" int atlas_gairat_weights(const AtlasGairatWeights* params, const AtlasWhere*) {
  const AtlasGairatWeights& p = *params;
  if (const int status = atlas::status_of(p)) return status;
  const auto log_weight = [&](int64_t kappa) { return atlas::gairat_log_weight(p, kappa); };
  double largest = -HUGE_VAL, sum = 0;
  for (int64_t i = 0; i < p.batch; ++i) largest = std::fmax(largest, log_weight(p.kappa[i]));
  for (int64_t i = 0; i < p.batch; ++i) sum += std::exp(log_weight(p.kappa[i]) - largest);
  for (int64_t i = 0; i < p.batch; ++i)
    p.out[i] = float(std::exp(log_weight(p.kappa[i]) - largest) * double(p.batch) / sum);
  return ATLAS_OK;
}
