"""Noise for attacks whose samples are not at the same iteration: a few numbers for each row of a batch.

They come from Philox4x32-10, as all noise does (see ``atlas_kernels/noise.py``): what a row draws depends on the seed,
its sample's number, its ``draw`` and its ``number``, and not on the rows beside it. ``draw`` is the round and
``number`` the iteration in it, an int or int64[B]: ``begin`` draws as 0, the first ``advance`` as 1. ``shape`` is that
of a row; two calls with the same draw and number give the same noise, so ask once for all that an iteration needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.reference.philox import below, philox4x32_10
from ..layout import compute_dtype
from ..schema import STREAM_SEARCH
from .batch import Batch

_MASK = 0xFFFFFFFF


@torch.no_grad()
def words(batch: Batch, draw: int | Tensor, number: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Random 32-bit words, int64 [B, *shape] in [0, 2**32)."""
    key, ids = batch.key, batch.numbers()
    count = math.prod(shape)
    place = torch.arange(-(-count // 4), device=key.device)[None]
    draw, number = (torch.as_tensor(v, device=key.device).view(-1, 1) for v in (draw, number))
    counter = place, ids[:, None] & _MASK, draw & _MASK, (STREAM_SEARCH | number << 8) & _MASK
    four = philox4x32_10(counter, key[0] & _MASK, key[0] >> 32 & _MASK)
    return torch.stack(torch.broadcast_tensors(*four), dim=-1).flatten(1)[:, :count].view(len(ids), *shape)


def uniform(batch: Batch, draw: int | Tensor, number: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform in [0, 1) on a grid of 2**-24, [B, *shape] in the dtype that the images are computed in."""
    return _unit(words(batch, draw, number, shape), batch)


def signs(batch: Batch, draw: int | Tensor, number: int | Tensor, shape: Sequence[int]) -> Tensor:
    """-1 or 1, each as likely."""
    return 1 - 2 * (words(batch, draw, number, shape) >> 31).to(compute_dtype(batch.x.dtype))


def integers(
    batch: Batch, draw: int | Tensor, number: int | Tensor, shape: Sequence[int], bound: int | Tensor
) -> Tensor:
    """Uniform integers in [0, bound), int64 [B, *shape]; a tensor of bounds broadcasts against that."""
    return below(words(batch, draw, number, shape), bound)


def normal(batch: Batch, draw: int | Tensor, number: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, by the inverse of the distribution function."""
    centred = 2 * uniform(batch, draw, number, shape) - 1 + 2.0**-24  # symmetric about 0, and never -1
    return torch.erfinv(centred) * 2.0**0.5


def _unit(word: Tensor, batch: Batch) -> Tensor:
    return (word >> 8).to(compute_dtype(batch.x.dtype)) * 2.0**-24
