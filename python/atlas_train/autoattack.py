"""AutoAttack (Croce & Hein 2020), run by the package ``pyautoattack``, which is optional."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import attacking
from atlas_kernels.outputs import logits_of, require_rows_of_logits

from .data import Batches, Images
from .inference import predict
from .options import Norm, radius
from .robustness.named import Named
from .robustness.outcome import Outcome
from .robustness.samples import SUBSET_SEED

Say = Callable[[str], None]

Version = Literal["standard", "apgd"]
TARGETS, L1_TARGETS = 9, 5  # classes that APGD-T and FAB-T aim at in the standard version; APGD-T in l1
_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class AutoAttacked:
    """Accuracy in [0, 1] over ``images`` test images under AutoAttack: each counts only if every attack fails.

    instead: what differs from ``version`` where there are too few classes for it.
    """

    accuracy: float
    images: int
    version: str
    seconds: float
    seed: int = 0
    instead: str | None = None


def autoattack(
    model: nn.Module,
    images: Images,
    eps: float,
    size: int,
    *,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 250,
    seed: int = 0,
    say: Say | None = None,
) -> AutoAttacked:
    """AutoAttack in the ball of ``norm`` (arXiv 2003.01690, l1: 2103.01208) on ``size`` images, the model in eval mode.

    version: standard (APGD-CE, APGD-T, FAB-T, Square), or apgd, the first two alone in a fraction of the time. size: a
    stratified draw of so many images, the one that ``evaluate`` makes of that size.
    The package seeds torch's global generators; their states, and all else of the model, are as before afterwards.

    The targeted DLR loss of APGD-T takes four classes: for three the untargeted one is run instead, for two neither;
    a warning says so. Raises ImportError without the package, and ValueError for a model of one class.
    """
    require_autoattack()
    images = images.subset(size, SUBSET_SEED) if size < len(images) else images
    if say:
        say(f"AutoAttack ({version}) on {len(images):,} images at eps {radius(eps, norm)}")
    started = time.perf_counter()
    right, instead = verdicts(model, images, eps, norm=norm, version=version, batch_size=batch_size, seed=seed)
    seconds = time.perf_counter() - started
    return AutoAttacked(right.double().mean().item(), len(images), version, seconds, seed, instead)


def verdicts(
    model: nn.Module,
    images: Images,
    eps: float,
    *,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 250,
    seed: int = 0,
) -> tuple[Tensor, str | None]:
    """As ``autoattack``, on all images: whether each is right whatever the attacks do, bool [N] on the model's device;
    and what stands in for a part of ``version`` that cannot be had."""
    package = require_autoattack()
    device = next(model.parameters()).device
    x, y, _ = next(iter(Batches(images, len(images), shuffle=False, seed=0, device=device)))
    key = noise_key(device, generator=torch.Generator(device).manual_seed(seed))
    with torch.random.fork_rng(range(torch.cuda.device_count())), attacking(model, "eval", key):
        first = logits_of(model(x[:1]))
        require_rows_of_logits(first, x[:1])
        classes = first.shape[1]
        attacks, instead = _attacks(version, classes)
        if instead:
            warnings.warn(
                f"AutoAttack on {classes} classes runs {instead}: the DLR loss takes three classes, targeted four",
                stacklevel=3,
            )
        attack = package.AutoAttack(InRows(model), device=device, eps=eps, norm=_NAMES[norm], seed=seed, **attacks)
        if norm == "l1":  # as in the package's standard version, whatever is run of it
            attack.apgd.use_largereps = attack.apgd_targeted.use_largereps = True
        for part, targets in ((attack.apgd_targeted, L1_TARGETS if norm == "l1" else TARGETS), (attack.fab, TARGETS)):
            part.n_target_classes = min(targets, classes - 1)
        adv, predicted = attack.run_standard_evaluation(x, y, batch_size=batch_size)
        # The package takes NaN for the largest logit, which is right for some labels.
        predicted = torch.where(torch.cat([predict(model, part) for part in adv.split(batch_size)]) < 0, -1, predicted)
    return predicted == y, instead


def outcome(
    model: nn.Module,
    everything: tuple[Tensor, Tensor, Tensor],
    standing: Tensor,
    attack: Named,
    eps: float,
    norm: Norm,
    seed: int,
    say: Say,
    *,
    version: Version,
    batch_size: int,
) -> Outcome:
    raise NotImplementedError


class InRows(nn.Module):
    """A model whose gradient at the input is contiguous, as the package takes views of it, and whose mode stays."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False

    def train(self, mode: bool = True) -> InRows:
        return self  # an override of the model's own must not be called

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(Tensor.contiguous)
        return logits_of(self.model(x))


def require_autoattack() -> Any:
    """The package, or ImportError that says how to get it."""
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError("autoattack needs the package: pip install --no-deps pyautoattack") from error
    return pyautoattack


def _attacks(version: Version, classes: int) -> tuple[dict[str, Any], str | None]:
    """What the package is told, and what stands in for what it cannot do with so few classes."""
    if classes < 2:
        raise ValueError(f"autoattack: the model has {classes} class, so there is no other to reach: use two or more")
    if classes >= 4:
        return ({"version": version} if version == "standard" else _custom(["apgd-ce", "apgd-t"])), None
    others = ["fab-t", "square"] if version == "standard" else []
    if classes == 3:
        return _custom(["apgd-ce", "apgd-dlr", *others]), "apgd-dlr for apgd-t"
    return _custom(["apgd-ce", *others]), "without apgd-t"


def _custom(attacks: list[str]) -> dict[str, Any]:
    return {"version": "custom", "attacks": attacks}
