"""The augmentation operator in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import compute_dtype
from ...schema import STREAM_AUGMENT
from .perturb import rows
from .philox import below, philox4x32_10


def draw_windows(number: Tensor, key: Tensor, draw: int, positions: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's offsets from the top and from the left, and whether it is mirrored: int64, int64 and bool [B]."""
    mask = 0xFFFFFFFF
    c0, c2, c3 = (torch.full_like(number, word & mask) for word in (0, draw, STREAM_AUGMENT))
    words = philox4x32_10((c0, number & mask, c2, c3), key[0] & mask, key[0] >> 32 & mask)
    return below(words[0], positions[0]), below(words[1], positions[1]), below(words[2], 2).bool()


@torch.no_grad()
def augment(
    images: Tensor, index: Tensor, padding: int, flip: bool, mean: float, mean_rows: Tensor | None, std: float,
    std_rows: Tensor | None, key: Tensor | None, ids: Tensor | None, draw: int, out: Tensor,
) -> None:  # fmt: skip
    count, _, height, width = images.shape
    crop_height, crop_width = out.shape[2:]
    top = left = torch.zeros_like(index)
    mirrored = torch.zeros_like(index, dtype=torch.bool)
    if key is not None:
        positions = height + 2 * padding - crop_height + 1, width + 2 * padding - crop_width + 1
        top, left, mirrored = draw_windows(index if ids is None else ids, key, draw, positions)
    across = torch.arange(crop_width, device=images.device)
    columns = left[:, None] + torch.where(mirrored[:, None] & flip, across.flip(0), across)
    lines = top[:, None] + torch.arange(crop_height, device=images.device)
    there = (index >= 0) & (index < count)
    chosen = images[torch.where(there, index, 0)] if count else images.new_zeros(len(index), *images.shape[1:])
    padded = F.pad(chosen, (padding,) * 4)
    sample = torch.arange(len(index), device=images.device)[:, None, None]
    # The slice between the indices moves the channels last.
    pixels = padded[sample, :, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    dtype = compute_dtype(out.dtype)
    # A tensor: CUDA multiplies by 1/255 when the divisor is a number, which is not the rounded quotient.
    v = pixels.to(dtype) / torch.tensor(255, dtype=dtype, device=images.device)
    v = (v - rows(mean, mean_rows, v, dim=1)) / rows(std, std_rows, v, dim=1)
    out.copy_(torch.where(there.view(-1, 1, 1, 1), v, torch.nan))
