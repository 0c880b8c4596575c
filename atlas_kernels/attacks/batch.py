"""What an attack is given, checked, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..perturb import pgd_step, project, random_start
from .objective import Objective

Held = TypeVar("Held")


class AttackResult(NamedTuple):
    """Adversaries [B, ...], the noise key that replays them and, where the attack had to know, how strong they are.

    fooled (bool[B]: misclassified, or the target reached) and objective (float[B], larger is stronger, so negated if
    targeted) are None where knowing them would cost a forward, so they are there with restarts > 1 or keep="best";
    fooled needs labels too. kappa (int64[B]) is there with ``count_correct``.
    """

    adv: Tensor
    key: Tensor
    fooled: Tensor | None = None
    objective: Tensor | None = None
    kappa: Tensor | None = None


class LastStep(NamedTuple):
    """Where an attack stands just before its last step: the iterate, the input gradient there, and the noise key. The
    gradient through a network in float16 is float32."""

    adv: Tensor
    grad: Tensor
    key: Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of one attack, or those that are still in it, and the ball and the range that they stay in.

    given_start: like x, or None. goal: what is climbed. key, ids: of the noise. seeded: whether random layers draw from
    the key too, not from the global state, as in published code. step_size: of the last step. clean: the logits of x,
    where the attack has asked for them.
    """

    x: Tensor
    given_start: Tensor | None
    goal: Objective
    key: Tensor
    ids: Tensor | None
    seeded: bool
    norm: str
    random_start: bool
    eps: float | Tensor
    step_size: float | Tensor
    clip_min: float | Tensor
    clip_max: float | Tensor
    _: KW_ONLY
    clean: Tensor | None = None

    def start(self, draw: int) -> Tensor:
        """The first iterate, a tensor of its own: the one given, x, or a random one, another for each ``draw``."""
        if self.given_start is not None:
            return self.given_start.clone()
        if not self.random_start:
            return self.x.clone()
        return random_start(
            self.x, self.eps, norm=self.norm, key=self.key, ids=self.ids, draw=draw, clip_min=self.clip_min,
            clip_max=self.clip_max,
        )  # fmt: skip

    def step(self, adv: Tensor, direction: Tensor, size: float | Tensor | None = None, **options: Any) -> Tensor:
        """``pgd_step`` of ``size`` (default: ``step_size``) along ``direction``, or against it if targeted; its result
        is in ball and range. options: more of ``pgd_step``'s."""
        # Not in place: a hook of the user's may have kept the iterate.
        return pgd_step(
            adv, direction, self.x, self.eps, self.step_size if size is None else size, norm=self.norm,
            clip_min=self.clip_min, clip_max=self.clip_max, descend=self.goal.targeted, **options,
        )  # fmt: skip

    def inside(self, points: Tensor) -> Tensor:
        """``points`` brought into ball and range."""
        points = points.to(self.x.dtype)
        return project(points, self.x, self.eps, norm=self.norm, clip_min=self.clip_min, clip_max=self.clip_max)

    def every_row(self) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device)

    def numbers(self) -> Tensor:
        """The samples' numbers in the noise, int64 [B]."""
        # Of the numbers the low 32 bits count; the base's alone, so that the sum fits 64.
        return (self.key[1] & 0xFFFFFFFF) + self.every_row() if self.ids is None else self.ids

    def rows(self, index: Tensor) -> Batch:
        """The same for some of the samples, with the noise that they had."""
        eps, step = (v[index] if isinstance(v, Tensor) else v for v in (self.eps, self.step_size))
        return replace(
            self,
            x=self.x[index],
            given_start=None if self.given_start is None else self.given_start[index],
            goal=self.goal.rows(index),
            ids=self.numbers()[index],
            eps=eps,
            step_size=step,
            clean=None if self.clean is None else self.clean[index],
        )

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        if self.x.device == device:
            return self
        return self.holding([tensor.to(device, non_blocking=True) for tensor in self.tensors()])

    def values(self) -> list[Any]:
        """All that it is made of, that of the goal too: tensors, numbers and names."""
        return list(_values(self))

    def tensors(self) -> list[Tensor]:
        return [value for value in self.values() if isinstance(value, Tensor)]

    def holding(self, tensors: Sequence[Tensor]) -> Batch:
        """The same with ``tensors`` in place of its own."""
        return _holding(self, iter(tensors))


def _values(holder: Any) -> Iterator[Any]:
    yield type(holder)
    for f in fields(holder):
        value = getattr(holder, f.name)
        if is_dataclass(value):
            yield from _values(value)
        else:
            yield value


def _holding(holder: Held, tensors: Iterator[Tensor]) -> Held:
    new: dict[str, Any] = {}
    for f in fields(holder):  # type: ignore[arg-type]
        value = getattr(holder, f.name)
        if isinstance(value, Tensor):
            new[f.name] = next(tensors)
        elif is_dataclass(value):
            new[f.name] = _holding(value, tensors)
    return replace(holder, **new)  # type: ignore[type-var]
