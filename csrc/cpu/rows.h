// The Row (core/rows.h) of a CPU. Few classes: the lanes are rows, which are transposed into the scratch memory; many:
// the lanes are neighbouring classes of one row. Either way the algorithms see fp32 or fp64 in aligned, padded vectors,
// and leave the gradients where the logits were.
#pragma once
#include <type_traits>

#include "../core/rows.h"
#include "lanes.h"
#include "slots.h"

namespace atlas::cpu {

// One row of logits as vectors, and back.
template <class To, class From> ATLAS_HD void copy_row(To* to, const From* from, int64_t classes) {
  ATLAS_IVDEP for (int64_t c = 0; c < classes; ++c) to[c] = convert<To>(from[c]);
}

// Rows into lanes and back, number by number.
template <class V, class S> ATLAS_HD void into_lanes(V* to, const S* from, int64_t rows, int64_t classes) {
  using T = scalar_of<V>;
  constexpr int kCount = sizeof(V) / sizeof(T);
  T* const numbers = reinterpret_cast<T*>(to);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c) numbers[c * kCount + r] = convert<T>(from[r * classes + c]);
}
template <class V, class S> ATLAS_HD void out_of_lanes(S* to, const V* from, int64_t rows, int64_t classes) {
  using T = scalar_of<V>;
  constexpr int kCount = sizeof(V) / sizeof(T);
  const T* const numbers = reinterpret_cast<const T*>(from);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c) to[r * classes + c] = convert<S>(numbers[c * kCount + r]);
}

// The same for as many rows as lanes that need no conversion, in squares. A vector may reach into the next row, but not
// beyond the last one.
template <class V> ATLAS_HD void squares_into_lanes(V* to, const scalar_of<V>* from, int64_t classes) {
  constexpr int kCount = sizeof(V) / sizeof(scalar_of<V>);
  for (int64_t first = 0; first < classes; first += kCount) {
    const int64_t width = classes - first < kCount ? classes - first : kCount;
    V square[kCount];
    ATLAS_UNROLL for (int r = 0; r < kCount; ++r) {
      const int64_t begin = r * classes + first;
      if (begin + kCount <= kCount * classes) {
        memcpy(&square[r], from + begin, sizeof(V));
      } else {
        scalar_of<V> part[kCount] = {};
        for (int64_t c = 0; c < width; ++c) part[c] = from[begin + c];
        memcpy(&square[r], part, sizeof(V));
      }
    }
    transpose<kCount / 2>(square);
    ATLAS_UNROLL for (int c = 0; c < kCount; ++c)
      if (c < width) to[first + c] = square[c];
  }
}
template <class V> ATLAS_HD void squares_out_of_lanes(scalar_of<V>* to, const V* from, int64_t classes) {
  constexpr int kCount = sizeof(V) / sizeof(scalar_of<V>);
  for (int64_t first = 0; first < classes; first += kCount) {
    const int64_t width = classes - first < kCount ? classes - first : kCount;
    V square[kCount];
    ATLAS_UNROLL for (int c = 0; c < kCount; ++c) square[c] = c < width ? from[first + c] : V{};
    transpose<kCount / 2>(square);
    ATLAS_UNROLL for (int r = 0; r < kCount; ++r) {  // what reaches into the next row is written over by it
      const int64_t begin = r * classes + first;
      if (width == kCount || (classes <= kCount && begin + kCount <= kCount * classes))
        memcpy(to + begin, &square[r], sizeof(V));
      else
        memcpy(to + begin, &square[r], size_t(width) * sizeof(scalar_of<V>));
    }
  }
}

// Calls function(S()) for the dtype's type S.
template <class Function> ATLAS_HD void with_dtype(int32_t dtype, Function&& function) {
  switch (dtype) {
    case kFloat32: return function(float());
    case kFloat64: return function(double());
    case kFloat16: return function(half_t());
    default: return function(bfloat16_t());
  }
}

