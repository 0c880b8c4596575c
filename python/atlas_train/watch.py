"""What is looked at after each epoch: images held out, and the signs of robustness that collapses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from atlas_kernels import Execution

from . import progress
from .data import in_order
from .deal import dealt
from .evaluate import evaluating
from .machine import autocast
from .noise import noise_keys
from .run import Run
from .validation import HALF, STEPS, validate, withstood

PROBE_DROP, PROBE_WINDOW, PROBE_GAP = 0.2, 5, 0.4
#: Of the beginning of a collapse; the first epoch's accuracies say little of the second's.
LEAP, LEAP_DROP, LEAP_AFTER = 0.05, 0.08, 2
#: Where five finer steps of PGD fool more than these shares of what is right after five long ones, and of all images,
#: the network hides, unless accuracy after the finer ones holds: a healthy one mostly loses next to nothing, but up to
#: 0.43 where five steps are few (MNIST at eps 0.3), while that accuracy rises from epoch to epoch.
HIDDEN, HIDDEN_DROP = 1 / 3, 0.05
#: It holds if it is at least this share of the best before; that counts up to this loss, which no healthy one has.
HOLDS, MOST_HIDDEN = 2 / 3, 1 / 2
#: The accuracies that must not fall, and what they are called.
_WATCHED = {
    "probe": f"PGD-{HALF} accuracy on the same training images",
    "val_pgd": f"PGD-{STEPS} accuracy on the validation images",
    "val_clean": "clean accuracy on the validation images",
}
Row = Mapping[str, Any]
Halves = Mapping[tuple[str, str], str]
#: Accuracies on the same images after five steps, and after five finer ones.
HALVES: Halves = {("val_pgd_5", "val_pgd"): "validation", ("probe", "probe_10"): "training"}


#: The two collapses.
OWN, HIDES = "the network learned its own attack", "the network hides from short attacks"
#: What to do about a collapse.
ADVICE = (
    "catastrophic overfitting, or a step too large. Try more attack steps, a smaller step_size, eps or lr, fewer "
    "epochs, a term that keeps the loss smooth (atlas), or on_collapse='rollback'"
)


def watch(run: Run, row: dict[str, Any], display: progress.Display) -> str | None:
    """After an epoch: PGD accuracy of a few training images, validation, and the sign of a collapse."""
    row |= probe(run) if run.method.adversarial and run.config.probe_size else {"probe": None}
    if run.validation:
        row |= validate(run)
    display.epoch(row)
    return collapse(row, run.history, telling(run))


def telling(run: Run) -> Halves:
    """The halves that tell whether the network of this run hides: not those in l1, or with steps of one's choice, where
    five are few for any network; and not on so few images that losing three is a sign."""
    validated = len(run.validation or ()) if run.config.val_step_size is None else 0
    return telling_of(run.config.norm, validated, min(run.config.probe_size, len(run.splits.train)))


def telling_of(norm: str, validated: int, probed: int) -> Halves:
    """``telling`` for a norm and so many images of validation, attacked by the usual steps, and of the probe."""
    sizes, few = {"val_pgd_5": validated, "probe": probed}, 3 / HIDDEN_DROP
    return {names: images for names, images in HALVES.items() if norm != "l1" and sizes[names[0]] >= few}


def collapse(row: Row, history: Sequence[Row], halves: Halves = HALVES) -> str | None:
    """How an epoch's numbers show that training collapsed, or None; None too where the epoch before showed it."""
    told = history and _sign(history[-1], history[:-1], halves)
    return None if told else _sign(row, history, halves)


def collapses(history: Sequence[Row], halves: Halves = HALVES) -> Iterator[tuple[int, str]]:
    """The epochs in which training collapsed, and how that shows."""
    for number, row in enumerate(history):
        if sign := collapse(row, history[:number], halves):
            yield row["epoch"], sign


def _sign(row: Row, history: Sequence[Row], halves: Halves) -> str | None:
    recent = history[-PROBE_WINDOW:]
    if evidence := _of_its_own_attack(row, recent):
        return f"{OWN}: {evidence}"
    # The first epoch's network is hardly better than chance.
    hides_now = _hidden(row, recent, halves) if history else None
    return hides_now or _fall(row, recent)


def _of_its_own_attack(row: Row, recent: Sequence[Row]) -> str | None:
    """How it shows that the network is right under the method's own attack, and not under PGD."""
    if (row.get("segment") or 0) > 0:
        return "it is right at one-step adversaries and wrong a quarter of the way to them"
    if fits_its_own_attack_only(row) or turns_to_its_own_attack(row, recent):
        percents = 100 * row["probe"], 100 * row["adv"]
        return f"{_WATCHED['probe']} is {percents[0]:.0f} %, but {percents[1]:.0f} % under the method's own attack"
    return None


def _hidden(row: Row, recent: Sequence[Row], halves: Halves) -> str | None:
    """How it shows that the network hides; it learned its own attack where its accuracy under that is far above."""
    for (early, late), images in halves.items():
        if hides(row, recent, early, late):
            percents = f"{100 * row[early]:.0f} % after {HALF} steps of PGD, {100 * row[late]:.0f} % after {STEPS}"
            evidence = f"on {images} images its accuracy is {percents}"
            own = row.get("adv") or 0.0
            learned = own > 2 * row[early]
            if learned:
                return f"{OWN}: {evidence}, but {100 * own:.0f} % under the method's own attack"
            return f"{HIDES}: {evidence}"
    return None


def _fall(row: Row, recent: Sequence[Row]) -> str | None:
    """Which accuracy fell; the network learned its own attack where its accuracy under that did not fall as far."""
    for name, words in _WATCHED.items():
        before = [past[name] for past in recent if past.get(name) is not None]
        if row.get(name) is not None and overfits(row[name], before):
            fell = f"{words} fell from {100 * max(before):.0f} % to {100 * row[name]:.0f} %"
            own = name != "val_clean" and "eps" not in row and (row.get("adv") or 0) > max(before) / 2
            return f"{OWN}: {fell}" if own else fell
    return None


def hides(row: Row, recent: Sequence[Row], early: str, late: str) -> bool:
    """Whether a few more steps, and finer ones, fool many more images, and not because five were few; not while eps
    grows, for PGD has all of it."""
    if "eps" in row or None in (row.get(early), row.get(late)):
        return False
    lost = row[early] - row[late]
    before = [past[late] for past in recent if past.get(late) is not None]
    holds = bool(before) and row[late] >= HOLDS * max(before)
    return bool(lost > HIDDEN_DROP and lost > (MOST_HIDDEN if holds else HIDDEN) * row[early])


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


def probe(run: Run) -> dict[str, float]:
    """Accuracies under the halves of PGD-10 on a fixed slice of the training images, with the same noise every time."""
    images = run.splits.train
    count = min(run.config.probe_size, len(images))
    few = in_order(images.subset(count), count, device=run.device, channels_last=run.config.channels_last)
    deal = dealt(count)
    x, y, ids = map(deal.own, next(few))
    key = noise_keys(run.config.seed, -1, 1)[0].to(run.device)
    model, precision = run.model, run.execution.precision
    with evaluating(model), Execution(precision), autocast(precision, run.device):  # no graphs: half the rows drop out
        rights = withstood(run, model, torch.ones_like(y, dtype=torch.bool), x, y, ids, key)
        return {
            name: deal.gathered(right.float()).mean().item()
            for name, right in zip(("probe", "probe_10"), rights, strict=True)
        }
