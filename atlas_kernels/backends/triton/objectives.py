"""The attacks' cotangents in Triton: the kernel of the losses, unweighted and with a sign."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...schema import OBJECTIVES
from . import Launch
from .losses import loss_launches
from .rows import meta

_LOSSES = dict(ce="cross_entropy", kl="kl_div", margin="margin_loss", dlr="dlr_loss", dlr_targeted="dlr_loss")


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The one kernel of the operator's arguments; none for an empty batch."""
    objective = OBJECTIVES[given["objective"]]
    tensors = {**given, "weight": -1.0 if given["descend"] else 1.0, "scale": 1.0, "grad": given["cotangent"]}
    if objective == "kl":
        logits, reference = given["logits"], given["reference"]
        tensors |= {"logits": reference, "adv_logits": logits, "grad": None, "adv_grad": given["cotangent"]}
    if objective != "dlr_targeted":
        tensors["targets"] = None
    return loss_launches(_LOSSES[objective], tensors)


def _example(objective: str, dtype: torch.dtype = torch.float32, *, classes: int = 10, batch: int = 128) -> Launch:
    """A launch on logits without memory behind them that makes everything."""
    z, y = meta((batch, classes), dtype), meta(batch, torch.int64)
    given = {
        "logits": z, "labels": y, "targets": y if objective == "dlr_targeted" else None,
        "reference": z if objective == "kl" else None, "objective": OBJECTIVES.index(objective), "descend": False,
        "cotangent": z, "correct": meta(batch, torch.bool), "kappa": y, "value": meta(batch),
    }  # fmt: skip
    return launches("attack_cotangent", given)[0]


VARIANTS: dict[str, Callable[[], Launch]] = {
    **{f"objective {name}": partial(_example, name) for name in OBJECTIVES},
    "objective ce, 1000 classes, bf16": partial(_example, "ce", torch.bfloat16, classes=1000),
    "objective kl, 1000 classes, fp16": partial(_example, "kl", torch.float16, classes=1000),
}
