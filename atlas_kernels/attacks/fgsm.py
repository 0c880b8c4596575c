"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): the one-step case of PGD."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from .pgd import PGD


@dataclass(frozen=True)
class FGSM(PGD):
    """One signed gradient step of eps from x (in l2 along the gradient, in l1 of its largest entries); with
    ``random_start=True`` one of 1.25 eps from a random point of the ball (Wong et al. 2020, arXiv 2001.03994).

    Arguments, calls and errors as in ``PGD``, of which it has eps, step_size, norm, sparsity, random_start, targeted,
    objective, attack_mode, clip_min and clip_max. One forward and one backward to the input.
    """

    _: KW_ONLY
    step_size: float | Tensor | None = None
    steps: int = field(default=1, init=False, repr=False)
    restarts: int = field(default=1, init=False, repr=False)
    random_start: bool = False
    keep: str = field(default="last", init=False, repr=False)
    compact: bool = field(default=False, init=False, repr=False)
