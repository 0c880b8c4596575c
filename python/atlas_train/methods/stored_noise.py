"""A perturbation that is kept for each training image from epoch to epoch, as FGSM-PGI has it: the start of an attack,
and its step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from atlas_kernels import stored_start, stored_step
from atlas_kernels.core import advise_huge_pages
from atlas_kernels.layout import compute_dtype, is_channels_last

from ..data import Batch
from ..noise import uniform
from .base import State

StoreType = Literal["float32", "bfloat16"]
_DRAW, _ROWS = 2**16, 4096  # of the first perturbations: the number of their draw, and how many are drawn at once
_EXACT = 1e-9  # of a period: 0.4 of 100 epochs are 40


def first_places(ids: Tensor) -> Tensor:
    """For each image of a batch the first place that it has there."""
    return (ids[:, None] == ids).int().argmax(1)


@dataclass(frozen=True)
class StoredNoise:
    """``state.memory["perturbations"]`` and ``["momentum"]``, with a row for each training image.

    Perturbations begin at +-eps, each pixel's sign at random, and momentum at 0; both do so again after every ``reset``
    of the training. Where the memory holds none, they begin. ``type``: of what is kept; float32 is
    float64 for such images. ``step_size``: eps, if it is None.
    """

    stores: ClassVar[tuple[str, ...]] = ("perturbations", "momentum")

    eps: float
    decay: float = 0.3
    reset: float = 0.4
    clip_start: bool = True
    type: StoreType = "float32"
    step_size: float | None = None

    def before_step(self, batch: Batch, key: Tensor, state: State) -> None:
        """Makes the store, and begins anew where that is due."""
        if self.stores[0] not in state.memory:
            self._make(batch, state)
        elif not self._is_due(state):
            return
        perturbations, momentum = (state.memory[name] for name in self.stores)
        momentum.zero_()
        for first in range(0, len(perturbations), _ROWS):
            part = perturbations[first : first + _ROWS]
            ids = torch.arange(first, first + len(part), device=part.device)
            numbers = uniform(part.to(compute_dtype(part.dtype)), key, ids, _DRAW)
            part.copy_(torch.full_like(numbers, self.eps).copysign_(numbers))

    def start(self, batch: Batch, state: State) -> Tensor:
        """Each image at its perturbation, in the image range unless ``clip_start`` is off."""
        low, high = (0.0, 1.0) if self.clip_start else (-math.inf, math.inf)
        return stored_start(batch.x, state.memory[self.stores[0]], batch.ids, clip_min=low, clip_max=high)

    def step(self, batch: Batch, grad: Tensor, state: State, *, of_mean: bool = False) -> Tensor:
        """The adversaries by the gradient at the start; then what is kept of these images is moved on.

        An image that a batch holds twice is kept as its first place there leaves it.

        Processes that share a batch all take this step on all of it: the store of each holds what every image has, and
        the next epoch deals the images out otherwise. of_mean: ``grad`` is that of a mean over the images.
        """
        kept, momentum = (state.memory[name] for name in self.stores)
        how: dict[str, Any] = {"step_size": self.step_size, "decay": self.decay}
        (x, _, ids), grad = map(batch.deal.gathered, batch), batch.deal.gathered(grad, of_mean=of_mean)
        if not state.repeats:
            return batch.deal.own(stored_step(x, grad, kept, momentum, ids, self.eps, **how))
        numbers = torch.arange(len(ids), device=ids.device)
        rows = kept[ids], momentum[ids]
        adv = batch.deal.own(stored_step(x, grad, *rows, numbers, self.eps, **how))
        first = first_places(ids)
        for values, moved in zip((kept, momentum), rows, strict=True):
            values[ids] = moved[first]  # in whatever order, for equal ids have equal rows
        return adv

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """As ``Method.require_memory``."""
        for name in self.stores:
            t = memory.get(name)
            if (t is None) != (memory.get(self.stores[0]) is None):
                raise ValueError(f"memory holds one of {' and '.join(self.stores)} without the other")
            if t is None:
                continue
            if list(t.shape) != list(shape) or t.dtype != self._type:
                raise ValueError(
                    f"memory {name} is {t.dtype} {list(t.shape)}, expected floats {list(shape)} in {self._type}"
                )
            most = self.eps * (1 + 1e-2) if name == self.stores[0] else math.inf  # 16 bits round
            if not bool(((t.abs() <= most) & t.isfinite()).all()):
                raise ValueError(f"memory {name} must hold finite numbers, perturbations within eps")

    def bytes(self, shape: Sequence[int]) -> int:
        """What a store of the images [N, C, H, W] takes."""
        return len(self.stores) * math.prod(shape) * self._type.itemsize

    @property
    def _type(self) -> torch.dtype:
        return torch.float32 if self.type == "float32" else torch.bfloat16

    def _make(self, batch: Batch, state: State) -> None:
        size = state.size or int(batch.ids.max()) + 1  # nobody said how large the set is: a loss outside of the trainer
        layout = torch.channels_last if is_channels_last(batch.x) else torch.contiguous_format
        dtype, shape = self._type, (size, *batch.x.shape[1:])
        dtype = batch.x.dtype if dtype == torch.float32 and batch.x.dtype == torch.float64 else dtype
        for name in self.stores:
            made = torch.empty(shape, dtype=dtype, device=batch.x.device, memory_format=layout)
            state.memory[name] = advise_huge_pages(made)

    def _is_due(self, state: State) -> bool:
        """Whether the coming step is the first after a whole number of periods."""
        period = self.reset * state.total_steps
        now, last = (math.floor(step / period + _EXACT) for step in (state.step, state.step - 1))
        return state.step > 0 and now > last
