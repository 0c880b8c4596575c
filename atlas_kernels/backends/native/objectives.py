"""The attack objectives through the door."""

from __future__ import annotations

import torch

from ...core import core
from ...layout import compute_dtype
from ..door import DoorError, float_code, rows, where


def attack_cotangent(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value):
    if logits.ndim != 2 or not logits.shape[1]:
        raise DoorError(f"logits are {list(logits.shape)}, expected [batch, classes]")
    shape, dtype, device = logits.shape, logits.dtype, logits.device
    size = shape[:1]
    core().objectives(
        shape[0], shape[1], float_code("logits", logits),
        rows("logits", logits, shape, dtype, device),
        0 if reference is None else rows("reference", reference, shape, dtype, device),
        0 if labels is None else rows("labels", labels, size, torch.int64, device),
        0 if targets is None else rows("targets", targets, size, torch.int64, device),
        objective, descend,
        0 if cotangent is None else rows("cotangent", cotangent, shape, dtype, device),
        0 if correct is None else rows("correct", correct, size, torch.bool, device),
        0 if kappa is None else rows("kappa", kappa, size, torch.int64, device),
        0 if value is None else rows("value", value, size, compute_dtype(dtype), device),
        *where(device),
    )  # fmt: skip
