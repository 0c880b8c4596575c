"""A method around another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..data import Batch
from ..options import OF_RUN, Norm
from .base import EVERY_NORM, Method, Metrics, State


@dataclass(frozen=True)
class Around(Method):
    """Is the method inside, but for what a subclass changes."""

    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM

    eps: float = field(init=False)
    norm: Norm = field(init=False)
    label_smoothing: float = field(init=False)
    method: Method

    def __post_init__(self) -> None:
        for name in (*OF_RUN, "name", "adversarial", "no_graph", "no_compile", "sizes_vary", "augments", "stores"):
            object.__setattr__(self, name, getattr(self.method, name))
        super().__post_init__()

    @property
    def recomputable(self) -> bool:
        return self.method.recomputable

    @property
    def updates(self) -> int:
        return self.method.updates

    @property
    def one_label(self) -> str:
        return self.method.one_label

    @property
    def no_sync(self) -> str:
        return self.method.no_sync

    def in_use(self) -> dict[str, Any]:
        return self.method.in_use()

    def scaled(self, share: float) -> Method:
        return replace(self, method=self.method.scaled(share))

    def with_steps(self, steps: int) -> Method:
        return replace(self, method=self.method.with_steps(steps))

    def phase(self, state: State) -> Hashable:
        return self.method.phase(state)

    def changing(self, state: State) -> tuple[float, ...]:
        return self.method.changing(state)

    def variant(self, state: State) -> Hashable:
        return self.method.variant(state)

    def parts(self, state: State) -> Sequence[tuple[float, Method]]:
        return [(share, replace(self, method=method)) for share, method in self.method.parts(state)]

    def require(self, model: nn.Module) -> None:
        self.method.require(model)

    def require_memory(self, memory: Any, shape: Sequence[int]) -> None:
        self.method.require_memory(memory, shape)

    def store_bytes(self, shape: Sequence[int]) -> int:
        return self.method.store_bytes(shape)

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        self.method.before_step(model, batch, key, state)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Any:
        return self.method.prepare(model, batch, key, state)

    def objective(self, model: nn.Module, batch: Batch, given: Any) -> tuple[Tensor, Metrics]:
        return self.method.objective(model, batch, given)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        return self.method.loss(model, batch, key, state)

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        self.method.after_step(model, batch)
