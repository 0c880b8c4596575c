"""The augmentation operator through the door."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import core
from ...layout import compute_dtype
from ...noise import STREAM_AUGMENT
from ..door import DoorError, byte_images, images, vector, where


def augment(
    data: Tensor, index: Tensor, padding: int, flip: bool, mean: float, mean_rows: Tensor | None, std: float,
    std_rows: Tensor | None, key: Tensor | None, ids: Tensor | None, draw: int, out: Tensor,
) -> None:  # fmt: skip
    if out.ndim != 4:
        raise DoorError(f"out has shape {list(out.shape)}, expected [B, C, h, w]")
    address, channels_last, (count, channels, height, width) = byte_images("images", data)
    batch, _, *crop = out.shape
    if key is None and (flip or crop != [height + 2 * padding, width + 2 * padding]):
        raise DoorError("noise needs a key")
    device, dtype = data.device, compute_dtype(out.dtype)
    core().augment(
        address, channels_last, count, channels, height, width,
        *images("out", out, (batch, channels, *crop), device), batch, *crop, padding, flip,
        mean, 0 if mean_rows is None else vector("mean", mean_rows, channels, dtype, device),
        std, 0 if std_rows is None else vector("std", std_rows, channels, dtype, device),
        vector("index", index, batch, torch.int64, device),
        0 if key is None else vector("key", key, 2, torch.int64, device),
        0 if ids is None else vector("ids", ids, batch, torch.int64, device),
        STREAM_AUGMENT, draw & 0xFFFFFFFF, *where(device),
    )  # fmt: skip
