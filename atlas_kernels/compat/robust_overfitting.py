"""Drop-ins for the attack and mixup in ``train_cifar.py`` of locuslab/robust_overfitting (Rice, Wong & Kolter 2020,
arXiv 2002.11569) and in csdongxian/AWP's AT_AWP scripts; what reads data stays with the original.

As there, images are in [0, 1] and the attack normalises them with this module's globals ``mu`` and ``std``, those of
CIFAR-10, and keeps them between ``lower_limit`` and ``upper_limit``; set these for another data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attacks.arguments import require_radius
from ..attacks.held import modes_of
from ..attacks.objective import Objective
from ..checks import class_indices, flag, require_choice
from ..layout import column
from ..perturb import pgd_step
from ._missing import refuse
from ._restarts import Rows, Step, strongest_delta
from .fast_adversarial import cifar10_mean, cifar10_std, clamp, mu, std

__all__ = [
    "attack_pgd", "cifar10_mean", "cifar10_std", "clamp", "lower_limit", "mixup_criterion", "mixup_data", "mu",
    "normalize", "std", "upper_limit",
]  # fmt: skip

upper_limit, lower_limit = 1, 0


def normalize(X: Tensor) -> Tensor:
    return (X - mu.to(X.device)) / std.to(X.device)


def mixup_data(x: Tensor, y: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor, Tensor, float]:
    """``(lam x + (1 - lam) x[i], y, y[i], lam)``, i a random order, drawn by torch on the CPU, and lam from
    Beta(alpha, alpha), drawn by numpy; 1 for alpha = 0."""
    import numpy as np  # not needed by anything else here

    lam = float(np.random.beta(alpha, alpha)) if alpha > 0 else 1.0
    index = torch.randperm(len(x)).to(x.device)
    return lam * x + (1 - lam) * x[index], y, y[index.to(y.device)], lam


def mixup_criterion(
    criterion: Callable[[Tensor, Tensor], Tensor], pred: Tensor, y_a: Tensor, y_b: Tensor, lam: float
) -> Tensor:
    """``lam criterion(pred, y_a) + (1 - lam) criterion(pred, y_b)``."""
    return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)


def attack_pgd(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    epsilon: float,
    alpha: float,
    attack_iters: int,
    restarts: int,
    norm: str,
    early_stop: bool = False,
    mixup: bool = False,
    y_a: Tensor | None = None,
    y_b: Tensor | None = None,
    lam: float | None = None,
) -> Tensor:
    """PGD on cross-entropy of ``model(normalize(X + delta))``, in the mode that the model is in: delta.

    norm: "l_inf", from a uniform start; "l_2", from a random direction with a uniform length. early_stop: a sample does
    not move while it is misclassified, and the attack ends when all are. mixup: attack ``lam CE(y_a) + (1 - lam)
    CE(y_b)``.

    Kept: starts are drawn by ``uniform_`` and ``normal_`` on X's device; of the restarts the one of the largest loss
    wins, of equal ones the later. BatchNorm in train mode sees every forward: one per step, with mixup two, and the one
    that judges a restart.

    Differs: in eval mode a single restart is not judged, mixup takes one forward per step, and early_stop leaves
    misclassified samples out of further forwards; an l_inf radius of 1 or more raises ValueError.
    """
    require_choice("norm", norm, ("l_inf", "l_2"))
    flag("early_stop", early_stop)
    flag("mixup", mixup)
    X = X.detach()
    goal = Objective(class_indices("y", y, X))
    twice = False
    if mixup:
        if y_a is None or y_b is None or lam is None:
            raise ValueError("mixup=True needs y_a, y_b and lam: the labels of both images and the first one's share")
        goal = _Mixup(class_indices("y_a", y_a, X), second=Objective(class_indices("y_b", y_b, X)), lam=float(lam))
        twice = any(modes_of(model.modules()).values())

    forward = _Normalised(model, twice, any(p.dtype == X.dtype for p in model.parameters()))
    start, step = _linf(X, epsilon, alpha) if norm == "l_inf" else _l2(X, epsilon, alpha)
    delta = strongest_delta(model, forward, X, y, goal, start, step, attack_iters, restarts, freeze=early_stop)
    return delta.clamp_(-epsilon, epsilon)


def _linf(X: Tensor, epsilon: float, alpha: float) -> tuple[Callable[[], Tensor], Step]:
    require_radius("epsilon", epsilon, clip_min=lower_limit, clip_max=upper_limit)

    def start() -> Tensor:
        return (X + torch.zeros_like(X).uniform_(-epsilon, epsilon)).clamp_(lower_limit, upper_limit)

    def step(adv: Tensor, grad: Tensor, rows: Rows) -> Tensor:
        return pgd_step(adv, grad, X[rows], epsilon, alpha, clip_min=lower_limit, clip_max=upper_limit)

    return start, step


def _l2(X: Tensor, epsilon: float, alpha: float) -> tuple[Callable[[], Tensor], Step]:
    def start() -> Tensor:
        delta = torch.zeros_like(X).normal_()
        norms = column(delta.flatten(1).norm(dim=1), X)
        delta *= torch.zeros_like(norms).uniform_(0, 1) / norms * epsilon
        return (X + delta).clamp_(lower_limit, upper_limit)

    def step(adv: Tensor, grad: Tensor, rows: Rows) -> Tensor:
        norms = column(grad.flatten(1).norm(dim=1), X)
        norms += 1e-10 * len(X)  # as published, whose gradient is that of the mean loss
        delta = (adv - X[rows] + grad / norms * alpha).flatten(1).renorm(2, 0, epsilon).view_as(adv)
        return (X[rows] + delta).clamp_(lower_limit, upper_limit).to(adv.dtype)

    return start, step


class _Normalised(nn.Module):
    """The model behind the normalisation of its images, in the mode that it is in.

    keep: it gets images in the dtype that they had before; ``normalize`` promotes float16 to float32.
    """

    def __init__(self, model: nn.Module, twice: bool, keep: bool) -> None:
        super().__init__()
        self.model, self.twice, self.keep, self.training = model, twice, keep, getattr(model, "training", False)

    def forward(self, x: Tensor) -> Tensor:
        images = normalize(x).to(x.dtype) if self.keep else normalize(x)
        if self.twice and torch.is_grad_enabled():
            with torch.no_grad():
                self.model(images)  # as published, for BatchNorm and dropout
        logits: Tensor = self.model(images)
        return logits


@dataclass
class _Mixup(Objective):
    """lam of one cross-entropy and 1 - lam of a second."""

    second: Objective = field(default_factory=Objective)
    lam: float = 1.0

    def cotangent(self, logits: Tensor) -> Tensor:
        return self.lam * super().cotangent(logits) + (1 - self.lam) * self.second.cotangent(logits)

    def judge(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        first, fooled = super().judge(logits)
        return self.lam * first + (1 - self.lam) * self.second.judge(logits)[0], fooled

    def rows(self, index: Tensor) -> _Mixup:
        chosen = super().rows(index)
        assert isinstance(chosen, _Mixup)
        chosen.second = self.second.rows(index)
        return chosen


_OF_DATA = (
    "Batches", "Crop", "Cutout", "FlipLR", "Transform", "cifar10", "get_args", "main", "normalise", "pad", "transpose",
)  # fmt: skip
__getattr__ = refuse(
    __name__, __all__, _OF_DATA, "Import it from the original's train_cifar.py or utils.py: it is no part of attacks."
)
