"""Projected gradient descent on the KL divergence of TRADES."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....attacks import Attack
from ._gradient import GradientAttack, around


class TPGD(GradientAttack):
    """PGD on KL(p(x) || p(x')) from x + 0.001 normal noise: the attack of TRADES (Zhang et al. 2019, arXiv 1901.08573).

    Labels are not needed and not looked at. The network runs on x once.
    """

    _needs_labels = False

    def __init__(
        self, model: nn.Module, eps: float | Tensor = 8 / 255, alpha: float | Tensor = 2 / 255, steps: int = 10
    ) -> None:
        super().__init__("TPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default"]
        self._attack()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._perturbed(images, labels)

    def _attack(self) -> Attack:
        return self._made(self.alpha, self.steps, objective="kl")

    def _start(self, x: Tensor, eps: float | Tensor) -> Tensor:
        return around(x, torch.randn_like(x).mul_(0.001))
