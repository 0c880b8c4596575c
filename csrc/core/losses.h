// The robust losses of ONE row of logits: value and gradients. Formulas and sources: atlas_kernels/losses.py. Every
// function returns the row's loss and gives row.gradient() its derivative times `scale` (a number a row).
#pragma once
#include "../api.h"
#include "rows.h"

namespace atlas {

// `value`, or 1, where the classes are `label`; else 0.
template <class Row>
ATLAS_HD typename Row::V one_hot(typename Row::I classes, typename Row::I label, typename Row::V value) {
  return classes == label ? value : typename Row::V{};
}
template <class Row> ATLAS_HD typename Row::V one_hot(typename Row::I classes, typename Row::I label) {
  return one_hot<Row>(classes, label, all<typename Row::V>(1));
}

// p v, and 0 where p is 0: v may be infinite there.
template <class V> ATLAS_HD V weighted(V p, V v) { return p == V{} ? p : p * v; }

// The same for a weight that does not come from v: a NaN stays.
template <class V> ATLAS_HD V times(V weight, V v) { return (weight == V{}) & (v == v) ? V{} : weight * v; }

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
    Total<V> below;  // of the halves and shares, which stay finite
    for (int64_t j = 0; j < row.vectors(); ++j)
      below.add(row.classes(j) < row.count() ? (s.max * T(0.5) - row.logit(0, j) * T(0.5)) * (share * 2) : V{});
    value = times(all<V>(T(1 - smoothing)), value) + (below.over(row) + s.log_sum * T(smoothing));
  }
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V kept = one_hot<Row>(row.classes(j), label) * T(smoothing);
      row.gradient(0, j, (target.to_ce(row, j) + kept - share) * scale);
    }
  return value;
}

// The distribution that a prediction should have been: the row's shares, or one class; spread over all by the smoothing.
template <class Row> struct Distribution {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const Softmax<Row>& s;
  typename Row::I label;
  T kept, share;
  V top, others, total, ce;  // top: of the classes with the largest logit; ce: -sum_c t_c log p_c

  ATLAS_HD Distribution(const Softmax<Row>& s, Row& row, double smoothing)
      : s(s), label(row.label()), kept(T(1 - smoothing)), share(T(smoothing / double(row.count()))) {
    Total<V> tops, rest, below;  // below: of the halves and shares, which stay finite
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V z = row.logit(0, j), t = of(row, j);
      tops.add(z == s.max ? t : V{});
      rest.add(z == s.max ? V{} : t);
      below.add(weighted(t * T(2), s.max * T(0.5) - z * T(0.5)));
    }
    top = tops.over(row);
    others = rest.over(row);
    if (!row.has_shares()) others = label >= 0 ? others : all<V>(NAN);
    total = top + others;
    ce = below.over(row) + total * s.log_sum;
  }

  // What a class has of it.
  ATLAS_HD V of(const Row& row, int64_t j) const {
    const typename Row::I c = row.classes(j);
    const V t = row.has_shares() ? row.share(j) : one_hot<Row>(c, label);
    return c < row.count() ? t * kept + share : V{};
  }

  // d ce / d(logits). At the largest logit from what p and t lack of the whole.
  ATLAS_HD V to_ce(const Row& row, int64_t j) const {
    const V t = of(row, j), missing = others + (top - t);
    return row.logit(0, j) == s.max ? missing - total * (s.rest * s.inverse) : total * s.p(row, 0, j) - t;
  }
};

template <class Row> ATLAS_HD typename Row::V soft_cross_entropy(Row& row, double smoothing, typename Row::V scale) {
  const Softmax<Row> s = softmax(row, 0);
  const Distribution<Row> target(s, row, smoothing);
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) row.gradient(0, j, target.to_ce(row, j) * scale);
  return target.ce;
}

