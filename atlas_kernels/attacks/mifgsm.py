"""The fast gradient sign method, iterated, with momentum (Dong et al. 2018, arXiv 1710.06081)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..checks import number_in
from ..layout import column, compute_dtype
from ..schema import L2, LINF
from .arguments import require_choice
from .attack import Attack
from .batch import Batch


@dataclass(frozen=True)
class MIFGSM(Attack):
    """MI-FGSM: signed steps (in l2 of their direction over its norm) along a sum of gradients, each over its mean
    absolute value, that forgets by the factor ``decay`` a step; from x itself.

    Arguments, calls and errors as in ``Attack``, with norm "linf" or "l2", and:

    Args:
        step_size: default: eps / steps, as published.
        decay: 0 or more, mu in the paper; 0 leaves each gradient alone.
    """

    _: KW_ONLY
    random_start: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("norm", self.norm, (LINF, L2))
        number_in("decay", self.decay, 0.0)

    @property
    def effective_step_size(self) -> float | Tensor:
        return self.eps / max(1, self.steps) if self.step_size is None else self.step_size

    def step(
        self, batch: Batch, adv: Tensor, grad: Tensor, carried: Tensor | None, left: float
    ) -> tuple[Tensor, Tensor]:
        grad = grad.to(compute_dtype(grad.dtype))
        size = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
        momentum = grad / column(size, grad)
        if carried is not None:
            momentum.add_(carried, alpha=self.decay)
        return batch.step(adv, momentum), momentum
