"""What is looked at after each epoch: robustness that collapses, and test images on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atlas_kernels.attacks import PGD

from . import progress
from .data import Batches
from .evaluate import evaluate, evaluating, predict
from .machine import autocast
from .noise import noise_keys
from .run import Run

VAL_SIZE, VAL_STEPS, PROBE_STEPS = 500, 10, 5
PROBE_DROP, PROBE_WINDOW, PROBE_GAP = 0.2, 5, 0.4


def watch(run: Run, row: dict[str, Any], display: progress.Display) -> None:
    """After an epoch: PGD accuracy of a few training images (and the alarm), and the optional look at test images."""
    config = run.config
    row["probe"] = probe(run) if run.method.adversarial and config.probe_size else None
    if config.val_every and run.epoch % config.val_every == 0:
        size = min(VAL_SIZE, len(run.splits.test))
        seen = evaluate(
            run.model, run.splits.test, config.eps, norm=config.norm, size=size, steps=VAL_STEPS,
            channels_last=config.channels_last,
        )  # fmt: skip
        row |= {"test_clean": seen.clean, "test_pgd": seen.pgd}
    display.epoch(row)
    if row["probe"] is not None and (sign := collapse(row, run.history)):
        display.say(
            f"WARNING: PGD-{PROBE_STEPS} accuracy on the same training images {sign} in epoch {run.epoch}: "
            "catastrophic overfitting. Try more attack steps, a smaller step_size or eps, fewer epochs, or a term that "
            "keeps the loss smooth (atlas)"
        )


def collapse(row: dict[str, Any], history: Sequence[dict[str, Any]]) -> str | None:
    """How an epoch's numbers show catastrophic overfitting for the first time, or None."""
    before = [past["probe"] for past in history[-PROBE_WINDOW:] if past.get("probe") is not None]
    if overfits(row["probe"], before):
        return f"fell from {100 * max(before):.0f} % to {100 * row['probe']:.0f} %"
    if fits_its_own_attack_only(row) and not (history and fits_its_own_attack_only(history[-1])):
        return f"is {100 * row['probe']:.0f} %, but {100 * row['adv']:.0f} % under the method's own attack,"
    return None


def overfits(now: float, before: Sequence[float]) -> bool:
    """Whether an accuracy collapsed: by more than 20 points (Wong et al.'s rule) and to less than half of the best."""
    return bool(before) and now < max(before) - PROBE_DROP and now < max(before) / 2


def fits_its_own_attack_only(row: dict[str, Any]) -> bool:
    """Whether training looks robust to its own attack, and is not to PGD. While eps grows, that attack is weaker."""
    return "eps" not in row and None not in (row.get("adv"), row.get("probe")) and row["adv"] - row["probe"] > PROBE_GAP


def probe(run: Run) -> float:
    """PGD accuracy on a fixed slice of the training images, with the same noise every time."""
    images = run.splits.train
    count = min(run.config.probe_size, len(images))
    few = Batches(
        images.subset(count),
        count,
        shuffle=False,
        seed=0,
        device=run.device,
        channels_last=run.config.channels_last,
    )
    x, y, ids = next(iter(few))
    key = noise_keys(run.config.seed, -1, 1)[0].to(run.device)
    attack = PGD(run.config.eps, steps=PROBE_STEPS, norm=run.config.norm)
    with evaluating(run.model), run.execution:
        adv = attack(run.model, x, y, key=key, ids=ids)
        with autocast(run.execution.precision, run.device):
            return (predict(run.model, adv) == y).float().mean().item()
