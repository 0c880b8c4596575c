// What an attack climbs, for ONE row of logits: the objective, its derivative, and whether the prediction is the label.
#pragma once
#include "losses.h"

namespace atlas {

// Whether the objective has what it looks at.
ATLAS_HD int status_of(const AtlasObjectives& p) {
  if (p.batch < 0 || p.classes < 1) return ATLAS_BAD_SIZE;
  if (p.dtype < kFloat32 || p.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.objective < ATLAS_OBJECTIVE_CE || p.objective > ATLAS_OBJECTIVE_DLR_TARGETED) return ATLAS_REFUSED;
  const bool kl = p.objective == ATLAS_OBJECTIVE_KL, predicts = p.correct || p.kappa;
  const bool there = (p.labels || (kl && !predicts)) && (p.reference || !kl) &&
                     (p.targets || p.objective != ATLAS_OBJECTIVE_DLR_TARGETED);
  return there || !p.batch ? ATLAS_OK : ATLAS_REFUSED;
}

template <class Row> struct Objective {
  typename Row::V value;
  typename Row::I prediction;  // of a row without a NaN
  typename Row::V nan;         // NaN for a row with one
};

// Slot 0: the logits; slot 1: the reference. A Row also knows its label() and target().
template <class Row> ATLAS_HD Objective<Row> objective_of(Row& row, const AtlasObjectives& p) {
  using V = typename Row::V;
  using I = typename Row::I;
  const V sign = all<V>(p.descend ? -1 : 1);
  Objective<Row> found = {};
  // First: gradients are the last use of the logits.
  if (row.wants_prediction()) {
    found.prediction = top<1>(row, 0, all<I>(-1)).index[0];
    found.nan = nan_of(row, 0);
  }
  switch (p.objective) {
    case ATLAS_OBJECTIVE_CE: found.value = cross_entropy(row, row.label(), 0, sign); break;
    case ATLAS_OBJECTIVE_KL: found.value = kl_div(row, 1, 0, sign); break;
    case ATLAS_OBJECTIVE_MARGIN: found.value = margin(row, row.label(), sign); break;
    case ATLAS_OBJECTIVE_DLR: found.value = dlr<false>(row, row.label(), row.label(), sign); break;
    default: found.value = dlr<true>(row, row.label(), row.target(), sign);
  }
  found.value = found.value * sign;
  return found;
}

}  // namespace atlas
