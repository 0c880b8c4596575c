"""Square (Andriushchenko et al. 2020, arXiv 1912.00049): random search with squares, by forwards alone."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import flag, number_in, require_float_images
from ..layout import column, compute_dtype
from ..perturb import random_start
from ..schema import L1, L2, LINF
from .arguments import require_choice
from .batch import Batch
from .objective import Model
from .search import Search, State

#: Of 10,000 queries, those after which the squares cover half as much.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_ROUND = 0x9E3779B1  # far from a round to the next, in 32 bits
_TINY = 1e-12


@dataclass(frozen=True)
class Square(Search):
    """Changes a random square of the image in each query, and keeps the change where it makes the objective larger. It
    needs no gradient, so the model need not be differentiable.

    In l_inf it starts with vertical stripes of +eps and -eps, and a query sets a square, per channel, to +eps or -eps.
    In l2 and l1 it starts with a grid of small patterns; a query takes the perturbation of one window and spends it on
    another one. As in the published code, a window that is smaller than the image never has its last row or column.

    Images are [B, C, H, W]. Arguments, calls and errors as in ``Search``, and:

    Args:
        steps: queries of one round, after the one that its start takes.
        p_init: share of the image that the first squares cover. They shrink by the published schedule, which is made
            for 10,000 queries.
        stretched: that schedule is stretched to ``steps``, as in the paper. AutoAttack takes the first half of it.
        objective: what is to grow: "margin", or "ce" as an alternative.
    """

    steps: int = 5000
    _: KW_ONLY
    p_init: float = 0.8
    stretched: bool = True
    objective: str = "margin"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("objective", self.objective, ("margin", "ce"))
        flag("stretched", self.stretched)
        if number_in("p_init", self.p_init, 0.0, 1.0) == 0:
            raise ValueError("p_init=0 leaves nothing to change: give a share of the image, as 0.8")

    def batch(self, x: Tensor, y: Tensor, **options: Any) -> Batch:
        require_float_images("x", x)
        if x.ndim != 4:
            raise ValueError(f"Square needs images [B, C, H, W], got x {list(x.shape)}: give x that shape")
        return super().batch(x, y, **options)

    def begin(self, model: Model, batch: Batch, draw: Tensor) -> State:
        adv = self._stripes(batch, draw) if self.norm == LINF else self._grid(batch, draw)
        objective, fooled = self._judge(model, batch, adv)
        return {"adv": adv, "fooled": fooled, "number": torch.zeros_like(draw), "draw": draw, "objective": objective}

    def advance(self, model: Model, batch: Batch, state: State) -> State:
        adv = self.candidate(batch, state)
        objective, fooled = self._judge(model, batch, adv)
        better = fooled | (objective > state["objective"])
        return {
            **state,
            "adv": torch.where(column(better, adv), adv, state["adv"]),
            "objective": torch.where(better, objective, state["objective"]),
            "fooled": fooled,
            "number": state["number"] + 1,
        }

    def candidate(self, batch: Batch, state: State) -> Tensor:
        """What the next query asks about: the strongest points so far, each with a change in a square."""
        adv, number = state["adv"], state["number"]
        channels, *sides = adv.shape[1:]
        patterns = _patterns(self.norm, self.p_init, *sides, adv.device, compute_dtype(adv.dtype))
        noise = self._noise(batch, state["draw"], number + 1, 5 + channels)
        signs = _signs(noise[:, 5:, None, None])
        level = patterns.level(number, self.steps if self.stretched else 10_000)
        first = patterns.window(level, noise[:, :2])
        if self.norm == LINF:
            # From one side of the ball to the other it is 2 eps: with 3 rounding cannot stop short of it.
            return batch.step(adv, signs * first.rows * first.columns, batch.eps * 3)
        second = patterns.window(level, noise[:, 2:4])
        pattern = signs * patterns.drawn(level, noise[:, 4] < 0, first)
        return self._filled(batch, self._moved(batch, (adv - batch.x).to(noise.dtype), pattern, first, second))

    def _moved(self, batch: Batch, delta: Tensor, pattern: Tensor, first: _Window, second: _Window) -> Tensor:
        """The perturbation ``delta`` with all that is in one of two windows, and what it falls short of eps, moved into
        the first of them, where it takes the form of ``pattern`` and of what was there; in the memory of both."""
        order = _order(self.norm)

        def size(t: Tensor, dims: tuple[int, ...] = (2, 3)) -> Tensor:
            return torch.linalg.vector_norm(t, order, dim=dims, keepdim=True)

        there, held = delta * first.inside, delta * (first.inside | second.inside)
        short = (column(batch.eps, delta) ** order - size(delta, (1, 2, 3)) ** order).clamp_min(0.0)
        channels = delta.shape[1]
        room = (short / channels + size(held) ** order) ** (1 / order)
        if self.norm == L1:
            room = room * channels  # as published; the projection takes back what is too much
        form = pattern.addcdiv_(there, size(there) + _TINY)
        return delta.sub_(held).add_(form.mul_(room / (size(form) + _TINY)))

    def _stripes(self, batch: Batch, draw: Tensor) -> Tensor:
        _, channels, height, width = batch.x.shape
        signs = _signs(self._noise(batch, draw, 0, channels, 1, width)).expand(-1, -1, height, -1)
        return batch.step(batch.x, signs, batch.eps)

    def _grid(self, batch: Batch, draw: Tensor) -> Tensor:
        """Tiles, whose sides are a fifth of the height, each with a pattern; the ends of the image are left out."""
        _, channels, height, width = batch.x.shape
        side = max(1, height // 5)
        begin = max(0, height - 5 * side) // 2
        down, across = ((length - begin) // side for length in (height, width))
        noise = self._noise(batch, draw, 0, 1 + channels, down, 1, across, 1)
        tile = _pattern(side, self.norm).to(noise)[:, None]  # [side, 1, side], as each lies in the noise
        tiles = torch.where(noise[:, :1] < 0, tile.transpose(0, 2), tile) * _signs(noise[:, 1:])
        end, right = begin + down * side, begin + across * side
        delta = torch.zeros_like(batch.x, dtype=noise.dtype)
        delta[:, :, begin:end, begin:right] = tiles.reshape(-1, channels, down * side, across * side)
        return self._filled(batch, delta)

    def _filled(self, batch: Batch, delta: Tensor) -> Tensor:
        """x with a perturbation of any length, in l2 brought to that of eps, in l1 into the ball."""
        return batch.step(batch.x, delta, batch.eps) if self.norm == L2 else batch.inside(batch.x + delta)

    def _noise(self, batch: Batch, draw: Tensor, number: Tensor | int, *shape: int) -> Tensor:
        """Uniform in [-1, 1), [B, *shape]; what a row gets goes by its sample, its round and its query. In one launch,
        that of a random start, in which each query of a sample counts as a sample."""
        ids = batch.numbers() * (self.steps + 1) + draw * _ROUND + number
        zeros = torch.zeros(len(ids), math.prod(shape), dtype=compute_dtype(batch.x.dtype), device=ids.device)
        noise = random_start(zeros, 1.0, key=batch.key, ids=ids, clip_min=-1.0, clip_max=1.0, out=zeros)
        return noise.view(-1, *shape)

    def _judge(self, model: Model, batch: Batch, adv: Tensor) -> tuple[Tensor, Tensor]:
        logits = batch.goal.predict(model, adv)
        return replace(batch.goal, kind=self.objective).judge(logits)


class _Window(NamedTuple):
    """A square in each image: which rows [B, 1, H, 1] and columns [B, 1, 1, W] it has, and how far down [B, H] and
    across [B, W] from its corner they are."""

    rows: Tensor
    columns: Tensor
    down: Tensor
    across: Tensor

    @property
    def inside(self) -> Tensor:
        return self.rows & self.columns


@dataclass(frozen=True)
class _Patterns:
    """By level, of which there is one for each size of squares: that size, and in l2 and l1 the pattern of a square and
    its transpose, with zeros around it, [levels, 2, side, side]."""

    sizes: Tensor
    forms: Tensor
    halvings: Tensor
    height: int
    width: int

    def level(self, number: Tensor, steps: int) -> Tensor:
        """That of the query after ``number`` others."""
        return torch.bucketize((number.double() / steps * 10_000).long(), self.halvings)

    def window(self, level: Tensor, place: Tensor) -> _Window:
        """Those that begin at ``place``, two numbers in [-1, 1) for each image."""
        size = self.sizes[level]
        (rows, down), (columns, across) = (
            _span((at + 1) / 2, size, length) for at, length in zip(place.T, (self.height, self.width), strict=True)
        )
        return _Window(rows[:, None, :, None], columns[:, None, None], down, across)

    def drawn(self, level: Tensor, flipped: Tensor, window: _Window) -> Tensor:
        """The patterns in their windows, and zeros elsewhere, [B, 1, H, W]."""
        side = self.forms.shape[-1]
        rows, columns = ((at + 1).clamp(0, side - 1) for at in (window.down, window.across))
        above = (2 * level + flipped)[:, None] * side + rows
        return self.forms.flatten()[(above * side)[:, :, None] + columns[:, None]][:, None]


def _span(place: Tensor, size: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where of ``length`` pixels those of a window are, bool [B, length], and how far each pixel is from its first."""
    at = torch.arange(length, device=size.device) - (place * (length - size)).long()[:, None]
    return (at >= 0) & (at < size[:, None]), at


