"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state of them."""

from __future__ import annotations

import math


def learning_rate(schedule: str, lr: float, step: int, total: int, cyclic_peak: float = 0.5) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``.

    cyclic: linear 0 -> lr at ``cyclic_peak`` of the steps -> 0 (Wong, Rice & Kolter 2020), never exactly 0, so that
    no step is wasted. piecewise: lr, lr/10 from 50 %, lr/100 from 75 % (Rice, Wong & Kolter 2020). cosine: half a wave
    from lr to 0. constant: lr. Raises ValueError for another name.
    """
    t = step / total
    if schedule == "cyclic":
        t = (step + 1) / (total + 1)
        return lr * (t / cyclic_peak if t < cyclic_peak else (1 - t) / (1 - cyclic_peak))
    if schedule == "piecewise":
        return lr * (1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * t))
    if schedule == "constant":
        return lr
    raise ValueError(f"schedule must be cyclic, piecewise, cosine or constant, got {schedule!r}")