// Two predictions beside each other; what is alike in them cancels before anything is rounded: logits of both where
// their largest are close, else each logit and the largest of its row.
template <class Row> struct Pair {
  using V = typename Row::V;
  const Softmax<Row>&p, &q;
  int p_slot, q_slot;
  V p_from, q_from, max_shift, log_shift;

  ATLAS_HD Pair(const Softmax<Row>& p, int p_slot, const Softmax<Row>& q, int q_slot)
      : p(p), q(q), p_slot(p_slot), q_slot(q_slot), max_shift(p.max - q.max), log_shift(p.log_sum - q.log_sum) {
    const auto close = (max_shift >= all<V>(-1)) & (max_shift <= all<V>(1));
    p_from = close ? V{} : p.max;
    q_from = close ? V{} : q.max;
    max_shift = close ? max_shift : V{};
  }

  // log p - log q, but for the sums of the powers.
  ATLAS_HD V ratio_of_powers(const Row& row, int64_t j) const {
    return ((row.logit(p_slot, j) - p_from) - (row.logit(q_slot, j) - q_from)) - max_shift;
  }

  // log p - log q.
  ATLAS_HD V log_ratio(const Row& row, int64_t j) const { return ratio_of_powers(row, j) - log_shift; }

  // From here on log_ratio is as precise as it is small: the sums are compared power by power where they are close.
  ATLAS_HD void look_closely(Row& row) {
    Total<V> more;
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V x = ratio_of_powers(row, j), from = row.power(q_slot, j, q.max);
      const V apart = row.power(p_slot, j, p.max) - from;
      more.add((x > all<V>(-0.5)) & (x < all<V>(0.5)) ? from * expm1(x) : apart);
    }
    const V share = more.over(row) * q.inverse;
    log_shift = (share > all<V>(-0.25)) & (share < all<V>(0.25)) ? log1p(share) : log_shift;
  }

  // q - p.
  ATLAS_HD V difference(const Row& row, int64_t j) const {
    const V plain = q.p(row, q_slot, j) - p.p(row, p_slot, j), others = p.rest * p.inverse - q.rest * q.inverse;
    return (row.logit(p_slot, j) == p.max) & (row.logit(q_slot, j) == q.max) ? others : plain;
  }

  // KL(p||q), and its derivative with respect to the logits of p; where KL is infinite, the limit as q goes to 0.
  ATLAS_HD V kl(Row& row) const {
    Total<V> sum;
    for (int64_t j = 0; j < row.vectors(); ++j) sum.add(weighted(p.p(row, p_slot, j), log_ratio(row, j)));
    return sum.over(row);
  }
  ATLAS_HD V kl_to_p(const Row& row, int64_t j, V kl) const {
    const V ratio = log_ratio(row, j);
    return weighted(p.p(row, p_slot, j), ratio == all<V>(HUGE_VALF) ? ratio : ratio - kl);
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
      if (row.wants(p_slot)) row.gradient(p_slot, j, times(scale, pair.kl_to_p(row, j, kl)));
      row.gradient(q_slot, j, to_q * scale);
    }
  return kl;
}

