"""Data sets, by name, as uint8 tensors; batches of them on the device, in [0, 1]."""

from __future__ import annotations

import dataclasses
import os

from ..options import canonical, shown, suggestion
from . import cifar10, digits, mnist
from .images import DataSplits, Images
from .loader import Batch, Batches

__all__ = ["Batch", "Batches", "DataSplits", "Images", "load", "names"]

_LOADERS = {"digits": digits.load, "mnist": mnist.load, "cifar10": cifar10.load}


def names() -> tuple[str, ...]:
    """The data sets that `load` knows."""
    return tuple(_LOADERS)


def load(name: str, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> DataSplits:
    """A data set: "digits" (8x8, embedded in scikit-learn), "mnist" (28x28) or "cifar10" (32x32, RGB).

    Files are looked for in `data_dir`, then in the folder named by the environment variable ATLAS_DATA, then in the
    cache folder ($XDG_CACHE_HOME or ~/.cache, /atlas_kernels). There, mnist may lie in mnist/, MNIST/raw/ or the folder
    itself, cifar10 in cifar-10-batches-py/ or the folder itself. Every file's md5 is checked on every load.
    With `download`, files found nowhere are downloaded into the first of these folders that is set.

    Raises ValueError for an unknown name or a damaged file, FileNotFoundError for missing files, ImportError when
    scikit-learn (digits) or pooch (download) is missing, OSError when a download fails.
    """
    name = canonical(name, _LOADERS)
    if name not in _LOADERS:
        near = suggestion(str(name).replace("-", ""), _LOADERS)
        raise ValueError(f"name: no data set {shown(name)}{near} (known: {', '.join(_LOADERS)})")
    return dataclasses.replace(_LOADERS[name](data_dir, download), loader=name)
