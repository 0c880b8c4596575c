"""The one checked door to the native core, which takes raw pointers and trusts them.

Whoever calls an operator, by whatever way, passes here: dtype, device, density, shape and size of every tensor
are checked before its address is taken (that it is there and overlaps no other: ``backends/guard.py``). The messages
are for developers; users meet the checks of the public functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import is_channels_last

_FORMATS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_CHANNELS_LAST = 4
_CPU = torch.device("cpu")
ABSENT = (0, 0)


class DoorError(RuntimeError):
    """A tensor must not be handed to the native core."""


def images(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> tuple[int, int]:
    """(address, format) of a dense float tensor of exactly this shape and device."""
    code = _FORMATS.get(t.dtype)
    if code is not None and t.shape == shape and t.device == device:
        if t.is_contiguous():
            return t.data_ptr(), code
        if is_channels_last(t):
            return t.data_ptr(), code | _CHANNELS_LAST
    raise DoorError(
        f"{name} is {t.dtype} {list(t.shape)} with strides {t.stride()} on {t.device}, expected a float tensor "
        f"{list(shape)} on {device}, contiguous or channels_last"
    )


def byte_images(name: str, t: Tensor) -> tuple[int, bool, torch.Size]:
    """(address, whether channels_last, shape) of a dense uint8 tensor [N, C, H, W]."""
    if t.dtype == torch.uint8 and t.ndim == 4 and (t.is_contiguous() or is_channels_last(t)):
        return t.data_ptr(), is_channels_last(t), t.shape
    raise DoorError(
        f"{name} is {t.dtype} {list(t.shape)} with strides {t.stride()}, expected uint8 [N, C, H, W], contiguous or "
        "channels_last"
    )


def vector(name: str, t: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Address of a contiguous vector of exactly this size, dtype and device."""
    if t.numel() == size and t.dtype == dtype and t.device == device and t.is_contiguous():
        return t.data_ptr()
    raise DoorError(
        f"{name} is {t.dtype} {list(t.shape)} with strides {t.stride()} on {t.device}, expected contiguous {dtype} "
        f"[{size}] on {device}"
    )


def rows(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Address of contiguous rows of exactly this shape, dtype and device."""
    if t.shape == shape and t.dtype == dtype and t.device == device and t.is_contiguous():
        return t.data_ptr()
    raise DoorError(
        f"{name} is {t.dtype} {list(t.shape)} with strides {t.stride()} on {t.device}, expected contiguous {dtype} "
        f"{list(shape)} on {device}"
    )


def float_code(name: str, t: Tensor) -> int:
    """The native number of a float dtype."""
    code = _FORMATS.get(t.dtype)
    if code is None:
        raise DoorError(f"{name} is {t.dtype}, expected float32, float64, float16 or bfloat16")
    return code


def where(device: torch.device) -> tuple[int, int, int]:
    """(CUDA device index or -1, CPU threads, CUDA stream)."""
    if device == _CPU:
        return -1, torch.get_num_threads(), 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, 1, torch.cuda.current_stream(index).cuda_stream
