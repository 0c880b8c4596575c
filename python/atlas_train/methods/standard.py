"""Standard training: cross-entropy on the images as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import Norm
from .base import EVERY_NORM, Method, Metrics
from .terms import accuracy


@dataclass(frozen=True)
class Standard(Method):
    """Standard training: L = CE(z(x), y). Not robust; the yardstick for clean accuracy and time."""

    name: ClassVar[str] = "standard"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    adversarial: ClassVar[bool] = False

    def objective(self, model: nn.Module, batch: Batch, given: Any) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(batch.x))
        return self.ce(logits, batch), {"clean": accuracy(logits, batch)}
