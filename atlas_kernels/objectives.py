"""What a gradient attack climbs, and the cotangent that it pulls back through the network.

A sign step needs only one vector-Jacobian product of the network with d(objective)/d(logits). ``attack_cotangent``
writes that in one pass over the logits: no loss, no graph, no mean over the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .checks import class_indices, dense_logits, flag, kind_of, require_choice, require_strided
from .layout import compute_dtype
from .losses import dlr_targets
from .schema import OBJECTIVES
from .transforms import followed, refuse_derivatives

_attack_cotangent = backends.caller("attack_cotangent")


class Cotangent(NamedTuple):
    """What ``attack_cotangent`` was asked for; the rest is None.

    cotangent: d(objective)/d(logits), [B, C] in the dtype of the logits. correct: bool [B], whether the largest logit
    (the first of equal ones) is the label's. value: the objective, float32 [B] (float64 for float64 logits).
    """

    cotangent: Tensor | None
    correct: Tensor | None
    value: Tensor | None


def attack_cotangent(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    objective: str = "ce",
    reference: Tensor | None = None,
    targets: Tensor | None = None,
    descend: bool = False,
    kappa: Tensor | None = None,
    return_cotangent: bool = True,
    return_correct: bool = False,
    return_value: bool = False,
) -> Cotangent:
    """Per sample: the derivative of an attack's objective with respect to the logits, and where the attack stands.

    Args:
        logits: float [B, C]. 16-bit logits are computed with in float32, but the cotangent is rounded to their dtype:
            in float16 that of a confident prediction is 0, so pass ``logits.float()`` and scale what comes before it is
            cast, as the attacks here do.
        labels: integers [B]; needed by every objective but "kl", by ``kappa`` and by ``return_correct``.
        objective: "ce", cross-entropy (cotangent p - onehot(y)); "kl", KL(softmax(reference) || softmax(logits))
            (p - p_ref); "margin", "dlr" and "dlr_targeted" as ``margin_loss`` and ``dlr_loss``, sources there.
        reference: logits [B, C] of the same dtype, a constant; for "kl".
        targets: integers [B], the classes to reach; for "dlr_targeted".
        descend: negate value and cotangent, so that a step up goes down.
        kappa: int64 [B], contiguous; where the prediction is right, 1 is added to it (GAIRAT's count; Zhang et al.
            2021, arXiv 2010.01736, algorithm 1).
        return_cotangent, return_correct, return_value: what to make.

    Nothing has a gradient; logits or a reference that forward mode or a transform of torch.func differentiates are
    refused, since the derivative would be 0 there. Raises ``TypeError``, ``ValueError`` and ``NotImplementedError``
    that name the argument.
    """
    logits = dense_logits("logits", logits)
    if followed(logits, reference):
        refuse_derivatives("attack_cotangent", {"logits": logits, "reference": reference})
    logits = logits.detach()
    require_choice("objective", objective, OBJECTIVES)
    descend, return_cotangent = flag("descend", descend), flag("return_cotangent", return_cotangent)
    return_correct, return_value = flag("return_correct", return_correct), flag("return_value", return_value)
    batch = logits.shape[0]
    if labels is not None:
        labels = class_indices("labels", labels, logits, logits.shape[1])
    elif objective != "kl" or kappa is not None or return_correct:
        raise ValueError('labels is missing: only objective="kl" without kappa and return_correct does without')
    if objective == "kl":
        if reference is None:
            raise ValueError('reference is missing: objective="kl" needs the logits to compare with')
        reference = dense_logits("reference", reference, "logits", logits).detach()
    elif reference is not None:
        raise ValueError(f'reference plays no part in objective="{objective}": use objective="kl"')
    if (targets is not None) != (objective == "dlr_targeted"):
        raise ValueError(f'targets and objective="dlr_targeted" go together, got objective="{objective}"')
    if objective.startswith("dlr"):
        assert labels is not None
        targets = dlr_targets(logits, labels, targets)
    if kappa is not None:
        _require_kappa(kappa, logits)
    cotangent = torch.empty_like(logits) if return_cotangent else None
    correct = torch.empty(batch, dtype=torch.bool, device=logits.device) if return_correct else None
    value = torch.empty(batch, dtype=compute_dtype(logits.dtype), device=logits.device) if return_value else None
    code = OBJECTIVES.index(objective)
    _attack_cotangent(logits, labels, targets, reference, code, descend, cotangent, correct, kappa, value)
    return Cotangent(cotangent, correct, value)


def _require_kappa(kappa: Tensor, logits: Tensor) -> None:
    if not isinstance(kappa, Tensor) or kappa.dtype != torch.int64:
        raise TypeError(f"kappa must be an int64 tensor, got {kind_of(kappa)}")
    require_strided("kappa", kappa)
    if kappa.shape != logits.shape[:1] or kappa.device != logits.device or not kappa.is_contiguous():
        raise ValueError(
            f"kappa is {list(kappa.shape)} with strides {kappa.stride()} on {kappa.device}, expected contiguous "
            f"[{logits.shape[0]}] on {logits.device}"
        )
