"""Validation: accuracy on training images that are held out, which says which epoch's weights are the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import Execution
from atlas_kernels.attacks import PGD

from . import methods
from .data import in_order
from .deal import dealt
from .evaluate import evaluating, predict
from .machine import autocast
from .noise import noise_keys
from .run import Run

#: PGD-10 in two halves: five of the usual steps of PGD-5, eps / 2, then five of eps / 8 from where they end.
HALF, FINE, BATCH_SIZE = 5, 1 / 8, 250
STEPS = 2 * HALF


def withstood(
    run: Run, model: nn.Module, right: Tensor, x: Tensor, y: Tensor, ids: Tensor, key: Tensor, size: float | None = None
) -> Iterator[Tensor]:
    """Of the rows that are ``right``, which are so after five steps of PGD, and which after ten; bool [B] each.

    A network can hide from the first half, by bends within its long steps. The second half then finds what PGD with
    steps of eps / 4 finds in 20, and next to nothing in a network that does not hide.

    size: of all steps, in place of those.
    """
    adv, eps = x.clone(), run.config.eps
    for second, step_size in enumerate((size, FINE * eps if size is None else size)):
        rows = right.nonzero().squeeze(1)
        right = torch.zeros_like(right)
        if len(rows):
            start = adv[rows] if second else None
            attack = PGD(eps, step_size, HALF, norm=run.config.norm)
            adv[rows] = attack(model, x[rows], y[rows], start=start, key=key, ids=ids[rows])
            right[rows] = predict(model, adv[rows]) == y[rows]
        yield right


def validate(run: Run) -> dict[str, float]:
    """The accuracies of ``run.final_model``, the weights that are exported, on the held-out images: clean and, where
    the method trains against an attack, under the halves of PGD-10 (on images that are right clean, with the same noise
    every time).

    With ``best_of="either"`` and an average, those of the better of the average and the weights in training (of equal
    ones the latter's); then ``val_raw`` says whether it is these, and what both come to is there too.
    """
    if not chooses(run.config.averaging, run.config.best_of) or run.final_model is run.model:
        return _accuracies(run, run.final_model)
    raw, average = _accuracies(run, run.model), _accuracies(run, run.final_model)
    better = _standing(raw)[0] >= _standing(average)[0]
    named = {"raw": raw, "average": average}
    both = {f"{name}{key.removeprefix('val')}": value for name, row in named.items() for key, value in row.items()}
    return (raw if better else average) | both | {"val_raw": int(better)}


def _accuracies(run: Run, model: nn.Module) -> dict[str, float]:
    """The network runs in the precision of attacks: float32 would cost a GPU several times as much."""
    assert run.validation
    batches = in_order(run.validation, BATCH_SIZE, device=run.device, channels_last=run.config.channels_last)
    key = noise_keys(run.config.seed, -2, 1)[0].to(run.device)
    precision = run.execution.precision
    counts = []
    with evaluating(model), Execution(precision), autocast(precision, run.device):  # no graphs: every batch is a size
        for batch in batches:
            x, y, ids = map(dealt(len(batch.y)).own, batch)
            rights = [(predict(model, x) if len(x) else y) == y]  # fewer images than processes
            if run.method.adversarial:
                rights += withstood(run, model, rights[0], x, y, ids, key, run.config.val_step_size)
            counts.append(torch.stack([right.sum() for right in rights]))
    rights_of_all = dealt(len(run.validation)).summed(torch.stack(counts).sum(0))
    shares = (rights_of_all.double() / len(run.validation)).tolist()
    return dict(zip(("val_clean", "val_pgd_5", "val_pgd"), shares, strict=False))


def better(row: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether an epoch is the best so far, by ``rule``; never one without validation."""
    return row.get("val_clean") is not None and (best is None or _standing(row) > _standing(best))


def _standing(row: Mapping[str, Any]) -> tuple[float, float]:
    clean = row["val_clean"]
    return row.get("val_pgd", clean), clean


def rule(method: str, val_size: int, either: bool = False) -> str | None:
    """By what ``best.pt`` is chosen, in words; None without validation. either: of an average or its raw weights."""
    if not val_size:
        return None
    first, then = f"PGD-{STEPS}", ", of equal ones the highest clean accuracy"
    if not methods.get(method).adversarial:
        first, then = "clean", ""
    whose = " of the average or of the weights in training, whichever has more," if either else ""
    return f"the highest {first} accuracy{whose} on {val_size:,} validation images{then}, then the earliest"


def chooses(averaging: str, best_of: str) -> bool:
    """Whether best.pt may hold the weights in training beside an average."""
    return averaging != "none" and best_of == "either"


def best_told(epoch: int, raw: bool) -> str:
    """The line above an evaluation of best.pt."""
    return f"and the best epoch, {epoch}{', its weights in training' if raw else ''}:"


def share(run: Run, passes_per_step: float | None) -> float | None:
    """What validation and the probe cost, in passes, as a share of what training on an epoch does; None without
    validation, and where it is not known. Epochs of older versions do not say how many images the second half saw."""
    rows = [row for row in run.history if row.get("val_clean") is not None]
    if not run.validation or not passes_per_step or not rows:
        return None
    probed = min(run.config.probe_size, len(run.splits.train))
    half = 2 * HALF + 1 if run.method.adversarial else 0  # forward, backward to the image; and the last iterate's
    passes = 0.0
    for row in rows:
        for name in ("raw", "average") if "val_raw" in row else ("val",):
            clean = row[f"{name}_clean"]
            passes += len(run.validation) * (1 + half * (clean + row.get(f"{name}_pgd_5", clean)))
        passes += probed * half * (1 + (row.get("probe") or 0))
    images = min(len(run.splits.train), len(run.batches) * run.batches.batch_size)
    return passes / len(rows) / (passes_per_step * images)
