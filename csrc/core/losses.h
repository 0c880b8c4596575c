// The robust losses of ONE row of logits: value and gradients. Formulas and sources: atlas_kernels/losses.py. Every
// function returns the row's loss and gives row.gradient() its derivative times `scale` (a number a row).
#pragma once
#include "../api.h"
#include "rows.h"

namespace atlas {

// 1 where the classes are `label`.
template <class Row> ATLAS_HD typename Row::V one_hot(typename Row::I classes, typename Row::I label) {
  using V = typename Row::V;
  return classes == label ? all<V>(1) : V{};
}

// A prediction and the class that it should have been.
template <class Row> struct Target {
  using V = typename Row::V;
  const Softmax<Row>& s;
  int slot;
  typename Row::I label;
  V logit, missing, ce;  // missing: 1 - p_y; ce: -log p_y

  ATLAS_HD Target(const Softmax<Row>& s, const Row& row, int slot, typename Row::I label)
      : s(s), slot(slot), label(label), logit(row.at(slot, label)), missing(s.one_minus_p(logit)),
        ce(s.log_sum + (s.max - logit)) {}

  // d ce / d(logits).
  ATLAS_HD V to_ce(const Row& row, int64_t j) const {
    return row.classes(j) == label ? -missing : s.p(row, slot, j);
  }
};

template <class Row>
ATLAS_HD typename Row::V cross_entropy(Row& row, typename Row::I label, double smoothing, typename Row::V scale) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const Softmax<Row> s = softmax(row, 0);
  const Target<Row> target(s, row, 0, label);
  V value = target.ce;
  const T share = T(smoothing / double(row.count()));
  if (smoothing != 0) {
    Total<V> below;
    for (int64_t j = 0; j < row.vectors(); ++j)
      below.add(row.classes(j) < row.count() ? s.max - row.logit(0, j) : V{});
    value = value * T(1 - smoothing) + (below.over(row) * share + s.log_sum * T(smoothing));
  }
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V kept = one_hot<Row>(row.classes(j), label) * T(smoothing);
      row.gradient(0, j, (target.to_ce(row, j) + kept - share) * scale);
    }
  return value;
}

// p times something that may be infinite where p is 0.
template <class V> ATLAS_HD V weighted(V p, V v) { return p == V{} ? p : p * v; }

// Two predictions beside each other; what is alike in them cancels before anything is rounded.
template <class Row> struct Pair {
  using V = typename Row::V;
  const Softmax<Row>&p, &q;
  int p_slot, q_slot;
  V shift;

  ATLAS_HD Pair(const Softmax<Row>& p, int p_slot, const Softmax<Row>& q, int q_slot)
      : p(p), q(q), p_slot(p_slot), q_slot(q_slot), shift((p.max - q.max) + (p.log_sum - q.log_sum)) {}

  // log p - log q.
  ATLAS_HD V log_ratio(const Row& row, int64_t j) const {
    return (row.logit(p_slot, j) - row.logit(q_slot, j)) - shift;
  }

  // q - p.
  ATLAS_HD V difference(const Row& row, int64_t j) const {
    const V plain = q.p(row, q_slot, j) - p.p(row, p_slot, j), others = p.rest * p.inverse - q.rest * q.inverse;
    return (row.logit(p_slot, j) == p.max) & (row.logit(q_slot, j) == q.max) ? others : plain;
  }

  // KL(p||q), and its derivative with respect to the logits of p.
  ATLAS_HD V kl(Row& row) const {
    Total<V> sum;
    for (int64_t j = 0; j < row.vectors(); ++j) sum.add(weighted(p.p(row, p_slot, j), log_ratio(row, j)));
    return sum.over(row);
  }
  ATLAS_HD V kl_to_p(const Row& row, int64_t j, V kl) const {
    return weighted(p.p(row, p_slot, j), log_ratio(row, j) - kl);
  }
};

