"""Projected gradient descent in the l_inf ball."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....attacks import Attack
from ....checks import flag
from ._gradient import GradientAttack, around, uniform


class PGD(GradientAttack):
    """Signed gradient steps in the l_inf ball, from a uniform start (Madry et al. 2018, arXiv 1706.06083)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        super().__init__("PGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self._attack()

    def _attack(self) -> Attack:
        flag("random_start", self.random_start)
        return self._made(self.alpha, self.steps)

    def _start(self, x: Tensor, eps: float | Tensor) -> Tensor | None:
        return around(x, uniform(torch.empty_like(x), eps)) if self.random_start else None
