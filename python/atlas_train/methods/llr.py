"""LLR: adversarial robustness through local linearisation (Qin et al. 2019)."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import attack_cotangent, cross_entropy
from atlas_kernels.attacks import attacking
from atlas_kernels.attacks.float16 import pull_back
from atlas_kernels.layout import column
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..evaluate import eval_mode
from ..noise import uniform
from ..options import Switches, option
from .base import Method, Metrics, State
from .batchnorm import Statistics, constant, held, recorded
from .double_backward import loss_gradient
from .terms import accuracy, uncompiled, wide

BETAS, EPSILON = (0.9, 0.999), 1e-9  # of the inner Adam, as published


class Clean(NamedTuple):
    """The network at x: the logits of the training forward, losses [B] and their gradient, BatchNorm's statistics."""

    logits: Tensor
    losses: Tensor
    grad: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class LLR(Method):
    """Local linearity regularisation (Qin et al. 2019, arXiv 1907.02610), with the constants of the published code:

        L = ce_weight CE(z(x), y) + weight mean_i [ g_i(d*) + mu_ratio |d* . grad l_i(x)| ]
        g(d) = |l(x + d) - l(x) - d . grad l(x)|,    d* = argmax g over the eps-ball

    l is the cross-entropy of each sample. d* comes from K steps of Adam from a uniform start, each projected on the
    ball and the image range; it is a constant, and the gradient flows through l(x), l(x + d*) and grad l(x). l(x) and
    CE share a forward, which the published code runs twice: 2K + 9 passes.

    BatchNorm normalises x + d with the statistics of the clean batch, through which gradients flow, and running
    averages move once, for CE. Published for a softplus network without dropout; with dropout every l has a mask of
    its own.
    """

    name: ClassVar[str] = "llr"
    no_compile: ClassVar[str] = "llr, which differentiates a gradient at the input once more"
    lengths: ClassVar[tuple[str, ...]] = ()  # the steps of Adam are longer than the ball is wide

    switches: ClassVar[Switches] = dict.fromkeys(
        ("steps", "step_size", "mu_ratio", "ascent", "ramp"), [("weight", (0,))]
    )

    steps: int = option(10, "K, steps of the inner Adam", low=1)
    step_size: float = option(0.1, "learning rate of the inner Adam, in the unit of images in [0, 1]", above=0)
    ce_weight: float = option(2.0, "weight of the cross-entropy", low=0)
    weight: float = option(4.0, "weight of the local linearity, lambda in the paper", low=0)
    mu_ratio: float = option(0.3, "weight of |d* . grad l| beside g; mu over lambda in the paper", low=0)
    ascent: Literal["code", "exact"] = option(
        "code",
        "what Adam climbs. code: sign * grad l(x + d), as the published code, which holds d in the linear term of g "
        "constant. exact: the gradient of g, sign * (grad l(x + d) - grad l(x))",
    )
    ramp: float = option(
        0.005, "share of all steps in which eps grows from 0; published: 500 steps of 100,000", low=0, high=1
    )
    bn: Literal["clean_batch", "eval"] = option(
        "clean_batch",
        "BatchNorm in l. clean_batch: the statistics of the clean batch, as published. eval: running averages, with "
        "the whole network in eval mode but for CE (3 passes more)",
    )

    @property
    def recomputable(self) -> bool:
        return self.bn == "eval"

    def with_steps(self, steps: int) -> Method:
        return replace(self, steps=steps)

    def phase(self, state: State) -> Hashable:
        """The radius; in the ramp it is another at every step, so those are not recorded."""
        radius = self._radius(state)
        return radius if radius == self.eps else None

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        with attacking(model, "keep", key):
            return self._search(model, batch, key, state, self._clean(model, batch))

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        return self._combine(model, batch, self._clean(model, batch), given)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        """``objective`` on what ``prepare`` makes, with one clean forward for both."""
        clean = self._clean(model, batch)
        return self._combine(model, batch, clean, self._search(model, batch, key, state or State(), clean))

    def _clean(self, model: nn.Module, batch: Batch) -> Clean:
        network = uncompiled(model)
        if self.bn == "eval":
            # First, as it moves the running statistics that the rest keeps for its backward.
            logits = logits_of(model(batch.x))
            with eval_mode(network):
                return Clean(logits, *loss_gradient(network, batch.x, batch)[1:], {})
        with recorded(network) as statistics:
            return Clean(*loss_gradient(network, batch.x, batch), statistics)

    def _normalised(self, network: nn.Module, statistics: Statistics) -> AbstractContextManager[None]:
        return eval_mode(network) if self.bn == "eval" else held(statistics)

    def _search(self, model: nn.Module, batch: Batch, key: Tensor, state: State, clean: Clean) -> Tensor:
        """d*: ascent by Adam (Kingma & Ba 2015)."""
        x, network, radius = batch.x, uncompiled(model), self._radius(state)
        losses, grad = clean.losses.detach(), clean.grad.detach()
        d = _project(radius * uniform(x, key, batch.ids, 0), x, radius)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        with self._normalised(network, constant(clean.statistics)), attacking(network, "keep", key):
            for step in range(1, self.steps + 1):
                leaf = (x + d).requires_grad_()
                logits = logits_of(network(leaf))
                both = batch.over_labels(partial(_rise_and_value, wide(logits.detach())))
                rise, value = both[:, :-1], both[:, -1]
                sign = (value - losses - _dot(d, grad)).sign()
                up = pull_back(network, logits, leaf, rise * sign[:, None])
                if self.ascent == "exact":
                    up = up - column(sign, x) * grad
                mean = BETAS[0] * mean + (1 - BETAS[0]) * up
                square = BETAS[1] * square + (1 - BETAS[1]) * up.square()
                # The published mean over the batch divides the gradient by B; here B multiplies epsilon.
                scale = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON * batch.deal.total(x)
                d = _project(d + self.step_size * mean / (1 - BETAS[0] ** step) / scale, x, radius)
        return d

    def _radius(self, state: State) -> float:
        """eps, or less in the ramp."""
        length = self.ramp * state.total_steps
        return self.eps * min(1.0, state.step / length) if length >= 1 else self.eps

    def _combine(self, model: nn.Module, batch: Batch, clean: Clean, d: Tensor) -> tuple[Tensor, Metrics]:
        network = uncompiled(model)
        with self._normalised(network, clean.statistics):
            logits = logits_of(network(batch.x + d))
        linear = _dot(d, clean.grad)
        losses = batch.over_labels(lambda y: cross_entropy(logits, y, reduction="none"))
        gap = (losses - clean.losses - linear).abs()
        penalty = (gap + self.mu_ratio * linear.abs()).mean()
        loss = self.ce_weight * self.ce(clean.logits, batch) + self.weight * penalty
        return loss, {
            "clean": accuracy(clean.logits, batch),
            "adv": accuracy(logits, batch),
            "gap": gap.detach().mean(),
        }


def _rise_and_value(logits: Tensor, y: Tensor) -> Tensor:
    """The derivative of each sample's cross-entropy by its logits, and the cross-entropy, [B, C + 1]."""
    rise, _, value = attack_cotangent(logits, y, return_value=True)
    assert rise is not None and value is not None
    return torch.cat([rise, value[:, None]], 1)


def _project(d: Tensor, x: Tensor, radius: float) -> Tensor:
    """Into the l_inf ball, then the image range."""
    return (x + d.clamp(-radius, radius)).clamp(0, 1) - x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row, [B]."""
    return (a * b).flatten(1).sum(1)