template <class Row> ATLAS_HD typename Row::V kl_div(Row& row, int p_slot, int q_slot, typename Row::V scale) {
  using V = typename Row::V;
  const Softmax<Row> p = softmax(row, p_slot), q = softmax(row, q_slot);
  const Pair<Row> pair(p, p_slot, q, q_slot);
  const V kl = pair.kl(row);
  if (row.wants(p_slot) || row.wants(q_slot))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V to_q = pair.difference(row, j);
      if (row.wants(p_slot)) row.gradient(p_slot, j, pair.kl_to_p(row, j, kl) * scale);
      row.gradient(q_slot, j, to_q * scale);
    }
  return kl;
}

template <class Row>
ATLAS_HD typename Row::V trades(Row& row, typename Row::I label, double beta, typename Row::V scale) {
  using V = typename Row::V;
  const scalar_of<V> b = scalar_of<V>(beta);
  const Softmax<Row> p = softmax(row, 0), q = softmax(row, 1);
  const Target<Row> target(p, row, 0, label);
  const Pair<Row> pair(p, 0, q, 1);
  const V kl = pair.kl(row), value = target.ce + b * kl;
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V to_p = target.to_ce(row, j) + b * pair.kl_to_p(row, j, kl);
      const V to_q = b * pair.difference(row, j);
      row.gradient(0, j, to_p * scale);
      row.gradient(1, j, to_q * scale);
    }
  return value;
}

// The published constants: log(q + 1e-12), 1.0001 - q_m, 1.0000001 - p_y (in fp32 that is 1 + 2^-23).
template <class Row>
ATLAS_HD typename Row::V mart(Row& row, typename Row::I label, double beta, typename Row::V scale) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const T b = T(beta), tiny = T(1e-12);
  const Softmax<Row> p = softmax(row, 0), q = softmax(row, 1);
  const Top<1, Row> other = top<1>(row, 1, label);
  Total<V> kls, pulls;
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const V p_j = p.p(row, 0, j), q_j = q.p(row, 1, j);
    kls.add(weighted(p_j, p.log_p(row, 0, j) - log(q_j + tiny)));
    pulls.add(p_j * (q_j / (q_j + tiny)));
  }
  const V kl = kls.over(row), pull = pulls.over(row);
  const Target<Row> clean(p, row, 0, label), target(q, row, 1, label);
  const V p_y = exp_of_negative(clean.logit - p.max) * p.inverse, weight = (T(1.0000001) - T(1)) + clean.missing;
  const V q_m = exp_of_negative(other.logit[0] - q.max) * q.inverse;
  const V room = T(1.0001 + 1e-12 - 1) + q.one_minus_p(other.logit[0]);
  const V value = target.ce - log(room) + b * kl * weight;
  const V push = q_m / room;
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const typename Row::I c = row.classes(j);
      const V p_j = p.p(row, 0, j), q_j = q.p(row, 1, j), ratio = p_j * (q_j / (q_j + tiny));
      const V to_p = weighted(p_j, p.log_p(row, 0, j) - log(q_j + tiny) - kl);
      const V bce = target.to_ce(row, j) + push * (one_hot<Row>(c, other.index[0]) - q_j);
      row.gradient(0, j, b * (weight * to_p + kl * p_y * clean.to_ce(row, j)) * scale);
      row.gradient(1, j, (bce + b * weight * (q_j * pull - ratio)) * scale);
    }
  return value;
}

template <class Row> ATLAS_HD typename Row::V entropy(Row& row, typename Row::V scale) {
  using V = typename Row::V;
  const Softmax<Row> s = softmax(row, 0);
  Total<V> sum;
  for (int64_t j = 0; j < row.vectors(); ++j) sum.add(weighted(s.p(row, 0, j), s.log_p(row, 0, j)));
  const V h = -sum.over(row);
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j)
      row.gradient(0, j, weighted(s.p(row, 0, j), s.log_p(row, 0, j) + h) * -scale);
  return h;
}

