"""The noise of a training run: one key per step, and what is drawn from it; recomputed and never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_kernels import random_start


def noise_keys(seed: int, first: int, count: int) -> Tensor:
    """The noise keys of steps first .. first + count - 1, int64 [count, 2]: a function of (seed, step) alone."""
    return torch.tensor([[_mix(seed, step), 0] for step in range(first, first + count)]).reshape(count, 2)


def chance(seed: int, step: int) -> float:
    """A uniform number in [0, 1) for a step, apart from what its key draws."""
    return _mix(_mix(seed, step) % 2**64, 1) % 2**64 / 2**64


def _mix(seed: int, step: int) -> int:
    """Steele, Lea & Flood's SplitMix64 over seed, then step, as a signed 64-bit integer."""
    state = 0
    for word in (seed, step):
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def uniform(like: Tensor, key: Tensor, ids: Tensor | None, draw: int) -> Tensor:
    """Uniform noise in [-1, 1), one sample per row of ``like`` [B, ...]; the starts of attacks are draw 0."""
    zero = torch.zeros_like(like)
    return random_start(zero, 1.0, key=key, ids=ids, draw=draw, clip_min=-1.0, clip_max=1.0)


def normal(like: Tensor, key: Tensor, ids: Tensor | None, draw: int) -> Tensor:
    """Standard normal noise, from the words of ``uniform`` by the inverse of the distribution function."""
    centred = uniform(like, key, ids, draw) + 2.0**-24  # symmetric about 0, and never -1
    return torch.erfinv(centred) * 2.0**0.5
