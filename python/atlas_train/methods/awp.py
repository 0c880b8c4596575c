"""AWP: adversarial weight perturbation, around a method (Wu, Xia & Wang 2020)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels.attacks.held import put_back
from atlas_kernels.attacks.weights import weight_directions

from ..data import Batch
from ..options import option
from .around import Around
from .base import Descent, Method, Metrics, State


@dataclass(frozen=True)
class AWP(Around):
    """Adversarial weight perturbation (Wu, Xia & Wang 2020, arXiv 2004.05884) around a method.

        v_l = gamma ||w_l|| g_l / ||g_l||;  w <- w + v;  a step of the method;  w <- w - v

    g: the gradient of the method's loss at w; l: every weight with more than one dimension. Gradient, momentum and
    weight decay of the step are those of the perturbed weights, as published. The published code takes v from a step
    of a second network; here it is the gradient itself, on copies of BatchNorm's statistics, so that only the loss at
    w + v moves them. It costs one loss and its gradient, without the attack: 3 passes more for ADV, 6 for TRADES.
    Published: gamma 0.01 without a warm-up for ADV; 0.005 for TRADES from the tenth epoch on (``warmup`` 9).

    For a method whose loss is ``objective``; one that interleaves attack and updates raises ValueError. With TRADES'
    ``bn_compat`` the statistics see x, x', x, in the order of TRADES' own code; AWP's version of it runs x' first.
    """

    gamma: float = option(0.01, "length of the perturbation, as a share of each weight's norm", above=0)
    warmup: int = option(0, "first epochs, without the perturbation", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_wrappable(type(self.method))

    def phase(self, state: State) -> Hashable:
        inner = self.method.phase(state)
        return None if inner is None else (state.epoch < self.warmup, inner)

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        if state.epoch < self.warmup:
            return super().train_step(model, batch, key, state, descent)
        given = self.prepare(model, batch, key, state)
        with perturbed(model, self._directions(model, batch, given), self.gamma):
            loss, metrics = self.objective(model, batch, given)
            descent.backward(loss, metrics)
            descent.step()
        self.after_step(model, batch)
        return loss.detach(), metrics

    def _directions(self, model: nn.Module, batch: Batch, given: Any) -> dict[str, Tensor]:
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        with put_back(model, copy_buffers=True):
            loss, _ = self.objective(model, batch, given)
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
        return weight_directions(named, batch.deal.averaged(gradients, [weight for _, weight in named]))


@contextmanager
def perturbed(model: nn.Module, directions: dict[str, Tensor], gamma: float) -> Iterator[None]:
    """The weights plus gamma times their directions, subtracted again at the end; an exception puts them back whole."""
    parameters = dict(model.named_parameters())
    weights, steps = [parameters[name] for name in directions], [gamma * step for step in directions.values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        _add(weights, steps)
        yield
        _add(weights, [-step for step in steps])
    except BaseException:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        raise


@torch.no_grad()
def _add(weights: list[nn.Parameter], steps: list[Tensor]) -> None:
    for weight, step in zip(weights, steps, strict=True):
        weight.add_(step)
    torch.clear_autocast_cache()  # it holds 16-bit copies of the weights as they were


def require_wrappable(method: type[Method]) -> None:
    """Raises ValueError for a method whose step is its own."""
    if method.train_step is not Method.train_step:
        raise ValueError(
            f"awp needs a method whose loss stands apart from its updates, and {method.name} interleaves the two "
            "(it has a train_step of its own): set awp=0, or choose another method, for example adv or trades"
        )
