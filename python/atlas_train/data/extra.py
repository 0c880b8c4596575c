"""Extra or generated training images from an .npz file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..options import plain
from .arrays import read_npz
from .dataset import DataSplits
from .images import Images

KEYS = ("image", "label")


def with_extra(splits: DataSplits, path: str | os.PathLike[str] | None) -> DataSplits:
    """The data with the extra images of a file, unless they have some already."""
    return splits if path is None or splits.extra is not None else replace(splits, extra=read(path, splits.train.shape))


def read(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Images:
    """The labelled images of an .npz file: `image` uint8 [N, H, W, C] and `label` integers [N], the layout of the
    generated images that are published for CIFAR-10 (Gowal et al. 2021, arXiv 2110.09468; Wang et al. 2023, arXiv
    2302.04638). They stay uint8 in memory, in the order of the file.

    shape: (C, H, W) of the data set's images. Raises FileNotFoundError, and ValueError for a file that is no such one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"extra_data: there is no file {plain(path)}; say where it lies (--extra-data), also to resume "
            "a run, for a checkpoint holds its name without the folder"
        )
    arrays, names = read_npz(path, "extra_data", KEYS)
    if len(arrays) < len(KEYS):
        has = f"the arrays {', '.join(map(plain, names))}" if names else "no arrays by name"
        raise ValueError(f"extra_data {plain(path)} must hold image and label, images with their classes; it has {has}")
    pixels, labels = (arrays[key] for key in KEYS)
    channels, height, width = shape
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (height, width, channels):
        raise ValueError(
            f"extra_data {plain(path)}: image must be uint8 [N, {height}, {width}, {channels}], as the data set's are, "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"extra_data {plain(path)}: label must be integers [{len(pixels)}], one for each image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if not len(pixels):
        raise ValueError(f"extra_data {plain(path)} holds no images")
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))
