"""Training batches from a resident set of 8-bit images: gather, crop, flip and dequantise in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .checks import (
    FLOATS,
    draw_number,
    flag,
    per_channel,
    require_bytes,
    require_noise,
    require_out,
    require_rows,
    value_checks_enabled,
    whole,
)
from .core import advise_huge_pages
from .layout import compute_dtype, contiguous
from .noise import noise_key

_augment = backends.caller("augment")


def augment(
    images: Tensor,
    index: Tensor,
    *,
    padding: int = 4,
    crop: int | tuple[int, int] | None = None,
    flip: bool = True,
    key: Tensor | None = None,
    ids: Tensor | None = None,
    draw: int = 0,
    mean: float | Tensor | Sequence[float] | None = None,
    std: float | Tensor | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Random crop and horizontal flip of ``images[index]``, in [0, 1], as usual for CIFAR (He et al. 2016, section 4.2,
    arXiv 1512.03385), in one pass over a resident set.

    Each image is padded with zeros by ``padding`` on every side, cropped at a place that is uniform over all possible
    ones, and mirrored left-right with probability 1/2. A pixel u becomes ``u / 255``, then ``(u / 255 - mean) / std``,
    padding included. Every operation is rounded in float32 (in float64 if that is ``dtype``), the result to ``dtype``.

    What a sample draws is a function of the key's seed, its number and ``draw`` alone, never of its place in the batch
    or of the ranks. ``padding=0, flip=False`` only gathers and dequantises, and draws nothing.

    Args:
        images: uint8 [N, C, H, W], contiguous or channels_last, or [N, H, W] (one channel). Fastest in the result's
            memory format.
        index: rows to gather, int64 [B] in [0, N), on the device of ``images``.
        padding: pixels on every side, at least 0.
        crop: size of the result, (h, w) or one number for both, at most [H + 2 padding, W + 2 padding]; default (H, W).
        flip: mirror half of the samples.
        key: a ``noise_key``, of which only the seed matters here; default: a fresh one.
        ids: numbers of the samples, int64 [B]; default: ``index``.
        draw: number of the epoch (or of the step, if samples repeat within one).
        mean, std: one number or one per channel, in units of [0, 1]; default 0 and 1. No gradient flows to them.
        dtype: float32, float64, float16 or bfloat16.
        channels_last: memory format of a new result.
        out: result tensor [B, C, h, w] of ``dtype``, in either memory format.

    Returns [B, C, h, w]. Raises ``TypeError`` and ``ValueError`` that name the argument. Where the values of ``index``
    are not checked (on CUDA, by default), a sample that is not in the set becomes NaN.
    """
    require_bytes("images", images)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    require_rows("index", index, images)
    padding = whole("padding", padding, 0)
    height, width = _crop_size(crop, padding, images)
    flip, draw = flag("flip", flip), draw_number(draw)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    shape = (index.shape[0], images.shape[1], height, width)
    if out is None:
        layout = torch.channels_last if flag("channels_last", channels_last) else torch.contiguous_format
        out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
        advise_huge_pages(out)
    else:
        require_out("out", out, shape, images, dtype)
    scale = (*per_channel("mean", 0.0 if mean is None else mean, out), *_divisor(std, out))
    if flip or (height, width) != tuple(side + 2 * padding for side in images.shape[2:]):
        key = noise_key(images.device) if key is None else key
        require_noise(key, ids, index)
        key, ids = key.contiguous(), None if ids is None else contiguous("ids", ids)
    else:
        key = ids = None
    _augment(images, index.contiguous(), padding, flip, *scale, key, ids, draw, out)
    return out


def _crop_size(crop: int | tuple[int, int] | None, padding: int, images: Tensor) -> tuple[int, int]:
    height, width = images.shape[2:]
    if crop is None:
        return height, width
    sides = tuple(crop) if isinstance(crop, (tuple, list)) else (crop, crop)
    if len(sides) != 2:
        raise ValueError(f"crop must be one or two integers >= 1, got {crop!r}")
    size = whole("crop", sides[0], 1), whole("crop", sides[1], 1)
    padded = height + 2 * padding, width + 2 * padding
    if size[0] > padded[0] or size[1] > padded[1]:
        raise ValueError(f"crop {list(size)} is larger than the padded image {list(padded)}: choose more padding")
    return size


def _divisor(std: float | Tensor | Sequence[float] | None, out: Tensor) -> tuple[float, Tensor | None]:
    if std is None:
        return 1.0, None
    number, rows = per_channel("std", std, out)
    if not torch.compiler.is_compiling() and (rows is None or value_checks_enabled(rows)):
        values = torch.tensor(number, dtype=compute_dtype(out.dtype)) if rows is None else rows
        if not bool((values > 0).all()):
            raise ValueError(f"std must be positive in every channel, got {values.tolist()}")
    return number, rows