// LanesAreRows: `lanes` rows at once from `first` on, else the one row `first`.
template <class T, Isa isa, bool LanesAreRows> class Row {
 public:
  static constexpr int kCount = kLanes<T, isa>;
  using V = typename vector<T, kCount>::type;
  using I = int_of<V>;
  using Index = scalar_of<I>;
  static constexpr int kRows = LanesAreRows ? kCount : 1;

  // For logits and powers, slot by slot; then for the shares.
  static ATLAS_HD int64_t scratch_bytes(const RowSlots& slots) {
    return (2 * slots.count() + (slots.shares != nullptr)) * vectors_of(slots) * int64_t(sizeof(V));
  }

  // Rows from `first` on, before `end`.
  ATLAS_HD Row(const RowSlots& slots, void* scratch, int64_t first, int64_t end)
      : slots_(slots), logits_(static_cast<V*>(scratch)), first_(first),
        rows_(end - first < kRows ? end - first : kRows), vectors_(vectors_of(slots)) {
    powers_ = logits_ + slots.count() * vectors_;
    shares_ = powers_ + slots.count() * vectors_;
    for (int l = 0; l < kCount; ++l) lane_[l] = l;
    for (int slot = 0; slot < slots.count(); ++slot)
      with_dtype(slots.dtype, [&](auto stored) ATLAS_INLINE_LAMBDA {
        using S = decltype(stored);
        const S* from = static_cast<const S*>(slots.logits[slots.tensor(slot)]) + slots.offset(slot, first);
        read(logits_ + slot * vectors_, from, T(-HUGE_VALF));
      });
    if (slots.shares) read(shares_, static_cast<const T*>(slots.shares) + first * slots.classes, T(0));
  }

  // Writes the gradients that were given.
  ATLAS_HD void finish() const {
    for (int slot = 0; slot < slots_.count(); ++slot)
      if (wants(slot))
        with_dtype(slots_.dtype, [&](auto stored) ATLAS_INLINE_LAMBDA {
          using S = decltype(stored);
          S* to = static_cast<S*>(slots_.gradients[slots_.tensor(slot)]) + slots_.offset(slot, first_);
          const V* from = logits_ + slot * vectors_;
          if constexpr (!LanesAreRows) return copy_row(to, reinterpret_cast<const T*>(from), slots_.classes);
          if constexpr (std::is_same_v<S, T>)
            if (rows_ == kRows) return squares_out_of_lanes(to, from, slots_.classes);
          out_of_lanes(to, from, rows_, slots_.classes);
        });
  }

  ATLAS_HD int64_t vectors() const { return vectors_; }
  ATLAS_HD Index count() const { return Index(slots_.classes); }
  ATLAS_HD I classes(int64_t j) const { return LanesAreRows ? all<I>(Index(j)) : lane_ + Index(j * kCount); }
  ATLAS_HD V logit(int slot, int64_t j) const { return logits_[slot * vectors_ + j]; }
  ATLAS_HD V power(int slot, int64_t j, V) const { return powers_[slot * vectors_ + j]; }
  ATLAS_HD V keep_power(int slot, int64_t j, V max) {
    return powers_[slot * vectors_ + j] = exp_of_negative(logit(slot, j) - max);
  }
  ATLAS_HD bool wants(int slot) const { return slots_.gradients[slots_.tensor(slot)] != nullptr; }
  ATLAS_HD void gradient(int slot, int64_t j, V g) { logits_[slot * vectors_ + j] = g; }
  ATLAS_HD bool has_shares() const { return slots_.shares != nullptr; }
  ATLAS_HD V share(int64_t j) const { return shares_[j]; }

  ATLAS_HD V at(int slot, I label) const {
    const T* logits = reinterpret_cast<const T*>(logits_ + slot * vectors_);
    V z = {};
    for (int l = 0; l < kCount; ++l) {
      const int64_t c = label[l];
      z[l] = c >= 0 && c < slots_.classes ? logits[LanesAreRows ? c * kCount + l : c] : T(NAN);
    }
    return z;
  }

  ATLAS_HD V sum(V v) const { return over_lanes<Sum>(v); }
  ATLAS_HD V max(V v) const { return over_lanes<Max>(v); }
  ATLAS_HD I min(I i) const { return over_lanes<Min>(i); }

  // What every row has one of: from memory into lanes and back. A lane without a row gets `otherwise`.
  template <class S> ATLAS_HD V numbers(const S* values, T otherwise) const {
    V v = all<V>(otherwise);
    if (values)
      for (int l = 0; l < kCount; ++l)
        if (!LanesAreRows || l < rows_) v[l] = values[first_ + (LanesAreRows ? l : 0)];
    return v;
  }
  // -1 for what is no class.
  ATLAS_HD I labels(const int64_t* values) const {
    I v = all<I>(-1);
    if (values)
      for (int l = 0; l < kCount; ++l)
        if (!LanesAreRows || l < rows_) {
          const int64_t c = values[first_ + (LanesAreRows ? l : 0)];
          v[l] = Index(c >= 0 && c < slots_.classes ? c : -1);
        }
    return v;
  }
  template <class S> ATLAS_HD void write(S* values, V v) const {
    for (int64_t r = 0; r < rows_; ++r) values[first_ + r] = v[r];
  }
  ATLAS_HD int64_t rows() const { return rows_; }

 private:
  // The rows of one tensor, from the first of them on, as vectors; `beyond` the last class.
  template <class S> ATLAS_HD void read(V* to, const S* from, T beyond) const {
    if (LanesAreRows && rows_ < kRows)
      for (int64_t j = 0; j < vectors_; ++j) to[j] = V{};
    if (!LanesAreRows) to[vectors_ - 1] = all<V>(beyond);
    if constexpr (!LanesAreRows) return copy_row(reinterpret_cast<T*>(to), from, slots_.classes);
    if constexpr (std::is_same_v<S, T>)
      if (rows_ == kRows) return squares_into_lanes(to, from, slots_.classes);
    into_lanes(to, from, rows_, slots_.classes);
  }

  template <class Combine, class W> static ATLAS_HD W over_lanes(W w) {
    if constexpr (LanesAreRows) return w;
    else return fold<Combine>(w);
  }

  static ATLAS_HD int64_t vectors_of(const RowSlots& slots) {
    return LanesAreRows ? slots.classes : (slots.classes + kCount - 1) / kCount;
  }

  const RowSlots& slots_;
  V *logits_, *powers_, *shares_;
  I lane_ = {};
  int64_t first_, rows_, vectors_;
};

}  // namespace atlas::cpu
