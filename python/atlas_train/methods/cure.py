"""CURE: robustness via curvature regularisation (Moosavi-Dezfooli et al. 2019)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..evaluate import eval_mode
from ..options import Norm, Switches, option
from .base import EVERY_NORM, Method, Metrics, State
from .double_backward import loss_gradient
from .terms import accuracy, uncompiled

#: The published h of the first epochs, 0.1, 0.4, 0.8 and 1.8, as shares of the last, 3.
GROWTH = (1 / 30, 4 / 30, 8 / 30, 18 / 30)


@dataclass(frozen=True)
class CURE(Method):
    """Curvature regularisation (Moosavi-Dezfooli, Fawzi, Uesato & Frossard 2019, arXiv 1811.09716):

        L = CE(z(x), y) + weight mean_i ||grad l_i(x + z_i) - grad l_i(x)||     z = h sign(grad l(x)) / ||sign(...)||

    l is the cross-entropy of each sample; z is a constant, both gradients are differentiated. CE sees BatchNorm in
    train mode, the two gradients see it in eval mode. There is no attack and eps plays no part. The published code
    takes grad l(x) a second time, gradients of the weights included, to find z; here once: 15 passes.

    The published weight 4 and h 3 are for images divided by their standard deviation, about 0.2 on CIFAR-10; for images
    in [0, 1] that is 0.8 (the norm grows by 1 / 0.2) and 0.6. They fine-tune, 10 to 15 epochs of Adam at 1e-4, a
    network that standard training made (the setting ``init`` takes one); no setting for training from scratch is
    published. Where grad l(x) is zero, z is h in every pixel, as there. Not Conserve-Update-Revise (arXiv 2401.14948),
    which recent tables call CURE too.
    """

    name: ClassVar[str] = "cure"
    no_compile: ClassVar[str] = "cure, which differentiates a gradient at the input once more"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    adversarial: ClassVar[bool] = False

    switches: ClassVar[Switches] = dict.fromkeys(("h", "grow", "form"), [("weight", (0,))])

    weight: float = option(0.8, "weight of the penalty; 4 where the published code divides images by 0.2", low=0)
    h: float = option(0.6, "l2 length of z for images in [0, 1]; 3 where the published code divides them", above=0)
    grow: bool = option(True, "in the first four epochs h is 1/30, 2/15, 4/15 and 3/5 of it, as in the published list")
    form: Literal["code", "paper"] = option("code", "of the penalty: the norm, as published code has it, or its square")

    def phase(self, state: State) -> Hashable:
        return self._length(state)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> float:
        return self._length(state)

    def _length(self, state: State) -> float:
        """The length of z in this epoch."""
        return self.h * (GROWTH[state.epoch] if self.grow and state.epoch < len(GROWTH) else 1.0)

    def objective(self, model: nn.Module, batch: Batch, given: float) -> tuple[Tensor, Metrics]:
        # First, as it moves the running statistics that the rest keeps for its backward.
        logits = logits_of(model(batch.x))
        with eval_mode(uncompiled(model)):
            _, _, grad = loss_gradient(model, batch.x, batch)
            _, _, moved = loss_gradient(model, batch.x + direction(grad.detach(), given), batch)
        norm = torch.linalg.vector_norm((moved - grad).flatten(1), dim=1)
        penalty = (norm if self.form == "code" else norm.square()).mean()
        loss = self.ce(logits, batch) + self.weight * penalty
        return loss, {"clean": accuracy(logits, batch), "curvature": penalty.detach()}


def direction(grad: Tensor, length: float) -> Tensor:
    """The published z: the sign of the gradient, of that l2 length per sample."""
    sign = grad.sign().flatten(1)
    z = length * (sign + 1e-7) / (torch.linalg.vector_norm(sign, dim=1, keepdim=True) + 1e-7)
    return z.view(grad.shape)