template <class Row>
ATLAS_HD typename Row::V trades(Row& row, typename Row::I label, double beta, typename Row::V scale) {
  using V = typename Row::V;
  const V b = all<V>(scalar_of<V>(beta)), kl_scale = scale * b;
  const Softmax<Row> p = softmax(row, 0), q = softmax(row, 1);
  const Target<Row> target(p, row, 0, label);
  const Pair<Row> pair(p, 0, q, 1);
  const V kl = pair.kl(row), value = target.ce + times(b, kl);
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V to_p = pair.kl_to_p(row, j, kl), to_q = pair.difference(row, j);
      row.gradient(0, j, target.to_ce(row, j) * scale + times(kl_scale, to_p));
      row.gradient(1, j, to_q * kl_scale);
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
  const Target<Row> clean(p, row, 0, label), target(q, row, 1, label), second(q, row, 1, other.index[0]);
  const V p_y = exp_of_negative(clean.logit - p.max) * p.inverse, weight = (T(1.0000001) - T(1)) + clean.missing;
  const V q_m = exp_of_negative(other.logit[0] - q.max) * q.inverse;
  const V room = T(1.0001 + 1e-12 - 1) + second.missing;
  const V value = target.ce - log(room) + b * kl * weight;
  const V push = q_m / room;
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V p_j = p.p(row, 0, j), q_j = q.p(row, 1, j), ratio = p_j * (q_j / (q_j + tiny));
      const V to_p = weighted(p_j, p.log_p(row, 0, j) - log(q_j + tiny) - kl);
      const V bce = target.to_ce(row, j) - push * second.to_ce(row, j);
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
// z_(1) - (z_(3) + z_(4)) / 2 + 1e-12. Both in halves, which stay finite.
template <bool Targeted, class Row>
ATLAS_HD typename Row::V dlr(Row& row, typename Row::I label, typename Row::I target, typename Row::V scale) {
  using V = typename Row::V;
  using I = typename Row::I;
  using T = scalar_of<V>;
  const T half = T(0.5), quarter = T(0.25);
  const Top<Targeted ? 4 : 3, Row> order = top<Targeted ? 4 : 3>(row, 0, all<I>(-1));
  const Top<1, Row> other = top<1>(row, 0, label);
  const I towards = Targeted ? target : other.index[0];
  const V z_other = Targeted ? row.at(0, target) : other.logit[0], nan = nan_of(row, 0);
  const V gap = row.at(0, label) * half - z_other * half + nan;
  // Two differences, each exact where the logits are close; their mean would be rounded before it is taken away.
  const V first = order.logit[0] * quarter;
  const V third_away = first - order.logit[2] * quarter, fourth_away = first - order.logit[Targeted ? 3 : 2] * quarter;
  const V range = third_away + fourth_away + T(0.5e-12), ratio = gap / range, scale_2 = scale * half;
  const V third = Targeted ? ratio * half : ratio;
  if (row.wants(0))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const I c = row.classes(j);
      V g = one_hot<Row>(c, order.index[0], ratio) - one_hot<Row>(c, order.index[2], third) + nan;
      if constexpr (Targeted) g = g - one_hot<Row>(c, order.index[3], third);
      row.gradient(0, j, times(scale_2, (one_hot<Row>(c, towards) - one_hot<Row>(c, label) + g) / range));
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

// d squared_distance / d(logits of a) times a scale. In halves, which stay finite.
template <class Row>
ATLAS_HD typename Row::V pairing_gradient(const Row& row, int a, int b, int64_t j, typename Row::V scale) {
  using T = scalar_of<typename Row::V>;
  return times(scale * T(4), row.logit(a, j) * T(0.5) - row.logit(b, j) * T(0.5));
}

template <class Row> ATLAS_HD typename Row::V logit_pairing(Row& row, typename Row::V scale) {
  using V = typename Row::V;
  const V value = squared_distance(row, 0, 1);
  if (row.wants(0) || row.wants(1))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      const V d = pairing_gradient(row, 0, 1, j, scale);
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

// The batches that the logits hold, in `neighbours` those beside [x;] adv. REFUSED: they are no whole ones.
ATLAS_HD int count_parts(AtlasLosses& p, int& parts) {
  parts = 1;
  if (p.batch < 0 || p.classes < 1) return ATLAS_BAD_SIZE;
  if (p.dtype < kFloat32 || p.dtype > kBFloat16) return ATLAS_BAD_DTYPE;
  if (p.loss == ATLAS_LOSS_consistency_loss) {
    const bool known = p.distance >= ATLAS_DISTANCE_LOGIT && p.distance <= ATLAS_DISTANCE_KL;
    return known && (p.labels || p.distributions || !p.batch) ? ATLAS_OK : ATLAS_REFUSED;
  }
  if (p.loss != ATLAS_LOSS_atlas_loss) return ATLAS_OK;
  const int64_t least = p.global_term == ATLAS_TERM_NONE ? 1 : 2, batches = p.batch ? p.rows / p.batch : least;
  p.neighbours = batches - least;
  parts = int(batches);
  if (p.local < ATLAS_TERM_KL || p.local > ATLAS_TERM_NONE) return ATLAS_REFUSED;
  if (p.global_term < ATLAS_TERM_KL || p.global_term > ATLAS_TERM_NONE) return ATLAS_REFUSED;
  const bool whole = batches >= least && batches <= INT32_MAX && batches * p.batch == p.rows;
  return whole && (p.local != ATLAS_TERM_NONE || p.neighbours == 0) ? ATLAS_OK : ATLAS_REFUSED;
}

template <class Row> struct AtlasParts { typename Row::V adv, local, global; };

// What consistency_loss multiplies its distance by: a number, or one on the device.
template <class T> ATLAS_HD T distance_weight(const AtlasLosses& p) {
  return p.distance_weight.per_row ? *static_cast<const T*>(p.distance_weight.per_row) : T(p.distance_weight.value);
}

template <class Row>
ATLAS_HD AtlasParts<Row> atlas_loss(Row& row, typename Row::I label, const AtlasTerms& terms, typename Row::V scale) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  const int adv = terms.global == ATLAS_TERM_NONE ? 0 : 1, first = adv + 1, end = first + int(terms.neighbours);
  const T count = T(terms.neighbours);
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
      parts.local = parts.local + squared_distance(row, adv, k) / count;
      continue;
    }
    const Softmax<Row> r = softmax(row, k);
    const Pair<Row> ball(q, adv, r, k);
    const Target<Row> near(r, row, k, label);
    parts.local = parts.local + (terms.local == ATLAS_TERM_KL ? ball.kl(row) : near.ce) / count;
    if (row.wants(k))
      for (int64_t j = 0; j < row.vectors(); ++j) {
        const V pull = terms.local == ATLAS_TERM_KL ? ball.difference(row, j) : near.to_ce(row, j);
        row.gradient(k, j, pull * local_scale);
      }
  }

  if (row.wants(adv))
    for (int64_t j = 0; j < row.vectors(); ++j) {
      V to_adv = target.to_ce(row, j) * scale;
      if (terms.local == ATLAS_TERM_LOGIT)
        for (int k = first; k < end; ++k) {
          const V d = pairing_gradient(row, k, adv, j, local_scale);
          row.gradient(k, j, d);
          to_adv = to_adv - d;
        }
      if (terms.global == ATLAS_TERM_KL) {
        const V to_p = pair.kl_to_p(row, j, parts.global);
        to_adv = to_adv + pair.difference(row, j) * global_scale;
        row.gradient(0, j, times(global_scale, to_p));
      } else if (terms.global == ATLAS_TERM_CE) {
        row.gradient(0, j, clean.to_ce(row, j) * global_scale);
      } else if (terms.global == ATLAS_TERM_LOGIT) {
        const V d = pairing_gradient(row, 0, adv, j, global_scale);
        row.gradient(0, j, d);
        to_adv = to_adv - d;
      }
      row.gradient(adv, j, to_adv);
    }
  return parts;
}