// max_{k != y} z_k - z_y.
template <class Row> ATLAS_HD typename Row::V margin(Row& row, typename Row::I label, typename Row::V scale) {
  using V = typename Row::V;
  const Top<1, Row> other = top<1>(row, 0, label);
  const V nan = nan_of(row, 0), s = scale + nan, value = other.logit[0] - row.at(0, label) + nan;
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const typename Row::I c = row.classes(j);
      row.gradient(0, j, (one_hot<Row>(c, other.index[0]) - one_hot<Row>(c, label)) * s);
    }
  return value;
}

// -(z_y - z_other) / (z_(1) - z_(3) + 1e-12); with targets, z_other is the target's and the divisor
// z_(1) - (z_(3) + z_(4)) / 2 + 1e-12.
template <bool Targeted, class Row>
ATLAS_HD typename Row::V dlr(Row& row, typename Row::I label, typename Row::I target, typename Row::V scale) {
  using V = typename Row::V;
  using I = typename Row::I;
  using T = scalar_of<V>;
  const Top<Targeted ? 4 : 3, Row> order = top<Targeted ? 4 : 3>(row, 0, all<I>(-1));
  const Top<1, Row> other = top<1>(row, 0, label);
  const I towards = Targeted ? target : other.index[0];
  const V nan = nan_of(row, 0), gap = row.at(0, label) - (Targeted ? row.at(0, target) : other.logit[0]) + nan;
  const V low = Targeted ? (order.logit[2] + order.logit[Targeted ? 3 : 2]) * T(0.5) : order.logit[2];
  const V range = order.logit[0] - low + T(1e-12), ratio = gap / range;
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const I c = row.classes(j);
      const V third = one_hot<Row>(c, order.index[2]);
      const V bottom = Targeted ? (third + one_hot<Row>(c, order.index[Targeted ? 3 : 2])) * T(0.5) : third;
      const V to_gap = one_hot<Row>(c, towards) - one_hot<Row>(c, label);
      row.gradient(0, j, (to_gap + ratio * (one_hot<Row>(c, order.index[0]) - bottom)) / range * scale);
    }
  return -ratio;
}

template <class Row> ATLAS_HD typename Row::V squared_distance(Row& row, int a, int b) {
  using V = typename Row::V;
  Total<V> sum;
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const V d = row.classes(j) < row.count() ? row.logit(a, j) - row.logit(b, j) : V{};
    sum.add(d * d);
  }
  return sum.over(row);
}

template <class Row> ATLAS_HD typename Row::V logit_pairing(Row& row, typename Row::V scale) {
  using V = typename Row::V;
  const V value = squared_distance(row, 0, 1);
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V d = (row.logit(0, j) - row.logit(1, j)) * scalar_of<V>(2) * scale;
      row.gradient(0, j, d);
      row.gradient(1, j, -d);
    }
  return value;
}

// How the terms of ATLAS are made; slots: x (unless global is none), the adversary, the neighbours.
struct AtlasTerms {
  int local, global;
  int64_t neighbours;
  double local_weight, global_weight;
};

template <class Row> struct AtlasParts { typename Row::V adv, local, global; };

