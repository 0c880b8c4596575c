"""Projected gradient descent in the l_inf, l2 or l1 ball (Madry et al. 2018, arXiv 1706.06083): a frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..perturb import SPARSITY, require_sparsity
from ..schema import L1
from .attack import Attack, Options
from .batch import AttackResult as AttackResult
from .batch import Batch, LastStep
from .objective import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

_L1_FIRST, _L1_LAST = 2.0, 0.05  # default steps in l1, times eps


@dataclass(frozen=True)
class PGD(Attack):
    """Signed gradient steps (in l2 of the gradient over its norm, in l1 of its largest entries) from a uniform random
    start, each projected onto the ball and clipped to the image range.

    Arguments, calls and errors as in ``Attack``, and:

    Args:
        step_size: default: 2.5 eps / steps; for one step eps, or 1.25 eps after a random start (Wong et al. 2020, arXiv
            2001.03994); for several l1 steps from 2 eps down to eps / 20, by half a cosine; long steps first and short
            ones last, as in APGD-L1 (Croce & Hein 2021, arXiv 2103.01208).
        sparsity: of l1 steps, as in ``pgd_step``. None: dense steps along the gradient.
    """

    _: KW_ONLY
    sparsity: float | None = SPARSITY

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sparsity(self.sparsity)

    @property
    def effective_step_size(self) -> float | Tensor:
        if self.step_size is None and self.steps <= 1:
            return self.eps * 1.25 if self.random_start else self.eps
        if self.step_size is None and self.norm == L1:
            return self.eps * _L1_LAST
        return super().effective_step_size

    def step(self, batch: Batch, adv: Tensor, grad: Tensor, carried: Any, left: float) -> tuple[Tensor, Any]:
        size = batch.step_size
        if self.norm == L1 and self.step_size is None and self.steps > 1:
            size = size * (1.0 + (_L1_FIRST / _L1_LAST - 1.0) * (1.0 - math.cos(math.pi * left)) / 2.0)
        return batch.step(adv, grad, size, sparsity=self.sparsity), carried

    def last_gradient(self, model: Model, x: Tensor, y: Tensor | None = None, **options: Unpack[Options]) -> LastStep:
        """All of ``run`` but the last step, for a caller who fuses that with more work; same arguments.

        ``pgd_step(adv, grad, x, eps, effective_step_size, norm=norm, descend=targeted)`` then makes what ``run``
        returns, and in l_inf ``pgd_step_neighbours`` with the same key samples around it. Raises ValueError for
        steps=0, restarts > 1, compact and keep="best".
        """
        self._require_last_gradient()
        return self.before_last_step(model, self.batch(x, y, **options))

    def before_last_step(self, model: Model, batch: Batch) -> LastStep:
        """``last_gradient`` of a batch that ``batch`` made, as ``on`` takes it: with an objective of your own, say."""
        self._require_last_gradient()
        return self.loop(PGD._to_the_last_gradient, model, batch)

    def _require_last_gradient(self) -> None:
        if self.steps == 0 or self.judged or self.compact:
            raise ValueError('last_gradient needs steps >= 1, restarts=1, keep="last" and compact=False; else use run')

    def _to_the_last_gradient(self, model: Model, batch: Batch) -> LastStep:
        at = self.begin(batch)
        for left in self.climb(model, at, sized=True):
            if not left:
                break
        return LastStep(at.adv, at.grad, batch.key)