// One class in two predictions, p and q with the mean m, of log p - log q: nothing of it cancels where p is close to q.
template <class V> struct Twins {
  V p, q, signed_share;  // (p - q) / (p + q)
  V log_p, log_q;        // log(p / m), log(q / m)

  ATLAS_HD Twins(V p, V q, V ratio) : p(p), q(q) {
    using T = scalar_of<V>;
    const auto more = ratio > V{};  // is p the larger one?
    const V away = more ? ratio : -ratio, less = expm1(-away);
    const V share = -less / (less + T(2)), larger = -log1p(less * T(0.5)), smaller = larger - away;
    signed_share = more ? share : -share;
    log_p = more ? larger : smaller;
    log_q = more ? smaller : larger;
  }

  ATLAS_HD V difference() const { return weighted(p + q, signed_share); }

  // (p log(p/m) + q log(q/m)) / 2 = (p + q) / 4 ((1 + u) log(1 + u) + (1 - u) log(1 - u)), u the signed share; of a small
  // one by the series of that.
  ATLAS_HD V divergence() const {
    using T = scalar_of<V>;
    constexpr int kTerms = sizeof(T) == 8 ? 13 : 6;
    const V square = signed_share * signed_share;
    V series = {};
    for (int k = kTerms; k > 0; --k) series = series * square + T(1.0 / (k * (2 * k - 1)));
    const V near = (p + q) * T(0.25) * square * series, apart = (weighted(p, log_p) + weighted(q, log_q)) * T(0.5);
    return square < all<V>(T(0.0625)) ? near : apart;
  }
};

// Jensen-Shannon, or the squared distance, of the probabilities in slot 1 and in slot 0, whose CE has the gradient that
// is added. Both pull a probability by an amount less the mean of all amounts, each side by its own probabilities.
template <bool Js, class Row>
ATLAS_HD typename Row::V distance_of_twins(Row& row, const Softmax<Row>& o, const Softmax<Row>& q,
                                           const Distribution<Row>& target, typename Row::V scale,
                                           typename Row::V tie_scale) {
  using V = typename Row::V;
  Pair<Row> pair(o, 1, q, 0);
  pair.look_closely(row);
  Total<V> sum, o_sum, q_sum;
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const Twins<V> twins(o.p(row, 1, j), q.p(row, 0, j), pair.log_ratio(row, j));
    const V d = twins.difference();
    sum.add(Js ? twins.divergence() : d * d);
    o_sum.add(weighted(twins.p, Js ? twins.log_p : d));
    q_sum.add(weighted(twins.q, Js ? twins.log_q : -d));
  }
  const V o_mean = o_sum.over(row), q_mean = q_sum.over(row), pull = tie_scale * scalar_of<V>(Js ? 0.5 : 2);
  const bool wanted = row.wants(0) || row.wants(1);
  for (int64_t j = 0; wanted && j < row.vectors(); ++j) {
    const Twins<V> twins(o.p(row, 1, j), q.p(row, 0, j), pair.log_ratio(row, j));
    const V d = twins.difference(), to_ce = target.to_ce(row, j) * scale;
    row.gradient(0, j, to_ce + pull * weighted(twins.q, (Js ? twins.log_q : -d) - q_mean));
    row.gradient(1, j, pull * weighted(twins.p, (Js ? twins.log_p : d) - o_mean));
  }
  return sum.over(row);
}

