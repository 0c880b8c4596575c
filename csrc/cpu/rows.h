// The Row (core/rows.h) of a CPU. Few classes: the lanes are rows, which are transposed into the scratch memory; many:
// the lanes are neighbouring classes of one row. Either way the algorithms see fp32 or fp64 in aligned, padded vectors,
// and leave the gradients where the logits were.
#pragma once
#include <cstdlib>

#include "../api.h"
#include "../core/rows.h"
#include "lanes.h"

namespace atlas::cpu {

constexpr int64_t kFewClasses = 64;  // from here on a row fills vectors of its own

// The logits of a loss, each [batch, classes], and where their gradients go. `parts`: batches in one tensor.
struct RowSlots {
  static constexpr int kTensors = 2;
  const void* logits[kTensors];
  void* gradients[kTensors];
  int64_t batch, classes;
  int parts;  // slots that the first tensor holds; each other tensor is one more slot
  int32_t dtype;

  ATLAS_HD int count() const { return parts + (logits[1] != nullptr); }
  ATLAS_HD int tensor(int slot) const { return slot >= parts; }
  ATLAS_HD int64_t offset(int slot, int64_t row) const { return ((slot < parts ? slot : 0) * batch + row) * classes; }
};

// Memory that a thread keeps for its rows.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, size_);
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

inline thread_local Scratch row_scratch;

template <class Number, class S> ATLAS_HD void copy_rows(Number* to, const S* from, int64_t rows, int64_t classes, int lanes) {
  if (lanes == 1) {
    ATLAS_IVDEP for (int64_t c = 0; c < classes; ++c) to[c] = convert<Number>(from[c]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c) to[c * lanes + r] = convert<Number>(from[r * classes + c]);
}

template <class Number, class S> ATLAS_HD void copy_back(S* to, const Number* from, int64_t rows, int64_t classes, int lanes) {
  if (lanes == 1) {
    ATLAS_IVDEP for (int64_t c = 0; c < classes; ++c) to[c] = convert<S>(from[c]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c) to[r * classes + c] = convert<S>(from[c * lanes + r]);
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

  // Logits and powers, slot by slot.
  static size_t scratch_bytes(const RowSlots& slots) { return 2 * slots.count() * vectors_of(slots) * sizeof(V); }

  // Rows from `first` on, before `end`.
  ATLAS_HD Row(const RowSlots& slots, void* scratch, int64_t first, int64_t end)
      : slots_(slots), logits_(static_cast<V*>(scratch)), first_(first),
        rows_(end - first < kRows ? end - first : kRows), vectors_(vectors_of(slots)) {
    powers_ = logits_ + slots.count() * vectors_;
    for (int l = 0; l < kCount; ++l) lane_[l] = l;
    for (int slot = 0; slot < slots.count(); ++slot) {
      V* to = logits_ + slot * vectors_;
      if (LanesAreRows && rows_ < kRows)
        for (int64_t j = 0; j < vectors_; ++j) to[j] = V{};
      if (!LanesAreRows) to[vectors_ - 1] = all<V>(-HUGE_VALF);
      with_dtype(slots.dtype, [&](auto stored) ATLAS_INLINE_LAMBDA {
        using S = decltype(stored);
        copy_rows(reinterpret_cast<T*>(to), static_cast<const S*>(slots.logits[slots.tensor(slot)]) + slots.offset(slot, first),
                  rows_, slots.classes, kRows);
      });
    }
  }

  // Writes the gradients that were given.
  ATLAS_HD void finish() const {
    for (int slot = 0; slot < slots_.count(); ++slot)
      if (wants(slot))
        with_dtype(slots_.dtype, [&](auto stored) ATLAS_INLINE_LAMBDA {
          using S = decltype(stored);
          copy_back(static_cast<S*>(slots_.gradients[slots_.tensor(slot)]) + slots_.offset(slot, first_),
                    reinterpret_cast<const T*>(logits_ + slot * vectors_), rows_, slots_.classes, kRows);
        });
  }

  ATLAS_HD int64_t vectors() const { return vectors_; }
  ATLAS_HD Index count() const { return Index(slots_.classes); }
  ATLAS_HD I classes(int64_t j) const { return LanesAreRows ? all<I>(Index(j)) : lane_ + Index(j * kCount); }
  ATLAS_HD V logit(int slot, int64_t j) const { return logits_[slot * vectors_ + j]; }
  ATLAS_HD V power(int slot, int64_t j, V) const { return powers_[slot * vectors_ + j]; }
  ATLAS_HD V keep_power(int slot, int64_t j, V max) { return powers_[slot * vectors_ + j] = exp(logit(slot, j) - max); }
  ATLAS_HD bool wants(int slot) const { return slots_.gradients[slots_.tensor(slot)] != nullptr; }
  ATLAS_HD void gradient(int slot, int64_t j, V g) { logits_[slot * vectors_ + j] = g; }

  ATLAS_HD V at(int slot, I label) const {
    const T* logits = reinterpret_cast<const T*>(logits_ + slot * vectors_);
    V z;
    for (int l = 0; l < kCount; ++l) {
      const int64_t c = label[l];
      z[l] = c >= 0 && c < slots_.classes ? logits[LanesAreRows ? c * kCount + l : c] : T(NAN);
    }
    return z;
  }

  ATLAS_HD V sum(V v) const {
    return LanesAreRows ? v : fold(v, [](V a, V b) ATLAS_INLINE_LAMBDA { return a + b; });
  }
  ATLAS_HD V max(V v) const {
    return LanesAreRows ? v : fold(v, [](V a, V b) ATLAS_INLINE_LAMBDA { return a > b ? a : b; });
  }
  ATLAS_HD I min(I i) const {
    return LanesAreRows ? i : fold(i, [](I a, I b) ATLAS_INLINE_LAMBDA { return a < b ? a : b; });
  }

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
  static ATLAS_HD int64_t vectors_of(const RowSlots& slots) {
    return LanesAreRows ? slots.classes : (slots.classes + kCount - 1) / kCount;
  }

  const RowSlots& slots_;
  V *logits_, *powers_;
  I lane_;
  int64_t first_, rows_, vectors_;
};

// Rows that make up what a thread must do to be worth waking.
inline int64_t rows_grain(const RowSlots& slots) { return 16384 / (slots.classes * slots.count()) + 1; }

}  // namespace atlas::cpu
