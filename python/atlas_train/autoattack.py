"""AutoAttack (Croce & Hein 2020), run by the package ``pyautoattack``, which is optional."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks.contract import leave_no_trace

from .data import Batches, Images
from .evaluate import SUBSET_SEED, Say
from .options import fraction

Version = Literal["standard", "apgd"]
TARGETS = 9  # classes that APGD-T and FAB-T aim at, in the standard version


@dataclass(frozen=True)
class AutoAttacked:
    """Accuracy in [0, 1] over ``images`` test images under AutoAttack: each counts only if every attack fails."""

    accuracy: float
    images: int
    version: str
    seconds: float
    seed: int = 0


def autoattack(
    model: nn.Module,
    images: Images,
    eps: float,
    size: int,
    *,
    version: Version = "standard",
    batch_size: int = 250,
    seed: int = 0,
    say: Say | None = None,
) -> AutoAttacked:
    """AutoAttack in the l_inf ball (arXiv 2003.01690) on ``size`` images, with the model in eval mode.

    version: standard (APGD-CE, APGD-T, FAB-T, Square), or apgd, the first two alone in a fraction of the time. size: a
    stratified draw of so many images, the one that ``evaluate`` makes of that size.
    The package seeds torch's global generators; their states, and all else of the model, are as before afterwards.

    Raises ImportError without the package.
    """
    package = require_autoattack()
    device = next(model.parameters()).device
    images = images.subset(size, SUBSET_SEED) if size < len(images) else images
    data = Batches(images, len(images), shuffle=False, seed=0, device=device)
    x, y, _ = next(iter(data))
    if say:
        say(f"AutoAttack ({version}) on {len(y):,} images at eps {fraction(eps)}")
    started = time.perf_counter()
    key = noise_key(device, generator=torch.Generator(device).manual_seed(seed))
    with torch.random.fork_rng(range(torch.cuda.device_count())), leave_no_trace(model, "eval", key):
        attack = package.AutoAttack(
            InRows(model).eval(), device=device, eps=eps, norm="Linf", seed=seed, **_attacks(version)
        )
        classes = model(x[:1]).shape[1]
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(TARGETS, classes - 1)
        _, found = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    return AutoAttacked((found == y).double().mean().item(), len(y), version, time.perf_counter() - started, seed)


class InRows(nn.Module):
    """A model whose gradient at the input is contiguous: the package takes views of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(Tensor.contiguous)
        logits: Tensor = self.model(x)
        return logits


def require_autoattack() -> Any:
    """The package, or ImportError that says how to get it."""
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError("autoattack needs the package: pip install --no-deps pyautoattack") from error
    return pyautoattack


def _attacks(version: Version) -> dict[str, Any]:
    return {"version": "custom", "attacks": ["apgd-ce", "apgd-t"]} if version == "apgd" else {"version": version}
