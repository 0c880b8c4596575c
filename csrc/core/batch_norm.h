// The second derivative of ONE channel of BatchNorm. Its first backward gives, of a cotangent g, with xhat = r (x - mean)
// and r = invstd,
//   gradient by x = w r (g - avg(g) - xhat avg(g xhat)), by weight = sum(g xhat), by bias = sum(g)
// in training, and w r g where mean and invstd are constants. Of cotangents v, a and b of these three, the derivatives
// by g and by x are linear in v, g and x - mean; five sums over the channel say how.
#pragma once
#include <initializer_list>

#include "../api.h"
#include "platform.h"

namespace atlas {

constexpr int kBatchNormSums = 5, kBatchNormSlots = 8;  // slots: of the workspace, for sums and for coefficients

// Channels lie innermost: as in channels_last, and where there is one pixel.
ATLAS_HD bool has_channel_rows(const AtlasBatchNorm& p) { return p.x.channels_last || p.pixels == 1; }

// Whether x counts beside its two cotangents, and whether sums do.
ATLAS_HD bool needs_x(const AtlasBatchNorm& p) { return p.training || p.weight_cotangent; }
ATLAS_HD bool needs_sums(const AtlasBatchNorm& p) { return p.training || p.weight_grad; }

inline int status_of(const AtlasBatchNorm& p) {
  if (p.batch < 0 || p.channels < 0 || p.pixels < 0) return ATLAS_BAD_SIZE;
  for (const AtlasImages* t : {&p.cotangent, &p.x_cotangent, &p.cotangent_grad, &p.x_grad})
    if (t->data && (t->dtype != p.x.dtype || t->channels_last != p.x.channels_last)) return ATLAS_REFUSED;
  return p.blocks > 0 ? ATLAS_OK : ATLAS_REFUSED;
}

// Sums over a channel, and what they make of it; c is x - mean.
template <class V> struct BatchNormTerms {
  V v, g, vg, vc, gc;

  ATLAS_HD void add(const V& v_, const V& g_, const V& c) {
    v += v_;
    g += g_;
    vg += v_ * g_;
    vc += v_ * c;
    gc += g_ * c;
  }
  ATLAS_HD void add(const BatchNormTerms& other) {
    v += other.v;
    g += other.g;
    vg += other.vg;
    vc += other.vc;
    gc += other.gc;
  }
  ATLAS_HD V at(int k) const { return k == 0 ? v : k == 1 ? g : k == 2 ? vg : k == 3 ? vc : gc; }
};

// by g: v, c, 1; by x: v, g, c, 1.
struct BatchNormCoefficients {
  double g_v, g_c, g_1, x_v, x_g, x_c, x_1, weight;
};

// a, b: the cotangents of the gradients by weight and bias.
ATLAS_HD BatchNormCoefficients coefficients(const BatchNormTerms<double>& sum, double count, double w, double r, double a,
                                            double b, bool training) {
  const double s = w * r;
  if (!training) return {s, a * r, b, 0, a * r, 0, 0, r * sum.vg};
  if (count == 0) return {};
  const double v = sum.v / count, g = sum.g / count, vx = r * sum.vc / count, gx = r * sum.gc / count;
  const double dot = sum.vg - count * (v * g + vx * gx);
  return {s,
          r * (a - s * vx),
          b - s * v,
          -s * r * gx,
          r * (a - s * vx),
          r * (s * r * (2 * vx * gx - dot / count) - a * r * gx),
          s * r * (gx * v + vx * g) - a * r * g,
          r * dot};
}

}  // namespace atlas
