"""What an attack left of a set of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..options import Norm, radius
from .named import Named


@dataclass(frozen=True, eq=False)
class Outcome:
    """An attack at one radius (None: none, clean images), and which images it left right, bool [N] on the CPU.

    nan: how many images got NaN as logits; they are not right. distance: the largest one of an adversary from its
    image; low, high: the least and the largest pixel. parts: of an ensemble, the accuracy after each part.
    """

    attack: Named
    eps: float | None
    norm: Norm
    right: Tensor
    nan: int = 0
    distance: float = 0.0
    low: float = 0.0
    high: float = 0.0
    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()

    @property
    def percent(self) -> str:
        return f"{100 * self.accuracy:.1f} %"

    @property
    def ball(self) -> str:
        """Its eps as one writes it."""
        return "0" if self.eps is None else radius(self.eps, self.norm)


def by_class(right: Tensor, labels: Tensor) -> dict[int, float]:
    """The accuracy on the images of each class."""
    return {label: right[labels == label].double().mean().item() for label in labels.unique().tolist()}
