// The Row (core/rows.h) of a GPU: every thread is a lane. A row of few classes has a part of a warp, of more a warp, of
// many a block, and its lanes read neighbouring classes. Nothing is kept of a row: what is read again comes from L1, and
// a power is computed again.
#pragma once
#include <type_traits>

#include "../core/rows.h"
#include "../core/slots.h"
#include "launch.h"
#include "reduce.h"

namespace atlas::cuda {

constexpr int kRowThreads = 128;

// S: the type of logits and gradients in memory.
template <class S, int Lanes> class Row {
 public:
  using V = std::conditional_t<sizeof(S) == 8, double, float>;
  using I = int_of<V>;
  static constexpr int kLanes = Lanes;

  // Threads beyond the last row take part in the folds: they compute it too, but write nothing.
  __device__ explicit Row(const RowSlots& slots)
      : slots_(slots), lane_(I(threadIdx.x) % Lanes),
        row_(int64_t(blockIdx.x) * (kRowThreads / Lanes) + int64_t(threadIdx.x) / Lanes), exists_(row_ < slots.batch) {
    if (!exists_) row_ = slots.batch - 1;
  }

  __device__ int64_t vectors() const { return (slots_.classes + Lanes - 1) / Lanes; }
  __device__ I count() const { return I(slots_.classes); }
  __device__ I classes(int64_t j) const { return I(j) * Lanes + lane_; }
  __device__ V logit(int slot, int64_t j) const { return classes(j) < count() ? read(slot, classes(j)) : V(-HUGE_VAL); }
  __device__ V power(int slot, int64_t j, V max) const { return exp(logit(slot, j) - max); }
  __device__ V keep_power(int slot, int64_t j, V max) const { return power(slot, j, max); }
  __device__ V at(int slot, I label) const { return label >= 0 && label < count() ? read(slot, label) : V(NAN); }

  __device__ V sum(V v) const { return fold<Sum>(v); }
  __device__ V max(V v) const { return fold<Max>(in_order(v)); }
  __device__ I min(I i) const { return fold<Min>(i); }

  __device__ bool wants(int slot) const { return slots_.gradients[slots_.tensor(slot)] != nullptr; }
  __device__ void gradient(int slot, int64_t j, V g) const {
    if (!wants(slot) || !exists_ || classes(j) >= count()) return;
    static_cast<S*>(slots_.gradients[slots_.tensor(slot)])[slots_.offset(slot, row_) + classes(j)] = convert<S>(g);
  }

  // What every row has one of. -1 for what is no class.
  __device__ V number(const void* values, V otherwise) const {
    return values ? static_cast<const V*>(values)[row_] : otherwise;
  }
  __device__ I label(const int64_t* labels) const {
    const int64_t c = labels ? labels[row_] : -1;
    return c >= 0 && c < slots_.classes ? I(c) : I(-1);
  }

  // The one thread that writes what its row has one of.
  __device__ bool writes() const { return exists_ && lane_ == 0; }
  __device__ int64_t row() const { return row_; }

 private:
  __device__ V read(int slot, I c) const {
    return convert<V>(static_cast<const S*>(slots_.logits[slots_.tensor(slot)])[slots_.offset(slot, row_) + c]);
  }

  template <class Fold, class T> __device__ T fold(T v) const {
    if constexpr (Lanes == kRowThreads) return block_fold<Fold, Lanes>(v);
    else return warp_fold<Fold, Lanes>(v);
  }

  const RowSlots& slots_;
  I lane_;
  int64_t row_;
  bool exists_;
};

// Which Row a kernel is launched with, on as many threads as its rows need.
template <class S, int Lanes> struct RowKind {
  using Row = cuda::Row<S, Lanes>;
  static int64_t threads(int64_t batch) { return batch * Lanes; }
};

template <class S, class Function> int with_lanes(int64_t classes, Function&& function) {
  if (classes <= 32) return function(RowKind<S, 8>());
  if (classes <= 512) return function(RowKind<S, 32>());
  return function(RowKind<S, kRowThreads>());
}

// Calls function(RowKind()): the classes alone decide, so that a row's result does not depend on the batch.
template <class Function> int with_row(const RowSlots& slots, Function&& function) {
  if (slots.classes > INT32_MAX - kRowThreads) return ATLAS_BAD_SIZE;
  switch (slots.dtype) {
    case kFloat32: return with_lanes<float>(slots.classes, function);
    case kFloat64: return with_lanes<double>(slots.classes, function);
    case kFloat16: return with_lanes<half_t>(slots.classes, function);
    case kBFloat16: return with_lanes<bfloat16_t>(slots.classes, function);
    default: return ATLAS_BAD_DTYPE;
  }
}

}  // namespace atlas::cuda
