"""Memory that is watched: inputs must stay as they are, and so must everything around an output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .draws import Draw

_CANARY, _MARGIN = 0xA5, 64


class Watch:
    """Outputs in buffers of canaries, and copies of inputs."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Tensor]] = []
        self._outputs: list[tuple[str, Tensor, int, int]] = []

    def keep(self, name: str, t: object) -> None:
        """``t`` must not change."""
        if is_plain(t):
            self._kept.append((name, t, t.detach().clone()))

    def output(self, draw: Draw, name: str, like: Tensor) -> Tensor:
        """A tensor like ``like`` (shape, dtype, layout) in the middle of a buffer of canaries, at a random address."""
        size = like.element_size()
        start = _MARGIN + size * draw.integer(0, 8)
        buffer = torch.full((start + like.numel() * size + _MARGIN,), _CANARY, dtype=torch.uint8)
        out = buffer[start : start + like.numel() * size].view(like.dtype)
        self._outputs.append((name, buffer, start, start + like.numel() * size))
        return out.as_strided(like.shape, like.stride(), out.storage_offset())

    def complaints(self) -> list[str]:
        """What changed that must not."""
        changed = [f"{name} was written to" for name, t, before in self._kept if not same_memory(t, before)]
        for name, buffer, start, end in self._outputs:
            around = torch.cat([buffer[:start], buffer[end:]])
            if not bool((around == _CANARY).all()):
                changed.append(f"memory outside {name} was written to")
        return changed


def is_plain(t: object) -> bool:
    """A tensor with memory of its own that can be read."""
    return (
        type(t) is Tensor
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not (t.is_quantized or t.is_nested or t._is_zerotensor())
        and t.untyped_storage().nbytes() > 0
    )


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, any NaN equal to any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    same = (a == b) & (a.signbit() == b.signbit()) if a.is_floating_point() else a == b
    return bool((same | (a.isnan() & b.isnan())).all())


def overlapping(draw: Draw, like: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(out like ``like``, ``other`` again), in one buffer, with memory in common where both have any.

    They lie at random places; in one call of three at the same address.
    """
    size, step = (like.numel() * like.element_size(), like.element_size())
    taken = other.numel() * other.element_size()
    align = math.lcm(step, other.element_size())
    shift = 0 if draw.chance(0.3) else draw.integer(-taken // align, size // align) * align
    buffer = torch.zeros(size + 2 * (taken + align) + align, dtype=torch.uint8)
    at = -(-taken // align) * align + align  # of out; so there is room on both sides
    out = buffer[at : at + size].view(like.dtype)
    again = buffer[at + shift : at + shift + taken].view(other.dtype)
    out = out.as_strided(like.shape, like.stride(), out.storage_offset())
    dense = other.contiguous() if not _is_dense(other) else other.resolve_neg()
    again = again.as_strided(dense.shape, dense.stride(), again.storage_offset())
    again.copy_(dense)
    return out, again


def _is_dense(t: Tensor) -> bool:
    formats = [torch.contiguous_format] + ([torch.channels_last] if t.ndim == 4 else [])
    return any(t.is_contiguous(memory_format=f) for f in formats)
