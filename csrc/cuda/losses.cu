#include "../core/losses.h"

#include "../core/gairat.h"
#include "rows.h"

namespace atlas::cuda {
namespace {

struct Job {
  AtlasLosses p;
  RowSlots slots;
  int lane_bits;
};

template <class R> struct LossRow : R {
  __device__ explicit LossRow(const Job& job) : R(job.slots, job.lane_bits), p(job.p) {}
  __device__ typename R::I label() const { return R::label(p.labels); }
  __device__ typename R::I target() const { return R::label(p.targets); }
  __device__ typename R::V weight() const { return R::number(p.weights, 1); }
  const AtlasLosses& p;
};

// A kernel for each loss: they differ in how many registers they need.
template <class R, int Loss>
__global__ void __launch_bounds__(kRowThreads, 1) losses_kernel(const __grid_constant__ Job job) {
  using T = typename R::V;
  AtlasLosses p = job.p;
  p.loss = Loss;
  LossRow<R> row(job);
  const AtlasParts<LossRow<R>> parts = loss_of(row, p);
  if (!row.writes()) return;
  static_cast<T*>(p.value)[row.row()] = value_of(row, p, parts);
  if (T* terms = static_cast<T*>(p.terms)) {
    terms[row.row()] = parts.adv;
    terms[p.batch + row.row()] = parts.local;
    if (p.loss == ATLAS_LOSS_atlas_loss) terms[2 * p.batch + row.row()] = parts.global;
  }
}

template <int Loss> int run(const Job& job, const AtlasWhere& where) {
  return with_row(job.slots, [&](auto row) {
    auto* const kernel = losses_kernel<typename decltype(row)::type, Loss>;
    return launch(where, job.p.batch << job.lane_bits, 1, kRowThreads, kernel, job);
  });
}

int run(const Job& job, const AtlasWhere& where) {
  switch (job.p.loss) {
    case ATLAS_LOSS_cross_entropy: return run<ATLAS_LOSS_cross_entropy>(job, where);
    case ATLAS_LOSS_kl_div: return run<ATLAS_LOSS_kl_div>(job, where);
    case ATLAS_LOSS_trades_loss: return run<ATLAS_LOSS_trades_loss>(job, where);
    case ATLAS_LOSS_mart_loss: return run<ATLAS_LOSS_mart_loss>(job, where);
    case ATLAS_LOSS_entropy: return run<ATLAS_LOSS_entropy>(job, where);
    case ATLAS_LOSS_margin_loss: return run<ATLAS_LOSS_margin_loss>(job, where);
    case ATLAS_LOSS_dlr_loss: return run<ATLAS_LOSS_dlr_loss>(job, where);
    case ATLAS_LOSS_logit_pairing: return run<ATLAS_LOSS_logit_pairing>(job, where);
    case ATLAS_LOSS_soft_cross_entropy: return run<ATLAS_LOSS_soft_cross_entropy>(job, where);
    case ATLAS_LOSS_consistency_loss: return run<ATLAS_LOSS_consistency_loss>(job, where);
    default: return run<ATLAS_LOSS_atlas_loss>(job, where);
  }
}

// One block: what follows needs the whole batch, always in the same order.
constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads) total_kernel(const T* value, int64_t batch, double scale, T* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < batch; i += kSumThreads) sum += value[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *total = T(sum * scale);
}

template <class T> int add_up(const AtlasLosses& p, const AtlasWhere& where) {
  return launch(where, 1, 1, kSumThreads, total_kernel<T>, static_cast<const T*>(p.value), p.batch, p.scale,
                static_cast<T*>(p.total));
}

// Normalised by the largest before the sum: a batch whose weights all underflow has weights all the same.
__global__ void __launch_bounds__(kSumThreads) gairat_kernel(const AtlasGairatWeights p) {
  const int64_t t = threadIdx.x;
  double largest = -HUGE_VAL, sum = 0;
  for (int64_t i = t; i < p.batch; i += kSumThreads) largest = fmax(largest, gairat_log_weight(p, p.kappa[i]));
  largest = block_max<kSumThreads>(largest);
  for (int64_t i = t; i < p.batch; i += kSumThreads) sum += ::exp(gairat_log_weight(p, p.kappa[i]) - largest);
  sum = block_sum<kSumThreads>(sum);
  for (int64_t i = t; i < p.batch; i += kSumThreads)
    p.out[i] = float(::exp(gairat_log_weight(p, p.kappa[i]) - largest) * double(p.batch) / sum);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_losses(const AtlasLosses* params, const AtlasWhere* where) {
  using namespace atlas::cuda;
  AtlasLosses p = *params;
  int parts;
  if (const int status = atlas::count_parts(p, parts)) return status;
  const atlas::RowSlots slots = {{p.logits, p.adv_logits}, {p.grad, p.adv_grad}, p.batch, p.classes, parts, p.dtype,
                                 p.distributions};
  const Job job = {p, slots, lane_bits(p.classes)};
  const int status = p.batch ? run(job, *where) : ATLAS_OK;
  if (status != ATLAS_OK || !p.total) return status;
  return p.dtype == atlas::kFloat64 ? add_up<double>(p, *where) : add_up<float>(p, *where);
}

extern "C" int atlas_gairat_weights(const AtlasGairatWeights* params, const AtlasWhere* where) {
  using namespace atlas::cuda;
  if (const int status = atlas::status_of(*params)) return status;
  return params->batch ? launch(*where, 1, 1, kSumThreads, gairat_kernel, *params) : ATLAS_OK;
}
