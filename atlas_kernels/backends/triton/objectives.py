"""The attacks' cotangents in Triton: the kernel of the losses, unweighted and with a sign."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..door import DoorError
from . import Launch, launch
from .losses import CROSS_ENTROPY, DLR, KL_DIV, MARGIN, loss_plan
from .rows import meta

# Numbers as in csrc/api.h.
_LOSSES = {0: CROSS_ENTROPY, 1: KL_DIV, 2: MARGIN, 3: DLR, 4: DLR}
_KL, _DLR_TARGETED = 1, 4


def _plan(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value) -> Launch:
    loss = _LOSSES.get(objective)
    if loss is None or (labels is None and objective != _KL):
        raise DoorError(f"objective {objective} is unknown, or lacks labels")
    if (targets is None) == (objective == _DLR_TARGETED) or (reference is None) == (objective == _KL):
        raise DoorError(f"objective {objective} lacks its targets or reference, or has what it does not use")
    sign = -1.0 if descend else 1.0
    if objective == _KL:
        return loss_plan(
            reference, logits, labels, None, None, value, None, cotangent, correct, kappa, sign, 1.0, None, loss
        )
    return loss_plan(logits, None, labels, targets, None, value, cotangent, None, correct, kappa, sign, 1.0, None, loss)


def attack_cotangent(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value):
    plan = _plan(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value)
    if len(logits):
        launch(plan, logits.device)


def _example(objective: int, dtype: torch.dtype = torch.float32, *, classes: int = 10, batch: int = 128) -> Launch:
    """A launch on logits without memory behind them that makes everything."""
    z, y = meta((batch, classes), dtype), meta(batch, torch.int64)
    targets, reference = y if objective == _DLR_TARGETED else None, z if objective == _KL else None
    return _plan(z, y, targets, reference, objective, False, z, meta(batch, torch.bool), y, meta(batch))


_NAMES = ("ce", "kl", "margin", "dlr", "dlr_targeted")
VARIANTS: dict[str, Callable[[], Launch]] = {
    **{f"objective {name}": partial(_example, i) for i, name in enumerate(_NAMES)},
    "objective ce, 1000 classes, bf16": partial(_example, 0, torch.bfloat16, classes=1000),
    "objective kl, 1000 classes, fp16": partial(_example, 1, torch.float16, classes=1000),
}
