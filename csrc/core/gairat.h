// GAIRAT's weight of one sample; see atlas_kernels/losses.py.
#pragma once
#include <cmath>

#include "../api.h"
#include "platform.h"

namespace atlas {

inline int status_of(const AtlasGairatWeights& p) {
  if (p.batch < 0) return ATLAS_BAD_SIZE;
  return p.steps >= 2 && p.steps <= INT32_MAX ? ATLAS_OK : ATLAS_REFUSED;
}

// Before it is normalised: log sigmoid(2 lam + 10/h (h - kappa)), h = steps / 2 rounded down.
ATLAS_HD double gairat_log_weight(const AtlasGairatWeights& p, int64_t kappa) {
  const double half = double(p.steps / 2), a = 2 * p.lam + 10 / half * (half - double(kappa));
  return a < 0 ? a - ::log1p(::exp(a)) : -::log1p(::exp(-a));
}

}  // namespace atlas
