#include "../core/objectives.h"

#include "rows.h"

namespace atlas::cuda {
namespace {

struct Job {
  AtlasObjectives p;
  RowSlots slots;
};

template <class R> struct ObjectiveRow : R {
  __device__ explicit ObjectiveRow(const Job& job) : R(job.slots), p(job.p) {}
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
  if (p.kappa) p.kappa[row.row()] += correct;
}

}  // namespace
}  // namespace atlas::cuda

extern "C" int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where) {
  using namespace atlas::cuda;
  const AtlasObjectives& p = *params;
  if (p.batch < 0 || p.classes < 1) return ATLAS_BAD_SIZE;
  if (p.batch == 0) return ATLAS_OK;
  const Job job = {p, {{p.logits, p.reference}, {p.cotangent, nullptr}, p.batch, p.classes, 1, p.dtype}};
  return with_row(job.slots, [&](auto kind) {
    return launch(*where, kind.threads(p.batch), 1, kRowThreads, objectives_kernel<typename decltype(kind)::Row>, job);
  });
}
