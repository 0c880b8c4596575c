"""Projected gradient descent in the l2 ball."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .... import attacks
from ....checks import flag
from ....layout import column, compute_dtype
from ._gradient import GradientAttack, around


class PGDL2(GradientAttack):
    """Gradient steps in the l2 ball, from a random direction at a uniform radius (Madry et al. 2018, arXiv 1706.06083).

    A step has length ``alpha n / (n + eps_for_division)``, n the norm of a sample's gradient of the mean loss: where
    the prediction is nearly certain, or the batch large, it is shorter than alpha; 0 makes it alpha always.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 1.0,
        alpha: float | Tensor = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__("PGDL2", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.eps_for_division = eps_for_division
        self._attack()

    def _attack(self) -> attacks.Attack:
        flag("random_start", self.random_start)
        return self._made(self.alpha, self.steps, _Shortened, norm="l2", eps_for_division=self.eps_for_division)

    def _start(self, x: Tensor, eps: float | Tensor) -> Tensor | None:
        if not self.random_start:
            return None
        noise = torch.empty_like(x).normal_()
        length = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        share = torch.zeros_like(length).uniform_(0, 1)
        return around(x, noise.mul_(column(share / length * eps, x)))


@dataclass(frozen=True)
class _Shortened(attacks.Attack):
    """Its l2 steps are shorter where the gradient of the mean loss is small."""

    sized: ClassVar[bool] = True
    _: KW_ONLY
    eps_for_division: float = 1e-10

    def step(self, batch: attacks.Batch, adv: Tensor, grad: Tensor, carried: None, left: float) -> tuple[Tensor, None]:
        length = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)  # float32 has no square of 1e-23
        share = length / (length + self.eps_for_division * len(grad))
        return batch.step(adv, grad, batch.step_size * share.nan_to_num(0.0).to(compute_dtype(grad.dtype))), None
