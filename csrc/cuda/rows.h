// The Row (core/rows.h) of a GPU: every thread is a lane. A row has a part of a warp, or a block if it has many
// classes; its lanes read neighbouring classes. Nothing is kept of a row: what is read again comes from L1, and a power
// is computed again.
#pragma once
#include <type_traits>

#include "../core/rows.h"
#include "../core/slots.h"
#include "launch.h"
#include "reduce.h"

namespace atlas::cuda {

constexpr int kBlockBits = 7, kRowThreads = 1 << kBlockBits;
constexpr int64_t kManyClasses = 512;  // beyond, a row has a block

// A row has 2^bits lanes: while a warp has room, each takes one or two classes. Only the classes decide, so that a
// row's result does not depend on its batch.
inline int lane_bits(int64_t classes) {
  if (classes > kManyClasses) return kBlockBits;
  int bits = 0;
  while (bits < 5 && int64_t(2) << bits < classes) ++bits;
  return bits;
}

// S: float, double, or half_t for both 16-bit types.
template <class S, bool Block> class Row {
 public:
  using V = std::conditional_t<sizeof(S) == 8, double, float>;
  using I = int_of<V>;

  // Threads beyond the last row compute it too, since all take part in the folds, but write nothing.
  __device__ Row(const RowSlots& slots, int lane_bits) : slots_(slots), bits_(Block ? kBlockBits : lane_bits) {
    const int64_t thread = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
    lane_ = I(thread & ((1 << bits_) - 1));
    row_ = thread >> bits_;
    exists_ = row_ < slots_.batch;
    if (!exists_) row_ = slots_.batch - 1;
  }

  __device__ int64_t vectors() const { return ((slots_.classes - 1) >> bits_) + 1; }
  __device__ I count() const { return I(slots_.classes); }
  __device__ I classes(int64_t j) const { return (I(j) << bits_) + lane_; }
  __device__ V logit(int slot, int64_t j) const {
    return classes(j) < count() ? read(slot, classes(j)) : V(-HUGE_VALF);
  }
  __device__ V power(int slot, int64_t j, V max) const { return exp_of_negative(logit(slot, j) - max); }
  __device__ V keep_power(int slot, int64_t j, V max) const { return power(slot, j, max); }
  __device__ V at(int slot, I label) const { return label >= 0 && label < count() ? read(slot, label) : V(NAN); }

  __device__ V sum(V v) const { return fold<Sum>(v); }
  __device__ V max(V v) const { return fold<Max>(in_order(v)); }
  __device__ I min(I i) const { return fold<Min>(i); }

  __device__ bool wants(int slot) const { return slots_.gradients[slots_.tensor(slot)] != nullptr; }
  __device__ void gradient(int slot, int64_t j, V g) const {
    if (!wants(slot) || !exists_ || classes(j) >= count()) return;
    S& to = static_cast<S*>(slots_.gradients[slots_.tensor(slot)])[slots_.offset(slot, row_) + classes(j)];
    if constexpr (sizeof(S) > 2) to = g;
    else to.bits = slots_.dtype == kFloat16 ? to_half(g).bits : to_bfloat16(g).bits;
  }

  __device__ bool has_shares() const { return slots_.shares != nullptr; }
  __device__ V share(int64_t j) const {
    const I c = classes(j);
    return c < count() ? static_cast<const V*>(slots_.shares)[slots_.offset(0, row_) + c] : V{};
  }

  // What every row has one of; -1 for what is no class.
  __device__ V number(const void* values, V otherwise) const {
    return values ? static_cast<const V*>(values)[row_] : otherwise;
  }
  __device__ I label(const int64_t* labels) const {
    const int64_t c = labels ? labels[row_] : -1;
    return c >= 0 && c < slots_.classes ? I(c) : I(-1);
  }

  // Is this the thread that writes what its row has one of?
  __device__ bool writes() const { return exists_ && lane_ == 0; }
  __device__ int64_t row() const { return row_; }

 private:
  __device__ V read(int slot, I c) const {
    const S z = static_cast<const S*>(slots_.logits[slots_.tensor(slot)])[slots_.offset(slot, row_) + c];
    if constexpr (sizeof(S) > 2) return z;
    else return slots_.dtype == kFloat16 ? to_float(z) : to_float(bfloat16_t{z.bits});
  }

  template <class Fold, class T> __device__ T fold(T v) const {
    if constexpr (Block) return block_fold<Fold, kRowThreads>(v);
    else return warp_fold<Fold>(v, 1 << bits_);
  }

  const RowSlots& slots_;
  int bits_;
  I lane_;
  int64_t row_;
  bool exists_;
};

template <class Row> struct RowType { using type = Row; };

template <class S, class Function> int with_share(int64_t classes, Function&& function) {
  return classes > kManyClasses ? function(RowType<Row<S, true>>()) : function(RowType<Row<S, false>>());
}

// Calls function(RowType()) for the Row that the slots need.
template <class Function> int with_row(const RowSlots& slots, Function&& function) {
  if (slots.classes > INT32_MAX - kRowThreads) return ATLAS_BAD_SIZE;
  switch (slots.dtype) {
    case kFloat32: return with_share<float>(slots.classes, function);
    case kFloat64: return with_share<double>(slots.classes, function);
    default: return with_share<half_t>(slots.classes, function);
  }
}

}  // namespace atlas::cuda
