"""Batches of mixed images, each with two labels, and what an attack on them climbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from atlas_kernels.attacks import Attack
from atlas_kernels.attacks import Batch as Samples
from atlas_kernels.attacks.objective import Objective

from ..data.loader import Batch, DealtBatch


class MixedBatch(DealtBatch):
    """Images of which each is made of two: ``share`` (0-dim) of the one labelled y, the rest of that labelled
    ``second``."""

    second: Tensor
    share: Tensor

    @classmethod
    def of(cls, batch: Batch, x: Tensor, second: Tensor, share: Tensor) -> MixedBatch:
        mixed = cls(x, batch.y, batch.ids)
        mixed.second, mixed.share, mixed._deal = second, share, batch.deal
        return mixed

    def over_labels(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        return self.share * value(self.y) + (1 - self.share) * value(self.second)


@dataclass
class TwoLabels(Objective):
    """An objective of labels, as the mean over both by their shares."""

    second: Tensor | None = None
    share: Tensor | None = None

    def cotangent(self, logits: Tensor) -> Tensor:
        assert self.share is not None
        first, second = super().cotangent(logits), Objective.cotangent(replace(self, labels=self.second), logits)
        return self.share * first + (1 - self.share) * second

    def rows(self, index: Tensor) -> Objective:
        assert self.second is not None
        return replace(super().rows(index), second=self.second[index])  # type: ignore[call-arg]


def samples(attack: Attack, batch: Batch, key: Tensor, start: Tensor | None = None, x: Tensor | None = None) -> Samples:
    """The batch as ``attack.on`` takes it, with all its labels. x: images in place of the batch's."""
    made = attack.batch(batch.x if x is None else x, batch.y, start=start, key=key, ids=batch.ids)
    if not isinstance(batch, MixedBatch) or attack.objective == "kl":  # which looks at no label
        return made
    goal = TwoLabels(made.goal.labels, kind=attack.objective, second=batch.second, share=batch.share)
    return replace(made, goal=goal)