template <class Row>
ATLAS_HD AtlasParts<Row> atlas_loss(Row& row, typename Row::I label, const AtlasTerms& terms, typename Row::V scale) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const int adv = terms.global == ATLAS_TERM_NONE ? 0 : 1, first = adv + 1, end = first + int(terms.neighbours);
  const V local_scale = scale * T(terms.local_weight / double(terms.neighbours ? terms.neighbours : 1));
  const V global_scale = scale * T(terms.global_weight);
  const Softmax<Row> q = softmax(row, adv);
  const Target<Row> target(q, row, adv, label);
  AtlasParts<Row> parts = {target.ce, V{}, V{}};
  // What a term that pulls at both sides adds to the adversary's gradient is asked for again when that is written.
  Softmax<Row> p = q;
  if (terms.global == ATLAS_TERM_KL || terms.global == ATLAS_TERM_CE) p = softmax(row, 0);
  const Pair<Row> pair(p, 0, q, adv);
  const Target<Row> clean(p, row, 0, label);  // of x, if that is asked for
  if (terms.global == ATLAS_TERM_KL) parts.global = pair.kl(row);
  if (terms.global == ATLAS_TERM_CE) parts.global = clean.ce;
  if (terms.global == ATLAS_TERM_LOGIT) parts.global = squared_distance(row, 0, adv);

  for (int k = first; k < end; ++k) {
    if (terms.local == ATLAS_TERM_LOGIT) {
      parts.local = parts.local + squared_distance(row, adv, k);
      continue;
    }
    const Softmax<Row> r = softmax(row, k);
    const Pair<Row> ball(q, adv, r, k);
    const Target<Row> near(r, row, k, label);
    parts.local = parts.local + (terms.local == ATLAS_TERM_KL ? ball.kl(row) : near.ce);
    if (row.wants(k))
      for (int64_t j = 0; j < row.vectors(); ++j) {
        const V pull = terms.local == ATLAS_TERM_KL ? ball.difference(row, j) : near.to_ce(row, j);
        row.gradient(k, j, pull * local_scale);
      }
  }
  if (terms.neighbours) parts.local = parts.local / T(terms.neighbours);

  if (row.wants(adv))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      V to_adv = target.to_ce(row, j) * scale;
      if (terms.local == ATLAS_TERM_LOGIT)
        for (int k = first; k < end; ++k) {
          const V d = (row.logit(k, j) - row.logit(adv, j)) * T(2) * local_scale;
          row.gradient(k, j, d);
          to_adv = to_adv - d;
        }
      if (terms.global == ATLAS_TERM_KL) {
        const V to_p = pair.kl_to_p(row, j, parts.global);
        to_adv = to_adv + pair.difference(row, j) * global_scale;
        row.gradient(0, j, to_p * global_scale);
      } else if (terms.global == ATLAS_TERM_CE) {
        row.gradient(0, j, clean.to_ce(row, j) * global_scale);
      } else if (terms.global == ATLAS_TERM_LOGIT) {
        const V d = (row.logit(0, j) - row.logit(adv, j)) * T(2) * global_scale;
        row.gradient(0, j, d);
        to_adv = to_adv - d;
      }
      row.gradient(adv, j, to_adv);
    }
  return parts;
}

template <class Row> ATLAS_HD AtlasParts<Row> alone(typename Row::V value) {
  using V = typename Row::V;
  return {value, V{}, V{}};
}

// The loss that `p` asks for, and for ATLAS its terms: a Row also knows its label(), target() and weight().
template <class Row> ATLAS_HD AtlasParts<Row> loss_of(Row& row, const AtlasLosses& p) {
  using V = typename Row::V;
  const V scale = row.weight() * scalar_of<V>(p.scale);
  switch (p.loss) {
    case ATLAS_LOSS_CROSS_ENTROPY: return alone<Row>(cross_entropy(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_KL_DIV: return alone<Row>(kl_div(row, 0, 1, scale));
    case ATLAS_LOSS_TRADES: return alone<Row>(trades(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_MART: return alone<Row>(mart(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_ENTROPY: return alone<Row>(entropy(row, scale));
    case ATLAS_LOSS_MARGIN: return alone<Row>(margin(row, row.label(), scale));
    case ATLAS_LOSS_DLR:
      return alone<Row>(p.targets ? dlr<true>(row, row.label(), row.target(), scale)
                                  : dlr<false>(row, row.label(), row.label(), scale));
    case ATLAS_LOSS_LOGIT_PAIRING: return alone<Row>(logit_pairing(row, scale));
    default:
      return atlas_loss(row, row.label(), {p.local, p.global, p.neighbours, p.local_weight, p.global_weight}, scale);
  }
}

}  // namespace atlas
