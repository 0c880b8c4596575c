"""The fast gradient sign method from a random start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....attacks import Attack
from ._gradient import GradientAttack, around, uniform


class FFGSM(GradientAttack):
    """One signed step of alpha from a uniform start (Wong et al. 2020, arXiv 2001.03994)."""

    def __init__(self, model: nn.Module, eps: float | Tensor = 8 / 255, alpha: float | Tensor = 10 / 255) -> None:
        super().__init__("FFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self._attack()

    def _attack(self) -> Attack:
        return self._made(self.alpha, 1)

    def _start(self, x: Tensor, eps: float | Tensor) -> Tensor:
        # torchattacks draws normal numbers first and overwrites them; they are drawn here for the same random state.
        return around(x, uniform(torch.randn_like(x), eps))
