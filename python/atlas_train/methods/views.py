"""Crops and flips that a method makes itself, so that what it knows of a pixel stays with that pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.loader import PADDING, Batch
from ..noise import uniform

_DRAW = 2**16 + 1  # of the noise key


class Views:
    """Of each image of a batch a view, drawn by ``key``: padded with zeros, cropped to its size and mirrored with
    probability 1/2, as ``atlas_kernels.augment`` does."""

    def __init__(self, batch: Batch, key: Tensor) -> None:
        height, width = batch.x.shape[-2:]
        numbers = uniform(batch.x.new_empty(len(batch.x), 3), key, batch.ids, _DRAW)
        top, left = ((numbers[:, :2, None] + 1) * (PADDING + 0.5)).long().sub(PADDING).unbind(1)
        mirrored = numbers[:, 2:] < 0
        rows, columns = (torch.arange(size, device=numbers.device) for size in (height, width))

        def turned(places: Tensor) -> Tensor:
            return torch.where(mirrored, width - 1 - places, places)

        self._seen = rows + top, turned(columns) + left
        self._origin = rows - top, turned(columns - left)

    def of(self, images: Tensor) -> Tensor:
        """The views of these images, in a tensor of its own and of their layout."""
        return _picked(images, *self._seen)

    def back(self, views: Tensor) -> Tensor:
        """What the views hold of each image, zero where a pixel is not in its view: the adjoint of ``of``."""
        return _picked(views, *self._origin)


def _picked(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``images[b, :, rows[b, i], columns[b, j]]``, zero outside."""
    height, width = images.shape[-2:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    found = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return torch.empty_like(images).copy_(torch.where(inside[:, None], found.view(images.shape), 0.0))
