#include "../core/objectives.h"

#include "rows.h"

namespace atlas::cuda {
namespace {

struct Job {
  AtlasObjectives p;
  RowSlots slots;
  int lane_bits;
};

template <class R> struct ObjectiveRow : R {
  __device__ explicit ObjectiveRow(const Job& job) : R(job.slots, job.lane_bits), p(job.p) {}
  __device__ typename R::I label() const { return R::label(p.labels); }
  __device__ typename R::I target() const { return R::label(p.targets); }
  __device__ bool wants_prediction() const { return p.correct || p.kappa; }
  const AtlasObjectives& p;
};

template <class R>
__global__ void __launch_bounds__(kRowThreads, 1) objectives_kernel(const __grid_constant__ Job job) {
  const AtlasObjectives& p = job.p;
  ObjectiveRow<R> row(job);
  const Objective<ObjectiveRow<R>> found = objective_of(row, p);
  if (!row.writes()) return;
  if (p.value) static_cast<typename R::V*>(p.value)[row.row()] = found.value;
  const bool correct = row.label() == found.prediction && found.nan == found.nan;
  if (p.correct) p.correct[row.row()] = correct;
  if (p.kappa) p.kappa[row.row()] = wrapping_sum(p.kappa[row.row()], correct);
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where) {
  using namespace atlas::cuda;
  const AtlasObjectives& p = *params;
  if (const int status = atlas::status_of(p)) return status;
  if (p.batch == 0) return ATLAS_OK;
  const atlas::RowSlots slots = {{p.logits, p.reference}, {p.cotangent, nullptr}, p.batch, p.classes, 1, p.dtype};
  const Job job = {p, slots, lane_bits(p.classes)};
  return with_row(slots, [&](auto row) {
    auto* const kernel = objectives_kernel<typename decltype(row)::type>;
    return launch(*where, p.batch << job.lane_bits, 1, kRowThreads, kernel, job);
  });
}
