"""Drop-ins for ``CIFAR10/utils.py`` and ``MNIST/evaluate_mnist.py`` of locuslab/fast_adversarial (Wong, Rice & Kolter
2020, arXiv 2001.03994); ``get_loaders`` stays with the original.

As there, the statistics and limits of normalised CIFAR-10 images are globals of this module, made when it is imported,
on CUDA where there is one; set ``lower_limit`` and ``upper_limit`` for another data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import attacking
from ..attacks.arguments import require_radius
from ..attacks.objective import Objective
from ..checks import class_indices
from ..perturb import pgd_step
from ._evaluation import evaluate
from ._missing import refuse
from ._restarts import Rows, strongest_delta

__all__ = [
    "attack_fgsm", "attack_pgd", "cifar10_mean", "cifar10_std", "clamp", "evaluate_pgd", "evaluate_standard",
    "lower_limit", "mu", "std", "upper_limit",
]  # fmt: skip

cifar10_mean = (0.4914, 0.4822, 0.4465)
cifar10_std = (0.2471, 0.2435, 0.2616)

_device = "cuda" if torch.cuda.is_available() else "cpu"
mu = torch.tensor(cifar10_mean, device=_device).view(3, 1, 1)
std = torch.tensor(cifar10_std, device=_device).view(3, 1, 1)

upper_limit = (1 - mu) / std
lower_limit = (0 - mu) / std


def clamp(X: Tensor, lower_limit: Tensor | float, upper_limit: Tensor | float) -> Tensor:
    """X between the limits, tensors that broadcast or numbers; where they cross, the lower one."""
    lower, upper = (torch.as_tensor(limit, dtype=X.dtype, device=X.device) for limit in (lower_limit, upper_limit))
    return torch.maximum(torch.minimum(X, upper), lower)


def attack_pgd(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    epsilon: Tensor | float,
    alpha: Tensor | float,
    attack_iters: int,
    restarts: int,
    opt: Any = None,
) -> Tensor:
    """PGD on cross-entropy, from a uniform start, in the mode that the model is in: the perturbation delta.

    epsilon and alpha are tensors [C, 1, 1] for images normalised per channel, limited by ``lower_limit`` and
    ``upper_limit``; or numbers for images in [0, 1], as in MNIST/evaluate_mnist.py.

    Kept: starts are drawn by ``uniform_`` on X's device, channel by channel where there are radii per channel; a sample
    does not move while it is misclassified and an attack ends when all are; of the restarts the one of the largest loss
    wins, of equal ones the later. BatchNorm in train mode sees every forward, the one that judges a restart included.

    Differs: in eval mode misclassified samples are left out of further forwards, and a single restart is not judged.
    ``opt`` is not needed: under autocast in float16 each sample's gradient has a scale of its own.
    """
    if isinstance(epsilon, Tensor) and epsilon.ndim:
        return _attack_normalised(model, X, y, epsilon, torch.as_tensor(alpha), attack_iters, restarts)
    require_radius("epsilon", epsilon, clip_min=0, clip_max=1)
    radius, step_size = float(epsilon), float(alpha)
    X = X.detach()

    def start() -> Tensor:
        return (X + torch.zeros_like(X).uniform_(-radius, radius)).clamp_(0, 1)

    def step(adv: Tensor, grad: Tensor, rows: Rows) -> Tensor:
        return pgd_step(adv, grad, X[rows], radius, step_size)

    goal = Objective(class_indices("y", y, X))
    delta = strongest_delta(model, model, X, y, goal, start, step, attack_iters, restarts, freeze=True)
    return delta.clamp_(-radius, radius)


def _attack_normalised(
    model: nn.Module, X: Tensor, y: Tensor, epsilon: Tensor, alpha: Tensor, attack_iters: int, restarts: int
) -> Tensor:
    X = X.detach()
    radii = epsilon.flatten().tolist()
    epsilon, alpha = (values.to(X).reshape(-1, 1, 1) for values in (epsilon, alpha))
    if X.ndim != 4 or len(radii) != X.shape[1]:
        raise ValueError(f"epsilon has {len(radii)} radii, expected one per channel of X [B, C, H, W], {list(X.shape)}")
    if len(alpha) not in (1, X.shape[1]):
        raise ValueError(f"alpha has {len(alpha)} step sizes, expected one, or one per channel of X {list(X.shape)}")
    low, high = (clamp(bound, lower_limit, upper_limit) for bound in (X - epsilon, X + epsilon))

    def start() -> Tensor:
        delta = torch.zeros_like(X)
        for channel, radius in enumerate(radii):
            delta[:, channel].uniform_(-radius, radius)
        return clamp(X + delta, lower_limit, upper_limit)

    def step(adv: Tensor, grad: Tensor, rows: Rows) -> Tensor:
        return clamp(adv + alpha * grad.sign().to(adv.dtype), low[rows], high[rows])

    goal = Objective(class_indices("y", y, X))
    delta = strongest_delta(model, model, X, y, goal, start, step, attack_iters, restarts, freeze=True)
    return clamp(delta, -epsilon, epsilon)


def attack_fgsm(model: nn.Module, X: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """``epsilon * sign(gradient at X)``, in the mode that the model is in; as published not clipped to the images."""
    with attacking(model, "keep", None, update_buffers=True):
        _, grad = Objective(class_indices("y", y, X)).gradient(model, X, sized=False)
    return epsilon * grad.sign().to(X.dtype)


def evaluate_pgd(
    test_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, attack_iters: int, restarts: int
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) under ``attack_pgd`` of 8/255 in steps of 2/255 on normalised CIFAR-10 images.

    Kept: the model is left in eval mode. Differs: results are read off the device once, not twice per batch.
    """
    epsilon, alpha = (8 / 255.0) / std, (2 / 255.0) / std
    return evaluate(
        test_loader, model, lambda X, y: X + attack_pgd(model, X, y, epsilon, alpha, attack_iters, restarts)
    )


def evaluate_standard(test_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) on the images as they are; the rest as in ``evaluate_pgd``."""
    return evaluate(test_loader, model, lambda X, y: X)


__getattr__ = refuse(
    __name__,
    __all__,
    ("get_loaders",),
    "Import it from the original's utils.py: it reads CIFAR-10 with torchvision.",
)
