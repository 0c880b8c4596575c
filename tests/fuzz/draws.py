"""Seeded random arguments: shapes, dtypes, memory layouts, special values, lazily negated tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, 1e-45, 3e38)


class Draw:
    """All choices of one call, a function of its seed alone."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, choices: Sequence[Choice]) -> Choice:
        return self.random.choice(choices)

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return self.random.randint(low, high)

    def dtype(self) -> torch.dtype:
        return FLOATS[0] if self.chance(0.5) else self.one_of(FLOATS)

    def image_shape(self) -> tuple[int, ...]:
        """[B, ...] of one to five dimensions: mostly small, now and then large enough for blocks and threads."""
        if self.chance(0.02):
            return self.one_of([(3, 3, 65, 67), (70, 3, 17, 9), (2, 70_001), (300, 40)])
        sizes = [self.integer(0, 6) if self.chance(0.1) else self.integer(1, 6)]
        sizes += [self.integer(1, 9) for _ in range(self.integer(0, 4))]
        if self.chance(0.02):  # no channels or no pixels
            sizes[self.integer(0, len(sizes) - 1)] = 0
        return tuple(sizes)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(tuple(shape), generator=self.generator)

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        return scale * torch.randn(tuple(shape), generator=self.generator)

    def integers(self, high: int, shape: Sequence[int], low: int = 0) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def with_special(self, t: Tensor, share: float = 0.2, values: Sequence[float] = SPECIAL) -> Tensor:
        """``t`` with some entries replaced by NaN, infinities, zeros and extreme numbers."""
        picked = torch.tensor(values)[self.integers(len(values), t.shape)]
        return torch.where(self.uniform(t.shape) < share, picked, t)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values in another memory layout."""
        if self.chance(0.5) or not t.ndim:
            return t.contiguous()
        return self.one_of(_LAYOUTS)(t)

    def per_sample(self, values: Tensor) -> float | Tensor:
        """A number, or a tensor with a number for each sample."""
        if self.chance(0.5):
            return float(values[0]) if len(values) else 0.1
        if self.chance(0.2):
            return self.laid_out(values.to(self.one_of((torch.float64, torch.float16))))
        return self.laid_out(values)


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.ndim, torch.contiguous_format))


def _strided(t: Tensor) -> Tensor:
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
    wide[..., 1::2] = t
    return wide[..., 1::2]


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _unaligned(t: Tensor) -> Tensor:
    room = t.new_zeros(t.numel() + 1)
    room[1:] = t.reshape(-1)
    return room[1:].view(t.shape)


def _negated(t: Tensor) -> Tensor:
    """Stored with the other sign and the negative bit set, as the imaginary part of a conjugate is."""
    if t.dtype in (torch.bool, torch.uint8):
        return t
    return torch._neg_view(t.neg().contiguous())


_LAYOUTS = _channels_last, _strided, _transposed, _unaligned, _negated
