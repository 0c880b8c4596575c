"""GradAlign: one-step adversarial training with aligned gradients (Andriushchenko & Flammarion 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import pgd_step
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..deal import WHOLE, Whole
from ..noise import uniform
from ..options import option
from .base import Method, Metrics, State
from .double_backward import loss_gradient
from .mixed import samples
from .terms import accuracy


class Given(NamedTuple):
    """The adversary, the gradient g1 that made it, and the point of the ball where g2 is taken."""

    adv: Tensor
    grad: Tensor
    point: Tensor


@dataclass(frozen=True)
class GradAlign(Method):
    """GradAlign (Andriushchenko & Flammarion 2020, arXiv 2007.02617): L = CE(z(x'), y) + weight (1 - mean cos(g1, g2)).

    x' is one sign step of 1.25 eps along g1, the gradient of the loss at x, projected on ball and image range. g2 is
    the gradient at x + U(-eps, eps), which is not clipped to the image range, and alone is differentiated. The mean is
    over the samples whose two gradients are not zero. BatchNorm is in train mode in all three forwards. 11 passes; the
    published code also keeps a graph of g1 that nothing uses.

    There g1 passes a max and a min at the edges of the image range, whose derivative at pixels of exactly 0 or 1 is
    that of a tie and depends on the version of PyTorch; here it is 1, as in the paper's formula.
    """

    name: ClassVar[str] = "grad_align"
    no_compile: ClassVar[str] = "grad_align, which differentiates a gradient at the input once more"

    weight: float | None = option(
        None,
        "of the alignment; default: 0.02 * 10^(255 eps / 8), which is 0.2 for 8/255, as published for 2/255 to 16/255; "
        "for a larger eps as for 16/255, 2",
        low=0,
    )
    step_size: float | None = option(None, "step of the attack; default: 1.25 eps", above=0)
    start: Literal["zero", "random"] = option("zero", "of the attack: x, as published for GradAlign, or uniform")
    bn_compat: bool = option(
        False, "BatchNorm's running statistics also see the attack's forward, as in the published code"
    )

    @property
    def effective_weight(self) -> float:
        """``weight``, or its default."""
        return 0.02 * 10 ** (min(255 * self.eps, 16) / 8) if self.weight is None else self.weight

    _weight = effective_weight

    @property
    def _step_size(self) -> float:
        return 1.25 * self.eps if self.step_size is None else self.step_size

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Given:
        x, ids = batch.x, batch.ids
        step_size = self._step_size
        start = x + self.eps * uniform(x, key, ids, 0) if self.start == "random" else x
        inside = start.clamp(0, 1)
        attack = PGD(self.eps, step_size, 1, attack_mode="train", update_buffers=self.bn_compat)
        grad = attack.before_last_step(model, samples(attack, batch, key, inside)).grad
        grad = grad * (start == inside) if self.start == "random" else grad
        adv = pgd_step(start, grad, x, self.eps, step_size)
        return Given(adv, grad, x + self.eps * uniform(x, key, ids, 1))

    def objective(self, model: nn.Module, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given.adv))
        _, _, grad = loss_gradient(model, given.point, batch)
        penalty = misalignment(given.grad, grad, batch.deal)
        loss = self.ce(logits, batch) + self.effective_weight * penalty
        return loss, {"adv": accuracy(logits, batch), "misalignment": penalty.detach()}


def misalignment(a: Tensor, b: Tensor, deal: Whole = WHOLE) -> Tensor:
    """1 - cos(a_i, b_i), the mean over the rows where neither is zero; 0 where there is no such row."""
    a, b = (_sized(t.flatten(1)) for t in (a, b))
    norms = [torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (a, b)]
    kept = (norms[0] != 0) & (norms[1] != 0)
    unit_a, unit_b = (t / torch.where(kept, norm, 1.0) for t, norm in zip((a, b), norms, strict=True))
    gaps = deal.gathered(torch.where(kept[:, 0], 1 - (unit_a * unit_b).sum(1), 0.0))
    return gaps.sum() / deal.gathered(kept.long()).sum().clamp(min=1)


def _sized(t: Tensor) -> Tensor:
    """Each row over its largest entry, which no cosine depends on: squares of 1e-23 underflow in float32."""
    largest = t.detach().abs().amax(1, keepdim=True)
    return t / torch.where(largest > 0, largest, 1.0)
