"""The fast gradient sign method."""

from __future__ import annotations

from torch import Tensor, nn

from ....attacks import Attack
from ._gradient import GradientAttack


class FGSM(GradientAttack):
    """One signed gradient step of eps (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def __init__(self, model: nn.Module, eps: float | Tensor = 8 / 255) -> None:
        super().__init__("FGSM", model)
        self.eps = eps
        self._attack()

    def _attack(self) -> Attack:
        return self._made(self.eps, 1)
