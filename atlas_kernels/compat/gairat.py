"""Drop-ins for ``attack_generator.py`` and ``GAIR.py`` of GAIRAT (Zhang et al. 2021, arXiv 2010.01736; zjfheart's
Geometry-aware-Instance-reweighted-Adversarial-Training)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..attacks import PGD
from ..attacks.arguments import require_count, require_radius
from ..attacks.objective import Objective
from ..checks import class_indices, flag, require_choice, require_images
from ._evaluation import evaluate
from ._missing import refuse
from .trades import noise_near

__all__ = ["GAIR", "GA_PGD", "cwloss", "eval_clean", "eval_robust"]

_OBJECTIVES = {"cent": "ce", "cw": "margin", "kl": "kl"}


def GA_PGD(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
    loss_fn: str,
    category: str,
    rand_init: bool,
) -> tuple[Tensor, Tensor]:
    """PGD in eval mode that counts, per sample, the iterates before a step that are classified right: (x', Kappa).

    loss_fn: "cent", cross-entropy; "cw", the margin until it is 50; "kl", KL from the prediction on the clean images,
    which needs the start of "trades". category: the start, "Madry" uniform in the ball and clipped, "trades" 0.001 of
    normal noise. rand_init=False starts at the images.

    Kept: the model is left in eval mode; the uniform start is drawn by numpy, the normal one by torch on the CPU; Kappa
    is a float tensor.

    Differs: Kappa is counted on the device and stays there (published: sample by sample, a synchronisation each, and on
    the CPU); ``model.zero_grad()`` is not called, since no gradient reaches the weights; "cw" takes any number of
    classes. Other names, images outside [0, 1] and a radius of 1 or more raise ValueError.
    """
    require_choice("loss_fn", loss_fn, tuple(_OBJECTIVES))
    require_choice("category", category, ("trades", "Madry"))
    flag("rand_init", rand_init)
    if loss_fn == "kl" and (category != "trades" or not rand_init):
        raise ValueError(
            f'loss_fn="kl" needs category="trades" and rand_init=True (it has no gradient at the images), got '
            f"category={category!r} and rand_init={rand_init}"
        )
    require_count("num_steps", num_steps, 0)
    require_radius("epsilon", epsilon, clip_min=0, clip_max=1)
    require_images(data)
    data, target = data.detach(), class_indices("target", target, data)
    attack = PGD(epsilon, step_size, num_steps, objective=_OBJECTIVES[loss_fn], count_correct=True)
    model.eval()
    start = _start(data, epsilon, category) if rand_init else data
    batch = attack.batch(data, target, start=start, seeded=False)
    if loss_fn == "cw":
        batch = replace(batch, goal=_Margin(batch.goal.labels, kind="margin"))
    found = attack.on(model, batch)
    assert found.kappa is not None
    return found.adv, found.kappa.to(torch.get_default_dtype())


def cwloss(output: Tensor, target: Tensor, confidence: float = 50, num_classes: int = 10) -> Tensor:
    """``-sum max(z_y - max_{k != y} z_k + confidence, 0)``, which an attack climbs.

    Differs: the classes are those of ``output``, whatever ``num_classes`` says.
    """
    return (losses.margin_loss(output, target, reduction="none") - confidence).clamp(max=0.0).sum()


def eval_clean(model: nn.Module, test_loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in [0, 1]); the model is left in eval mode.

    Differs: the mean is over the images that the loader gives, not over its ``dataset``, which need not be all of them.
    """
    return evaluate(test_loader, model, lambda data, target: data)


def eval_robust(
    model: nn.Module,
    test_loader: Iterable[tuple[Tensor, Tensor]],
    perturb_steps: int,
    epsilon: float,
    step_size: float,
    loss_fn: str,
    category: str,
    random: bool,
) -> tuple[float, float]:
    """As ``eval_clean``, on the adversaries of ``GA_PGD``."""

    def adversaries(data: Tensor, target: Tensor) -> Tensor:
        return GA_PGD(model, data, target, epsilon, step_size, perturb_steps, loss_fn, category, random)[0]

    return evaluate(test_loader, model, adversaries)


def GAIR(num_steps: int, Kappa: Tensor, Lambda: float | Tensor, func: str) -> Tensor:
    """Weights of the samples, over their mean: with h = num_steps // 2,

        Tanh      (1 + tanh(Lambda + 5 (h - Kappa) / h)) / 2
        Sigmoid   sigmoid(Lambda + 5 (h - Kappa) / h)
        Discrete  1 - Kappa / (num_steps + 1)

    Differs: normalised in logarithms, so that the smallest weights keep their relative precision and a batch of
    which all weights underflow gets finite ones; other names of ``func`` raise ValueError.
    """
    require_choice("func", func, ("Tanh", "Sigmoid", "Discrete"))
    require_count("num_steps", num_steps, 0 if func == "Discrete" else 2)
    if func == "Discrete":
        weights = (num_steps + 1 - Kappa) / (num_steps + 1)
        return weights * len(weights) / weights.sum()
    half = num_steps // 2
    score = Lambda + (half - Kappa) * 5 / half
    score = 2 * score if func == "Tanh" else score  # (1 + tanh(s)) / 2 = sigmoid(2 s)
    return len(Kappa) * F.logsigmoid(score).softmax(0)


@dataclass
class _Margin(Objective):
    """The margin, which nobody climbs any further above 50."""

    def cotangent(self, logits: Tensor) -> Tensor:
        made = self._of(logits, kappa=self.kappa, return_value=True)
        assert made.cotangent is not None and made.value is not None
        return torch.where(made.value[:, None] <= 50, made.cotangent, 0).to(logits.dtype)


def _start(x: Tensor, epsilon: float, category: str) -> Tensor:
    if category == "trades":
        return (x + noise_near(x)).to(x.dtype)
    import numpy as np  # not needed by anything else here

    noise = torch.from_numpy(np.random.uniform(-epsilon, epsilon, x.shape)).float()
    return (x + noise.to(x.device)).clamp(0.0, 1.0).to(x.dtype)


__getattr__ = refuse(__name__, __all__, ("GA_earlystop",), "Import it from the original's earlystop.py (GAIR-FAT).")
