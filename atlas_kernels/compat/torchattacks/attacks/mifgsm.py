"""The fast gradient sign method, iterated, with momentum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....attacks import PGD
from ._gradient import DirectedAttack, radius, spread


class MIFGSM(DirectedAttack):
    """Signed steps along a sum of gradients, each over its mean absolute value, that forgets by the factor ``decay`` a
    step (Dong et al. 2018, arXiv 1710.06081)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
    ) -> None:
        super().__init__("MIFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.decay = decay
        self._attack()

    def _attack(self) -> PGD:
        return self._pgd(self.alpha, self.steps)

    def _direction(self, grad: Tensor, before: Tensor | None) -> tuple[Tensor, float | Tensor]:
        size = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad / spread(size, grad)
        grad = grad if before is None else grad.add_(before, alpha=self.decay)
        return grad, radius("alpha", self.alpha)
