"""How a tensor is seen as a batch of images: (batch, channels, pixels), in plane order or channels_last."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from .transforms import is_wrapped

Number = TypeVar("Number", float, Tensor, float | Tensor)
# No memory of a process lies lower, but offsets from an address that is null do.
LOW = 1 << 40


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of ``dtype`` is computed in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plane_shape(shape: torch.Size) -> tuple[int, int, int]:
    """(batch, channels, pixels): dim 1 is the channel of tensors with three dims or more, else there is one plane."""
    if len(shape) == 4:
        batch, channels, height, width = shape
        return batch, channels, height * width
    if len(shape) >= 3:
        return shape[0], shape[1], math.prod(shape[2:])
    return shape[0], 1, shape[1] if len(shape) == 2 else 1


def column(values: Number, like: Tensor) -> Number:
    """One value per sample, [B], as [B, 1, ..., 1]: ready to broadcast against ``like``. A number as it is."""
    return values.view(-1, *[1] * (like.ndim - 1)) if isinstance(values, Tensor) else values


def is_channels_last(t: Tensor) -> bool:
    """True if ``t`` is dense with the channels innermost and is not also plainly contiguous."""
    if t.is_contiguous():
        return False
    if t.ndim == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.ndim == 5 and t.is_contiguous(memory_format=torch.channels_last_3d)


def is_supported(t: Tensor) -> bool:
    """True if the kernels can address ``t`` as it lies."""
    return t.is_contiguous() or is_channels_last(t)


def dense(t: Tensor) -> Tensor:
    """``t`` itself if the kernels can address it, else a contiguous copy."""
    return t if is_channels_last(t) else contiguous("a tensor", t)


def contiguous(name: str, t: Tensor) -> Tensor:
    """``t`` itself if it is contiguous, else a contiguous copy. Raises ValueError where its memory was freed."""
    if t.is_contiguous():
        return t
    require_memory(name, t)
    return t.contiguous()


def require_memory(name: str, t: Tensor) -> None:
    """Raises ValueError where the memory of ``t`` was freed: PyTorch would end the process when it reads it."""
    if not torch.compiler.is_compiling() and type(t) is Tensor and not is_wrapped(t) and t.data_ptr() < LOW:
        has_memory(name, t)


def has_memory(name: str, t: Tensor) -> bool:
    """Whether ``t`` lies in memory: False for PyTorch's lazy zeros; freed memory raises ValueError. To be asked where
    the address is below ``LOW``."""
    there = t.untyped_storage().nbytes()
    start = t.storage_offset() * t.itemsize
    if start + t.nbytes > there and t.numel():
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        needed = start + (last + 1) * t.itemsize
        if needed > there:
            raise ValueError(f"{name} needs {needed} bytes, but its storage has {there}: its memory was freed")
    return not t._is_zerotensor()
