"""The attacks' cotangents in Triton: the kernel of the losses, unweighted and with a sign."""

from __future__ import annotations

from ..native.door import DoorError
from . import Launch, launch
from .losses import CROSS_ENTROPY, DLR, KL_DIV, MARGIN, loss_plan, require_outputs

# Numbers as in csrc/api.h.
_LOSSES = {0: CROSS_ENTROPY, 1: KL_DIV, 2: MARGIN, 3: DLR, 4: DLR}
_KL, _DLR_TARGETED = 1, 4


def _plan(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value) -> Launch:
    loss = _LOSSES.get(objective)
    if loss is None or (labels is None and objective != _KL):
        raise DoorError(f"objective {objective} is unknown, or lacks labels")
    if (targets is None) == (objective == _DLR_TARGETED) or (reference is None) == (objective == _KL):
        raise DoorError(f"objective {objective} lacks its targets or reference, or has what it does not use")
    pair = (reference, logits) if objective == _KL else (logits, None)
    gradients = (None, cotangent) if objective == _KL else (cotangent, None)
    sign = -1.0 if descend else 1.0
    return loss_plan(*pair, labels, targets, None, value, *gradients, correct, kappa, sign, 1.0, None, loss)


def attack_cotangent(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value):
    require_outputs(
        {"cotangent": cotangent, "correct": correct, "kappa": kappa, "value": value},
        logits=logits, labels=labels, targets=targets, reference=reference,
    )  # fmt: skip
    plan = _plan(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value)
    if len(logits):
        launch(plan, logits.device)
