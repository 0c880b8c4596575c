"""Backward Smoothing: a start of the attack that is found from the output (Chen et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from atlas_kernels import attack_cotangent, pgd_step, trades_loss
from atlas_kernels.attacks import PGD, attacking
from atlas_kernels.attacks.float16 import pull_back
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..noise import uniform
from ..options import option
from .base import Method, Metrics, State
from .terms import accuracy, wide


@dataclass(frozen=True)
class BackwardSmoothing(Method):
    """Backward Smoothing (Chen, Cheng, Gan, Gu & Liu, AAAI 2022, arXiv 2010.01278): TRADES' loss on another adversary.

        L = CE(z(x), y) + beta KL(p(x) || p(x'))
        x_1 = one step down KL(t || p(x)) from x itself, t = softmax(z(x) + gamma psi), psi uniform in [-1, 1]^C
        x'  = K steps up KL(p(x) || p(.)) from x_1

    Each step is a projected sign step, in eval mode. Gradients of L flow to both arguments of its KL. One forward of x
    gives t, the first step and the reference of the second KL, where the published code makes two: 2K + 8 passes.
    With K = 1 and the default step of eps a pixel ends at -eps, 0 or +eps, but for the clip to the image range.
    The published code has no setting for MNIST.
    """

    name: ClassVar[str] = "backward_smoothing"

    steps: int = option(1, "attack steps after the first, backward one", low=1)
    step_size: float | None = option(None, "of every step, the backward one too; default: eps", above=0)
    gamma: float = option(1.0, "size of the noise on the logits", low=0)
    beta: float = option(10.0, "weight of the KL term, as in the authors' README; their script's default is 6", low=0)

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        x, _, ids = batch
        step_size = self._step_size
        with attacking(model, "eval", key):
            leaf = x.detach().requires_grad_()
            logits = logits_of(model(leaf))
            clean = wide(logits.detach())
            target = clean + self.gamma * uniform(clean, key, ids, 1)
            cotangent = attack_cotangent(clean, objective="kl", reference=target, descend=True).cotangent
            assert cotangent is not None
            grad = pull_back(model, logits, leaf, cotangent)
        start = pgd_step(x, grad, x, self.eps, step_size)
        attack = PGD(self.eps, step_size, self.steps, objective="kl")
        return attack(model, x, reference_logits=clean, start=start, key=key, ids=ids)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(batch.x))
        adv_logits = logits_of(model(given))
        loss = batch.over_labels(lambda y: self.smoothed(trades_loss(logits, adv_logits, y, beta=self.beta), logits, y))
        return loss, {"clean": accuracy(logits, batch), "adv": accuracy(adv_logits, batch)}
