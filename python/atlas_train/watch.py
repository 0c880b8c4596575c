"""What is looked at after each epoch: images held out, and the signs of robustness that collapses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atlas_kernels.attacks import PGD

from . import progress
from .data import Batches
from .evaluate import evaluating, predict
from .machine import autocast
from .noise import noise_keys
from .run import Run
from .validation import STEPS, validate

PROBE_STEPS = 5
PROBE_DROP, PROBE_WINDOW, PROBE_GAP = 0.2, 5, 0.4
#: Of the beginning of a collapse; the first epoch's accuracies say little of the second's.
LEAP, LEAP_DROP, LEAP_AFTER = 0.05, 0.08, 2
#: The accuracies that must not fall, and what they are called.
_WATCHED = {
    "probe": f"PGD-{PROBE_STEPS} accuracy on the same training images",
    "val_pgd": f"PGD-{STEPS} accuracy on the validation images",
    "val_clean": "clean accuracy on the validation images",
}
Row = Mapping[str, Any]


#: What to do about a collapse.
ADVICE = (
    "catastrophic overfitting, or a step too large. Try more attack steps, a smaller step_size, eps or lr, fewer "
    "epochs, a term that keeps the loss smooth (atlas), or on_collapse='rollback'"
)


def watch(run: Run, row: dict[str, Any], display: progress.Display) -> str | None:
    """After an epoch: PGD accuracy of a few training images, validation, and the sign of a collapse."""
    row["probe"] = probe(run) if run.method.adversarial and run.config.probe_size else None
    if run.validation:
        row |= validate(run)
    display.epoch(row)
    return collapse(row, run.history)


def collapse(row: Row, history: Sequence[Row]) -> str | None:
    """How an epoch's numbers show that training collapsed, or None; None too where the epoch before showed it."""
    return None if history and _sign(history[-1], history[:-1]) else _sign(row, history)


def collapses(history: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """The epochs in which training collapsed, and how that shows."""
    for number, row in enumerate(history):
        if sign := collapse(row, history[:number]):
            yield row["epoch"], sign


def _sign(row: Row, history: Sequence[Row]) -> str | None:
    recent = history[-PROBE_WINDOW:]
    for name, words in _WATCHED.items():
        before = [past[name] for past in recent if past.get(name) is not None]
        if row.get(name) is not None and overfits(row[name], before):
            return f"{words} fell from {100 * max(before):.0f} % to {100 * row[name]:.0f} %"
    if (row.get("segment") or 0) > 0:
        return "the network is right at one-step adversaries and wrong a quarter of the way to them"
    if fits_its_own_attack_only(row) or turns_to_its_own_attack(row, recent):
        percents = 100 * row["probe"], 100 * row["adv"]
        return f"{_WATCHED['probe']} is {percents[0]:.0f} %, but {percents[1]:.0f} % under the method's own attack"
    return None


def overfits(now: float, before: Sequence[float]) -> bool:
    """Whether an accuracy collapsed: by more than 20 points (Wong et al.'s rule) and to less than half of the best."""
    return bool(before) and now < max(before) - PROBE_DROP and now < max(before) / 2


def fits_its_own_attack_only(row: Row) -> bool:
    """Whether training looks robust to its own attack, and is not to PGD."""
    return _attacked(row) and row["adv"] - row["probe"] > PROBE_GAP


def turns_to_its_own_attack(row: Row, recent: Sequence[Row]) -> bool:
    """Whether a collapse begins: accuracy under the method's own attack leaps above that of the epochs before, and that
    under PGD falls below theirs, on the probe and in validation."""
    before = [past for past in recent if _attacked(past)]
    if len(before) < LEAP_AFTER or not _attacked(row):
        return False
    leap = row["adv"] - max(past["adv"] for past in before)
    drop = max(past["probe"] for past in before) - row["probe"]
    validated = [past["val_pgd"] for past in before if past.get("val_pgd") is not None]
    confirmed = not validated or row.get("val_pgd") is None or row["val_pgd"] < max(validated)
    return bool(leap > LEAP and drop > LEAP_DROP and confirmed)


def _attacked(row: Row) -> bool:
    """Whether both accuracies are there, and of one eps: while eps grows, the method's own attack is weaker."""
    return "eps" not in row and None not in (row.get("adv"), row.get("probe"))


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
