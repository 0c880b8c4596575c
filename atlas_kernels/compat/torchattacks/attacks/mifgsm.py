"""The fast gradient sign method, iterated, with momentum."""

from __future__ import annotations

from torch import Tensor, nn

from .... import attacks
from ._gradient import GradientAttack


class MIFGSM(GradientAttack):
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

    def _attack(self) -> attacks.Attack:
        return self._made(self.alpha, self.steps, attacks.MIFGSM, decay=self.decay)