// CE of slot 0 + weight * distance of slot 1 and slot 0, as parts `adv` and `local`.
template <class Row>
ATLAS_HD AtlasParts<Row> consistency_loss(Row& row, const AtlasLosses& p, typename Row::V scale) {
  using V = typename Row::V;
  const V tie_scale = scale * distance_weight<scalar_of<V>>(p);
  const Softmax<Row> q = softmax(row, 0);
  const Distribution<Row> target(q, row, p.parameter);
  AtlasParts<Row> parts = {target.ce, V{}, V{}};
  const bool wanted = row.wants(0) || row.wants(1);
  if (p.distance == ATLAS_DISTANCE_LOGIT) {
    parts.local = squared_distance(row, 0, 1);
    for (int64_t j = 0; wanted && j < row.vectors(); ++j) {
      const V d = pairing_gradient(row, 0, 1, j, tie_scale), to_ce = target.to_ce(row, j) * scale;
      row.gradient(0, j, to_ce + d);
      row.gradient(1, j, -d);
    }
    return parts;
  }
  const Softmax<Row> o = softmax(row, 1);
  if (p.distance == ATLAS_DISTANCE_KL) {
    const Pair<Row> pair(o, 1, q, 0);
    const V kl = parts.local = pair.kl(row);
    for (int64_t j = 0; wanted && j < row.vectors(); ++j) {
      const V to_o = pair.kl_to_p(row, j, kl), to_q = pair.difference(row, j), to_ce = target.to_ce(row, j) * scale;
      row.gradient(0, j, to_ce + to_q * tie_scale);
      row.gradient(1, j, times(tie_scale, to_o));
    }
  } else if (p.distance == ATLAS_DISTANCE_JS) {
    parts.local = distance_of_twins<true>(row, o, q, target, scale, tie_scale);
  } else {
    parts.local = distance_of_twins<false>(row, o, q, target, scale, tie_scale);
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
    case ATLAS_LOSS_cross_entropy: return alone<Row>(cross_entropy(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_kl_div: return alone<Row>(kl_div(row, 0, 1, scale));
    case ATLAS_LOSS_trades_loss: return alone<Row>(trades(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_mart_loss: return alone<Row>(mart(row, row.label(), p.parameter, scale));
    case ATLAS_LOSS_entropy: return alone<Row>(entropy(row, scale));
    case ATLAS_LOSS_margin_loss: return alone<Row>(margin(row, row.label(), scale));
    case ATLAS_LOSS_dlr_loss:
      return alone<Row>(p.targets ? dlr<true>(row, row.label(), row.target(), scale)
                                  : dlr<false>(row, row.label(), row.label(), scale));
    case ATLAS_LOSS_logit_pairing: return alone<Row>(logit_pairing(row, scale));
    case ATLAS_LOSS_soft_cross_entropy: return alone<Row>(soft_cross_entropy(row, p.parameter, scale));
    case ATLAS_LOSS_consistency_loss: return consistency_loss(row, p, scale);
    default:
      return atlas_loss(row, row.label(), {p.local, p.global_term, p.neighbours, p.local_weight, p.global_weight}, scale);
  }
}

// What that row weighs in the sum, of what `loss_of` gave.
template <class Row>
ATLAS_HD typename Row::V value_of(const Row& row, const AtlasLosses& p, const AtlasParts<Row>& parts) {
  using V = typename Row::V;
  using T = scalar_of<V>;
  if (p.loss == ATLAS_LOSS_consistency_loss)
    return times(row.weight(), parts.adv + times(all<V>(distance_weight<T>(p)), parts.local));
  if (p.loss != ATLAS_LOSS_atlas_loss) return times(row.weight(), parts.adv);
  const V local = times(all<V>(T(p.local_weight)), parts.local);
  return times(row.weight(), parts.adv + local + times(all<V>(T(p.global_weight)), parts.global));
}

}  // namespace atlas
