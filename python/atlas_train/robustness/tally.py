"""Verdicts as they come, batch by batch, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Norm
from .named import Named
from .outcome import Outcome

SAY_EVERY = 15.0  # seconds from one line of progress to the next
_ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}


class Verdict(NamedTuple):
    """Of one batch under one attack: which are right, which got NaN (bool [B] both); of the adversaries the largest
    distance, the least and the largest pixel."""

    right: Tensor
    nan: Tensor
    extremes: Tensor

    @classmethod
    def of(cls, classes: Tensor, y: Tensor, adv: Tensor, x: Tensor, norm: Norm) -> Verdict:
        """classes: predicted, -1 for NaN. adv, x: the images that were attacked, as they became and as they were."""
        if not len(adv):
            return cls(classes == y, classes < 0, torch.zeros(0, 3))
        distance = torch.linalg.vector_norm((adv - x).flatten(1), _ORDER[norm], dim=1).max()
        return cls(classes == y, classes < 0, torch.stack([distance, *torch.aminmax(adv)])[None])


@dataclass
class Tally:
    """Of one attack, so far."""

    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, verdict: Verdict, seconds: float) -> None:
        self.verdicts.append(Verdict(*(part.cpu() for part in verdict)))  # which waits for the device
        self.seconds += seconds

    @classmethod
    def joined(cls, parts: Sequence[Tally]) -> Tally:
        """Of processes that each had their rows of the same batches."""
        batches = zip(*(part.verdicts for part in parts), strict=True)
        return cls([verdict for batch in batches for verdict in batch], max(part.seconds for part in parts))

    @property
    def share(self) -> float:
        """Accuracy so far."""
        return torch.cat([verdict.right for verdict in self.verdicts]).double().mean().item()

    def outcome(self, attack: Named, eps: float | None, norm: Norm, settings: Mapping[str, Any]) -> Outcome:
        right, nan, extremes = (torch.cat(parts) for parts in zip(*self.verdicts, strict=True))
        found = len(extremes) > 0
        low, high = (f(extremes, 0).tolist() if found else [0.0] * 3 for f in (torch.amin, torch.amax))
        return Outcome(
            attack, eps, norm, right, int(nan.sum()), high[0], low[1], high[2], self.seconds, settings=settings
        )


class Progress:
    """Says how long all will take, once that is known, and now and then how far it is.

    warm: whether the first batch takes as long as any; on a GPU it does not, and the second one counts.
    """

    def __init__(self, images: int, warm: bool, say: Callable[[str], None]) -> None:
        self.images, self.warm, self.say = images, warm, say
        self.done = 0
        self.started = self.said = time.perf_counter()
        self.counted = 0  # images before the clock counts

    def after(self, count: int, shares: Mapping[str, float]) -> None:
        """After a batch of so many images. shares: accuracy so far, by attack."""
        now, first = time.perf_counter(), not self.done
        self.done += count
        if first and not self.warm:
            self.started, self.counted = now, self.done
            return
        if self.done >= self.images:
            return
        each = (now - self.started) / (self.done - self.counted)
        if self.done - count == self.counted:
            self.say(f"  about {each * self.images:.0f} s in all")
        elif now - self.said > SAY_EVERY:
            self.said = now
            right = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
            left = each * (self.images - self.done)
            self.say(f"  {self.done:,} of {self.images:,} images: {right}; about {left:.0f} s left")
