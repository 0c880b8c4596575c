"""A method whose attack changes over training: its radius grows, or some batches are attacked in other steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..data import Batch
from ..noise import chance
from ..options import option
from ..schedules import eps_share
from .around import Around
from .base import Descent, Method, Metrics, State


@dataclass(frozen=True)
class Curriculum(Around):
    """The method inside, in the first ``eps_warmup`` epochs with a smaller eps, and on a share ``mix_share`` of the
    batches with ``mix_steps`` attack steps instead of its own.

    In epoch e = 1, 2, .. of the warm-up eps is e / (eps_warmup + 1) of the whole, and so are steps and other lengths
    (``Method.lengths``). It is a constant of the epoch, so that a graph of the step is recorded once in each. Which
    batches are mixed in is a function of seed and step; either kind has its graph. Raises ValueError for a method that
    has no steps to choose.
    """

    eps_warmup: int = option(0, "first epochs, with a smaller eps", low=0)
    mix_share: float = option(0.0, "share of the batches with other attack steps", low=0, below=1)
    mix_steps: int = option(10, "their number", low=1)
    seed: int = option(0, "of the draw of batches", low=0)
    _made: dict[tuple[float, bool], Method] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix_share:
            self._now(1.0, True)

    def _share(self, state: State) -> float:
        return eps_share(state.epoch + 1, self.eps_warmup)

    def _mixed(self, state: State) -> bool:
        return chance(self.seed, state.step) < self.mix_share

    def now(self, state: State) -> Method:
        """The method that trains on the coming batch."""
        return self._now(self._share(state), self._mixed(state))

    def _now(self, share: float, mixed: bool) -> Method:
        if (share, mixed) not in self._made:
            method = self.method.with_steps(self.mix_steps) if mixed else self.method
            self._made[share, mixed] = method if share == 1 else method.scaled(share)
        return self._made[share, mixed]

    def parts(self, state: State) -> Sequence[tuple[float, Method]]:
        shares = {False: 1 - self.mix_share, True: self.mix_share}
        made = [(part, self._now(self._share(state), mixed)) for mixed, part in shares.items() if part]
        return [(part * share, method) for part, whole in made for share, method in whole.parts(state)]

    def phase(self, state: State) -> Hashable:
        inner = self.now(state).phase(state)
        return None if inner is None else (self._share(state), inner)

    def changing(self, state: State) -> tuple[float, ...]:
        return self.now(state).changing(state)

    def variant(self, state: State) -> Hashable:
        return self._mixed(state), self.now(state).variant(state)

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        self.now(state).before_step(model, batch, key, state)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> tuple[Method, Any]:
        method = self.now(state)
        return method, method.prepare(model, batch, key, state)

    def objective(self, model: nn.Module, batch: Batch, given: tuple[Method, Any]) -> tuple[Tensor, Metrics]:
        method, prepared = given
        return method.objective(model, batch, prepared)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        return self.now(state or State()).loss(model, batch, key, state)

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        return self.now(state).train_step(model, batch, key, state, descent)
