"""The pairwise losses through the door."""

from __future__ import annotations

import torch

from ...core import core
from ...layout import compute_dtype
from ..door import DoorError, images, vector, where

_COLUMNS = 32  # kPairColumns of csrc/core/pairwise.h


def compactness(h, h_adv, labels, scale, squared, factor, value, total, grad, adv_grad):
    if h.ndim != 2:
        raise DoorError(f"h is {list(h.shape)}, expected [batch, features]")
    batch, features = h.shape
    device, dtype = h.device, compute_dtype(h.dtype)
    if h_adv.shape != h.shape or not scale:
        raise DoorError(f"h_adv is {list(h_adv.shape)}, h {list(h.shape)}; scale is {scale}")
    outputs = (("value", value, batch), ("total", total, 1), ("grad", grad, batch * features),
               ("adv_grad", adv_grad, batch * features))  # fmt: skip
    addresses = [0 if out is None else vector(name, out, size, dtype, device) for name, out, size in outputs]
    partial = torch.empty((-(-features // _COLUMNS), batch), dtype=torch.float64, device=device)
    core().pairwise(
        *images("h", h, h.shape, device), vector("h_adv", h_adv, h.numel(), h.dtype, device),
        vector("labels", labels, batch, torch.int64, device), *addresses, partial.data_ptr(), batch, features,
        1.0 - 1.0 / scale, factor, squared, *where(device),
    )  # fmt: skip
