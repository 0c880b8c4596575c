// What an attack climbs, for ONE row of logits: the objective, its derivative, and whether the prediction is the label.
#pragma once
#include "losses.h"

namespace atlas {

template <class Row> struct Objective {
  typename Row::V value;
  typename Row::I prediction;  // of a row without a NaN
  typename Row::V nan;         // NaN for a row with one
};

// Cross-entropy, or KL from the reference.
template <class Row>
ATLAS_HD Objective<Row> smooth_objective_of(Row& row, const AtlasObjectives& p, typename Row::V sign) {
  using V = typename Row::V;
  const bool ce = p.objective == ATLAS_OBJECTIVE_CE;
  const Softmax<Row> q = softmax(row, 0);
  Softmax<Row> reference = q;
  if (!ce) reference = softmax(row, 1);
  const V value = ce ? ce_value(q, row, 0, row.label()) : kl_value(row, reference, 1, q, 0);
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V pull = ce ? q.p_minus_one_at(row, 0, j, row.label()) : q.p(row, 0, j) - reference.p(row, 1, j);
      row.gradient(0, j, sign * pull);
    }
  return {value, q.best, q.rest};
}

// Slot 0: the logits; slot 1: the reference. A Row also knows its label() and target().
template <class Row> ATLAS_HD Objective<Row> objective_of(Row& row, const AtlasObjectives& p) {
  using V = typename Row::V;
  using I = typename Row::I;
  const V sign = all<V>(p.descend ? -1 : 1);
  // First: gradients are the last use of the logits.
  Objective<Row> found = {};
  if (p.objective > ATLAS_OBJECTIVE_KL && row.wants_prediction()) {
    found.prediction = top<1>(row, 0, all<I>(-1)).index[0];
    found.nan = nan_of(row, 0);
  }
  switch (p.objective) {
    case ATLAS_OBJECTIVE_MARGIN: found.value = margin(row, row.label(), sign); break;
    case ATLAS_OBJECTIVE_DLR: found.value = dlr<false>(row, row.label(), row.label(), sign); break;
    case ATLAS_OBJECTIVE_DLR_TARGETED: found.value = dlr<true>(row, row.label(), row.target(), sign); break;
    default: found = smooth_objective_of(row, p, sign);
  }
  found.value = found.value * sign;
  return found;
}

}  // namespace atlas
