// Which logits a loss reads, and where their gradients go.
#pragma once
#include "platform.h"

namespace atlas {

// Each tensor is [batch, classes], but the first may hold several batches.
struct RowSlots {
  static constexpr int kTensors = 2;
  const void* logits[kTensors];
  void* gradients[kTensors];
  int64_t batch, classes;
  int parts;  // slots that the first tensor holds; each other tensor is one more slot
  int32_t dtype;
  const void* shares = nullptr;  // [batch, classes] in the compute type: target distributions

  ATLAS_HD int count() const { return parts + (logits[1] != nullptr); }
  ATLAS_HD int tensor(int slot) const { return slot >= parts; }
  ATLAS_HD int64_t offset(int slot, int64_t row) const { return ((slot < parts ? slot : 0) * batch + row) * classes; }
};

}  // namespace atlas
