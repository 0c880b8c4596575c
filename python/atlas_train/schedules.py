"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state of them."""

from __future__ import annotations

import math


def learning_rate(
    schedule: str, lr: float, step: int, total: int, cyclic_peak: float = 0.5, warmup: float = 0.0
) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``; over the first ``warmup`` steps it grows from 0.

    In the warm-up the schedule's own rate is multiplied by (step + 1) / warmup, so that what comes after is as without.

    cyclic: linear 0 -> lr at ``cyclic_peak`` of the steps -> 0 (Wong, Rice & Kolter 2020), never exactly 0, so that
    no step is wasted. piecewise: lr, lr/10 from 50 %, lr/100 from 75 % (Rice, Wong & Kolter 2020). cosine: half a wave
    from lr to 0. linear: from lr to 0. one_cycle: half a wave from lr/25 to lr at ``cyclic_peak`` of the steps, and
    half a wave to lr/250000, as torch's OneCycleLR (Smith & Topin 2018). constant: lr. Raises ValueError for another
    name.
    """
    if step < warmup:
        lr *= (step + 1) / max(warmup, step + 1)
    t = step / total
    if schedule == "cyclic":
        t = (step + 1) / (total + 1)
        return lr * (t / cyclic_peak if t < cyclic_peak else (1 - t) / (1 - cyclic_peak))
    if schedule == "piecewise":
        return lr * (1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * t))
    if schedule == "linear":
        return lr * (1 - t)
    if schedule == "one_cycle":
        return _one_cycle((lr / 25, lr, lr / 250_000), step, total, cyclic_peak)
    if schedule == "constant":
        return lr
    known = "cyclic, piecewise, cosine, linear, one_cycle or constant"
    raise ValueError(f"schedule must be {known}, got {schedule!r}")


def eps_share(epoch: int, warmup: int) -> float:
    """The share of eps in an epoch, from 1: over the first ``warmup`` epochs it grows evenly to 1."""
    return min(1.0, epoch / (warmup + 1))


def momentum(highest: float, lowest: float, step: int, total: int, peak: float) -> float:
    """The momentum of step ``step`` beside the learning rate ``one_cycle``, as torch's OneCycleLR has it: along a
    cosine from ``highest`` to ``lowest``, which it has where the rate is highest, and back."""
    return _one_cycle((highest, lowest, highest), step, total, peak)


def _one_cycle(values: tuple[float, float, float], step: int, total: int, peak: float) -> float:
    """From the first of the values to the second, at the share ``peak`` of the steps, and on to the third."""
    start, turn, end = values
    top = max(peak * total - 1, 0.0)
    if step < top:
        return _half_wave(start, turn, step / top)
    return _half_wave(turn, end, (step - top) / max(total - 1 - top, 1.0))


def _half_wave(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
