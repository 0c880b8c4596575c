"""Philox4x32-10 and the noise contract in plain PyTorch (integers in int64, masked to 32 bits)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter (int64 tensors holding 32-bit values; they broadcast)."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The product wraps into the sign bit, but its bits are right: shift, then mask.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """32-bit words to [-1, 1) on a grid of 2**-23, exactly."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return (signed >> 8).to(dtype) * 2.0**-23


def short_uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """The 20 low bits of 32-bit words to [-1, 1) on a grid of 2**-19, exactly."""
    low = word & 0xFFFFF
    return torch.where(low >= 2**19, low - 2**20, low).to(dtype) * 2.0**-19


def below(word: Tensor, bound: int | Tensor) -> Tensor:
    """32-bit words to integers in [0, bound), bound < 2**32, by multiply-high."""
    return word * bound >> 32 & _MASK


def words(
    shape: tuple[int, int, int], key: Tensor, ids: Tensor | None, draw: int, stream: int, neighbour: int
) -> Tensor:
    """The words of ``shape`` = (batch, channels, pixels), with pixels rounded up to whole groups of four."""
    batch, channels, pixels = shape
    groups = -(-pixels // 4)
    place = torch.arange(channels * groups, device=key.device).view(1, channels, groups)
    sample = (key[1] & _MASK) + torch.arange(batch, device=key.device) if ids is None else ids
    four = philox4x32_10(
        (
            place & _MASK,
            sample.view(-1, 1, 1) & _MASK,
            torch.full_like(place, draw & _MASK),
            torch.full_like(place, (stream | neighbour << 8) & _MASK),
        ),
        key[0] & _MASK,
        key[0] >> 32 & _MASK,
    )
    return torch.stack(torch.broadcast_tensors(*four), dim=-1).reshape(batch, channels, 4 * groups)


def noise(
    shape: tuple[int, int, int],
    key: Tensor,
    ids: Tensor | None,
    draw: int,
    stream: int,
    neighbour: int,
    dtype: torch.dtype,
) -> Tensor:
    """Uniform noise in [-1, 1) for ``shape`` = (batch, channels, pixels)."""
    return uniform(words(shape, key, ids, draw, stream, neighbour)[..., : shape[2]], dtype)
