// Rows of logits. The algorithms are written over a Row, so that the same lines run as SIMD on a CPU and as threads on
// a GPU. A Row handles as many rows as it has lanes, or one row (or a few) with lanes of classes, and offers:
//   V, I                     numbers and class indices of all lanes: vectors on a CPU, one of each in a GPU's thread
//   int64_t vectors()        how many V a row takes
//   count(), I classes(j)    how many classes there are; those of V number j
//   V logit(slot, j)         slot: which of the loss's logits; -inf beyond the last class
//   V power(slot, j, max)    exp(logit - max); `keep_power` makes it, and remembers it where that is cheaper
//   V at(slot, label)        the logit of one class of each row; NaN where there is no such class
//   V sum(v), max(v), I min(i)   over the lanes of a row: all of them get the same bits. max: NaN is never larger
//   bool wants(slot), gradient(slot, j, g)   the last use of logit(slot, j)
//   bool has_shares(), V share(j)   the row's target distribution; 0 beyond the last class
#pragma once
#include "math.h"

namespace atlas {

constexpr int32_t kNoClass = INT32_MAX;

// A sum of many numbers, in runs: its error grows with the length of a run and their number, not with the product.
template <class V> struct Total {
  static constexpr int kRun = 64;
  V sum = {}, run = {};
  int length = 0;

  ATLAS_HD void add(V v) {
    run = run + v;
    if (++length == kRun) sum = sum + run, run = V{}, length = 0;
  }
  template <class Row> ATLAS_HD V over(Row& row) const { return row.sum(sum + run); }
};

template <class Row> struct Softmax {
  using V = typename Row::V;
  V max, rest, log_sum, inverse;  // rest: the sum of all powers but one that is 1, the largest logit's

  ATLAS_HD V p(const Row& row, int slot, int64_t j) const { return row.power(slot, j, max) * inverse; }
  ATLAS_HD V log_p(const Row& row, int slot, int64_t j) const { return row.logit(slot, j) - max - log_sum; }
  // 1 - p of one class, whose logit is given: exact where p is nearly 1.
  ATLAS_HD V one_minus_p(V logit) const {
    return logit == max ? rest * inverse : scalar_of<V>(1) - exp_of_negative(logit - max) * inverse;
  }
};

template <class Row> ATLAS_HD Softmax<Row> softmax(Row& row, int slot) {
  using V = typename Row::V;
  Softmax<Row> s;
  V largest = all<V>(-HUGE_VALF);
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const V z = row.logit(slot, j);
    largest = z > largest ? z : largest;
  }
  s.max = row.max(largest);
  Total<V> rest;
  V ties = {};
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const V e = row.keep_power(slot, j, s.max), z = row.logit(slot, j);
    rest.add(z == s.max ? V{} : e);
    ties = ties + (z == s.max ? e : V{});  // not 1: of infinite logits this is NaN
  }
  s.rest = rest.over(row) + (row.sum(ties) - scalar_of<V>(1));
  s.log_sum = log1p(s.rest);
  s.inverse = scalar_of<V>(1) / (scalar_of<V>(1) + s.rest);
  return s;
}

// NaN for a row with a NaN logit, else 0: for what looks at a few logits only.
template <class Row> ATLAS_HD typename Row::V nan_of(Row& row, int slot) {
  typename Row::V nan = {};
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const typename Row::V z = row.logit(slot, j);
    nan = z == z ? nan : z;
  }
  return row.sum(nan);
}

// The K largest logits, ties by class.
template <int K, class Row> struct Top {
  using V = typename Row::V;
  using I = typename Row::I;
  V logit[K];
  I index[K];

  ATLAS_HD void insert(V z, I c) {
    for (int k = 0; k < K; ++k) {
      const auto before = (z > logit[k]) | ((z == logit[k]) & (c < index[k]));
      const V z_k = logit[k];
      const I c_k = index[k];
      logit[k] = before ? z : z_k;
      index[k] = before ? c : c_k;
      z = before ? z_k : z;
      c = before ? c_k : c;
    }
  }
};

template <int K, class Row> ATLAS_HD Top<K, Row> empty_top() {
  Top<K, Row> top;
  for (int k = 0; k < K; ++k) {
    top.logit[k] = all<typename Row::V>(-HUGE_VALF);
    top.index[k] = all<typename Row::I>(kNoClass);
  }
  return top;
}

// Among all classes but `except`, which may be none.
template <int K, class Row> ATLAS_HD Top<K, Row> top(Row& row, int slot, typename Row::I except) {
  using V = typename Row::V;
  using I = typename Row::I;
  Top<K, Row> mine = empty_top<K, Row>(), found;
  for (int64_t j = 0; j < row.vectors(); ++j) {
    const I c = row.classes(j);
    const auto out = (c == except) | (c >= row.count());
    mine.insert(out ? all<V>(-HUGE_VALF) : row.logit(slot, j), out ? all<I>(kNoClass) : c);
  }
  // The lanes' own lists are merged: the best head wins and leaves its list.
  for (int k = 0; k < K; ++k) {
    found.logit[k] = row.max(mine.logit[0]);
    found.index[k] = row.min(mine.logit[0] == found.logit[k] ? mine.index[0] : all<I>(kNoClass));
    const auto won = mine.index[0] == found.index[k];
    for (int i = 0; i < K; ++i) {
      const V next = i + 1 < K ? mine.logit[i + 1] : all<V>(-HUGE_VALF);
      const I next_index = i + 1 < K ? mine.index[i + 1] : all<I>(kNoClass);
      mine.logit[i] = won ? next : mine.logit[i];
      mine.index[i] = won ? next_index : mine.index[i];
    }
  }
  return found;
}

}  // namespace atlas