@lru_cache(maxsize=8)
def _patterns(norm: str, p_init: float, height: int, width: int, device: torch.device, dtype: torch.dtype) -> _Patterns:
    sizes = []
    for level in range(len(_HALVINGS) + 1):
        size = round(math.sqrt(p_init / 2**level * height * width))
        size = max(size, 1) if norm == LINF else max(size, 3) // 2 * 2 + 1
        sizes.append(min(size, height, width))
    largest = 0 if norm == LINF else max(sizes)
    forms = torch.zeros(len(sizes), 2, largest + 2, largest + 2, dtype=torch.float64)
    if norm != LINF:
        for form, size in zip(forms, sizes, strict=True):
            pattern = _pattern(size, norm)
            form[:, 1 : size + 1, 1 : size + 1] = torch.stack([pattern, pattern.T])
    numbers, halvings = (torch.tensor(values, device=device) for values in (sizes, _HALVINGS))
    return _Patterns(numbers, forms.to(device, dtype), halvings, height, width)


def _pattern(size: int, norm: str) -> Tensor:
    """A square whose upper half rises to a peak and whose lower half falls to one, of norm 1; float64 [size, size]."""
    halves = [
        sign * _unit(_peak(rows, size, norm), norm) for sign, rows in ((1, size // 2), (-1, size - size // 2)) if rows
    ]
    return _unit(torch.cat(halves), norm)


def _peak(height: int, width: int, norm: str) -> Tensor:
    """Concentric rectangles on top of each other: the n-th from the middle adds 1 / n^2, in l1 1 / n^4."""
    down, across = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    ring = torch.maximum(down[:, None], across)
    layers = 1.0 / torch.arange(1, int(ring.max()) + 2, dtype=torch.float64) ** (2 if norm == L2 else 4)
    return layers.flip(0).cumsum(0).flip(0)[ring]


def _unit(t: Tensor, norm: str) -> Tensor:
    return t / torch.linalg.vector_norm(t, _order(norm))


def _order(norm: str) -> int:
    return 2 if norm == L2 else 1


def _signs(noise: Tensor) -> Tensor:
    return torch.where(noise < 0, -1.0, 1.0).to(noise.dtype)
