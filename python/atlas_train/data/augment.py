"""Random crop and horizontal flip of uint8 images, in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

PAD = 4


def draw(count: int, rng: np.random.Generator, pad: int = PAD) -> torch.Tensor:
    """int64 [3, count] on the CPU: row offsets and column offsets in 0..2*pad, and flips in 0..1, all uniform."""
    offsets = rng.integers(0, 2 * pad, (2, count), endpoint=True)
    flips = rng.integers(0, 2, (1, count))
    return torch.from_numpy(np.concatenate([offsets, flips]))


def crop_flip(images: torch.Tensor, choices: torch.Tensor, pad: int = PAD) -> torch.Tensor:
    """Pads with zeros by `pad` on each side, crops back to the size at an offset, and flips left-right.

    images: [B, C, H, W], any dtype. choices: int64 [3, B] as from `draw`, on the same device.
    Returns [B, C, H, W], contiguous in channels_last order.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left, flip = choices[:, :, None]
    rows = top + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left + torch.where(flip.bool(), width - 1 - across, across)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    # the slice between the indices moves the channels last: [B, H, W, C]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].contiguous().permute(0, 3, 1, 2)
