"""What an attack climbs, and its derivative with respect to the logits, in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from ...schema import OBJECTIVES
from .losses import Softmax, ce_rows, dlr_rows, kl_rows, margin_rows

CE, KL, MARGIN, DLR, DLR_TARGETED = range(len(OBJECTIVES))


@torch.no_grad()
def attack_cotangent(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value):
    if objective == CE:
        loss, d = ce_rows(Softmax(logits), labels)
    elif objective == KL:
        loss, _, d = kl_rows(Softmax(reference), Softmax(logits))
    elif objective == MARGIN:
        loss, d = margin_rows(logits, labels)
    else:
        loss, d = dlr_rows(logits, labels, targets if objective == DLR_TARGETED else None)
    if value is not None:
        value.copy_(-loss if descend else loss)
    if cotangent is not None:
        cotangent.copy_(-d if descend else d)
    if labels is not None:
        right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
        if correct is not None:
            correct.copy_(right)
        if kappa is not None:
            kappa += right
