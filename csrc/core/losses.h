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

template <class Row>
ATLAS_HD typename Row::V ce_value(const Softmax<Row>& s, Row& row, int slot, typename Row::I label) {
  return s.log_sum + (s.max - row.at(slot, label));
}

template <class Row>
ATLAS_HD typename Row::V cross_entropy(Row& row, typename Row::I label, double smoothing, typename Row::V scale) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const Softmax<Row> s = softmax(row, 0);
  V value = ce_value(s, row, 0, label);
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
      row.gradient(0, j, (s.p_minus_one_at(row, 0, j, label) + kept - share) * scale);
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
    const typename Row::I c = row.classes(j);
    const V plain = q.p(row, q_slot, j) - p.p(row, p_slot, j), others = p.rest * p.inverse - q.rest * q.inverse;
    return (c == p.best) & (c == q.best) ? others : plain;
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

template <class Row> ATLAS_HD typename Row::V kl_div(Row& row, typename Row::V scale) {
  using V = typename Row::V;
  const Softmax<Row> p = softmax(row, 0), q = softmax(row, 1);
  const Pair<Row> pair(p, 0, q, 1);
  const V kl = pair.kl(row);
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V to_p = pair.kl_to_p(row, j, kl), to_q = pair.difference(row, j);
      row.gradient(0, j, to_p * scale);
      row.gradient(1, j, to_q * scale);
    }
  return kl;
}

template <class Row>
ATLAS_HD typename Row::V trades(Row& row, typename Row::I label, double beta, typename Row::V scale) {
  using V = typename Row::V;
  const scalar_of<V> b = scalar_of<V>(beta);
  const Softmax<Row> p = softmax(row, 0), q = softmax(row, 1);
  const Pair<Row> pair(p, 0, q, 1);
  const V kl = pair.kl(row), value = ce_value(p, row, 0, label) + b * kl;
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V to_p = p.p_minus_one_at(row, 0, j, label) + b * pair.kl_to_p(row, j, kl);
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
  const V z_y = row.at(0, label), p_y = exp(z_y - p.max) * p.inverse;
  const V weight = (T(1.0000001) - T(1)) + p.one_minus_p(label, z_y);
  const V q_m = exp(other.logit[0] - q.max) * q.inverse;
  const V room = T(1.0001 + 1e-12 - 1) + q.one_minus_p(other.index[0], other.logit[0]);
  const V value = ce_value(q, row, 1, label) - log(room) + b * kl * weight;
  const V push = q_m / room;
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const typename Row::I c = row.classes(j);
      const V p_j = p.p(row, 0, j), q_j = q.p(row, 1, j), ratio = p_j * (q_j / (q_j + tiny));
      const V to_p = weighted(p_j, p.log_p(row, 0, j) - log(q_j + tiny) - kl);
      const V bce = q.p_minus_one_at(row, 1, j, label) + push * (one_hot<Row>(c, other.index[0]) - q_j);
      row.gradient(0, j, b * (weight * to_p + kl * p_y * p.p_minus_one_at(row, 0, j, label)) * scale);
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
  AtlasParts<Row> parts = {ce_value(q, row, adv, label), V{}, V{}};
  // What a term that pulls at both sides adds to the adversary's gradient is asked for again when that is written.
  Softmax<Row> p = q;
  if (terms.global == ATLAS_TERM_KL || terms.global == ATLAS_TERM_CE) p = softmax(row, 0);
  const Pair<Row> pair(p, 0, q, adv);
  if (terms.global == ATLAS_TERM_KL) parts.global = pair.kl(row);
  if (terms.global == ATLAS_TERM_CE) parts.global = ce_value(p, row, 0, label);
  if (terms.global == ATLAS_TERM_LOGIT) parts.global = squared_distance(row, 0, adv);

  for (int k = first; k < end; ++k) {
    if (terms.local == ATLAS_TERM_LOGIT) {
      parts.local = parts.local + squared_distance(row, adv, k);
      continue;
    }
    const Softmax<Row> r = softmax(row, k);
    const Pair<Row> ball(q, adv, r, k);
    parts.local = parts.local + (terms.local == ATLAS_TERM_KL ? ball.kl(row) : ce_value(r, row, k, label));
    if (row.wants(k))
      for (int64_t j = 0; j < row.vectors(); ++j) {
        const V pull = terms.local == ATLAS_TERM_KL ? ball.difference(row, j) : r.p_minus_one_at(row, k, j, label);
        row.gradient(k, j, pull * local_scale);
      }
  }
  if (terms.neighbours) parts.local = parts.local / T(terms.neighbours);

  if (row.wants(adv))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      V to_adv = q.p_minus_one_at(row, adv, j, label) * scale;
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
        row.gradient(0, j, p.p_minus_one_at(row, 0, j, label) * global_scale);
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
    case ATLAS_LOSS_KL_DIV: return alone<Row>(kl_div(row, scale));
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
