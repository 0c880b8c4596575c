"""An epoch under way: how far it is, and what its numbers will be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .options import plain


@dataclass
class Within:
    """What is done of an epoch, in whole batches; a checkpoint within the epoch keeps it.

    batches, images: so many were trained on, ``skipped`` of the batches left out. seconds: that they took, in all
    sessions of the run; waited: those without data. segment: as in ``segment.Segment``. lr, momentum: of the last
    step, where it was saved. saved: whether a checkpoint is of this epoch. steps: loss and metrics of each batch that
    counts.
    """

    batches: int = 0
    images: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    segment: float | None = None
    lr: float = 0.0
    momentum: float = 0.0
    saved: bool = False
    steps: list[dict[str, Tensor]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and of each metric a float32 tensor with a value for each step, on the CPU."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("saved", "steps")}
        names = self.steps[0] if self.steps else ()
        metrics = {name: torch.stack([step[name].detach().float() for step in self.steps]).cpu() for name in names}
        return numbers | {"metrics": metrics}


def restored(state: Mapping[str, Any], batches: int, device: torch.device, source: object) -> Within:
    """How far the epoch was in which the checkpoint was saved. Between two epochs nothing of the next one is done.

    batches: how many an epoch has. Raises ValueError for a checkpoint that was edited or damaged.
    """
    kept = state.get("within") or {"batches": 0}
    if state["step"] != state["epoch"] * batches + kept["batches"] or kept["batches"] > batches:
        where = f"batch {kept['batches']} of {batches} after" if kept["batches"] else "the end of"
        raise ValueError(
            f"{plain(source)}: step {state['step']} is not {where} epoch {state['epoch']}: edited or damaged"
        )
    if not kept["batches"]:
        return Within()
    metrics, counted = {**kept["metrics"]}, kept["batches"] - kept["skipped"]
    if any(values.shape != (counted,) for values in metrics.values()) or ("loss" in metrics) != (counted > 0):
        raise ValueError(f"{plain(source)}: within.metrics must have {counted} values of each: edited or damaged")
    columns = {name: values.to(device).unbind() for name, values in metrics.items()}
    steps = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Within(**{name: value for name, value in kept.items() if name != "metrics"}, saved=True, steps=steps)
