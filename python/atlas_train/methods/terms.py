"""What methods share beside the fused losses; logits are [B, C]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import random_start
from atlas_kernels.attacks import PGD, Attack, LastStep, attacking
from atlas_kernels.layout import compute_dtype
from atlas_kernels.outputs import logits_of, predicted, require_rows_of_logits

from ..data import Batch
from ..noise import normal
from .mixed import samples

NO_BALL = 1.0  # no image in [0, 1] is further away in l_inf
WIDE_START = (
    "radius of uniform noise, in eps, from which the one step starts as in n_fgsm (2 there); x' is then not projected "
    "onto the ball, and the step is eps by default. 0: a start in the ball"
)
#: Images to features, and features to logits.
Parts = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Share of the batch whose largest logit is the label's; a 0-dim float32 tensor, detached."""
    classes = predicted(logits.detach())
    return batch.over_labels(lambda y: (classes == y).float().mean())


def attacked(attack: Attack, model: nn.Module, batch: Batch, key: Tensor, start: Tensor | None = None) -> Tensor:
    """The adversaries of a batch."""
    return attack.on(model, samples(attack, batch, key, start)).adv


def smoothing(logits: Tensor, y: Tensor) -> Tensor:
    """What a share s of label smoothing adds to the mean cross-entropy of ``logits``, over s: mean_i z_y - mean_c z_c.

    For cross-entropies inside a fused loss: (1 - s) CE(y) + s mean_c CE(c) = CE(y) + s (z_y - mean_c z_c).
    """
    z = wide(logits)
    return (z.gather(1, y[:, None])[:, 0] - z.mean(1)).mean()


def near_start(batch: Batch, key: Tensor) -> Tensor:
    """The start of TRADES and its relatives: x + 0.001 normal noise, not clipped, as in their published code."""
    return batch.x + 0.001 * normal(batch.x, key, batch.ids, 0)


def from_wide_noise(attack: PGD, magnitude: float, model: nn.Module, batch: Batch, key: Tensor) -> LastStep:
    """N-FGSM's attack (de Jorge et al. 2022, arXiv 2202.01181) up to its step: the gradient at x + uniform noise of
    ``magnitude`` eps, clipped to the image range. The step is then not projected: its ball is that of ``NO_BALL``."""
    start = random_start(batch.x, magnitude * attack.eps, key=key, ids=batch.ids)
    return attack.before_last_step(model, samples(attack, batch, key, start))


def require_wide(method: Any, magnitude: float, steps: int = 1) -> None:
    """Raises ValueError where ``from_wide_noise`` cannot be had."""
    if magnitude and (steps > 1 or method.norm != "linf"):
        got = f"steps={steps}" if steps > 1 else f"norm={method.norm!r}"
        raise ValueError(f"{method.name}: wide_start is of one step in l_inf, got {got}: leave it out")


@torch.no_grad()
def update_statistics(model: nn.Module, x: Tensor) -> None:
    """A forward whose only use is to move BatchNorm's running statistics, as some published code does by the way."""
    model(x)


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 if it is that: what a penalty is computed in under autocast."""
    return t.to(compute_dtype(t.dtype))


@torch.no_grad()
def classes_of(model: nn.Module, batch: Batch, key: Tensor) -> int:
    """How many classes the network tells apart, by its logits of one image. Raises ValueError for fewer than two."""
    x = batch.x[:1]
    with attacking(model, "eval", key):
        logits = logits_of(uncompiled(model)(x))
    require_rows_of_logits(logits, x)
    if logits.shape[1] < 2:
        raise ValueError(
            f"model returns logits {list(logits.shape)}, of one class, and the method needs two or more: give the last "
            "layer one output for each class"
        )
    return logits.shape[1]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` wraps it: compiled code has no double backward."""
    return getattr(model, "_orig_mod", model)


def split(model: nn.Module) -> Parts:
    """``features`` and ``head`` of a network, logits = head(features(x)), also where ``torch.compile`` wraps it.

    Raises ValueError for a network that is not in two such parts.
    """
    whole: Any = uncompiled(model)
    missing = [name for name in ("features", "head") if not callable(getattr(whole, name, None))]
    if missing:
        raise ValueError(
            f"the method compares features, but {type(whole).__name__} has no {' and no '.join(missing)}: give it "
            "features(x), images to the vectors before the last layer, and head(features), those to logits, so that "
            "head(features(x)) is what it returns (atlas_train.models.Classifier is such a class)"
        )
    return whole.features, whole.head
