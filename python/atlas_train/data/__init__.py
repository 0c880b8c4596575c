"""Data sets, by name or import path, as uint8 tensors; batches of them on the device, in [0, 1]."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ..imported import called, find, is_import_path, refused
from ..options import canonical, plain, shown, suggestion
from . import arrays, folder, own
from .arrays import from_arrays, from_dataset
from .cifar10 import CIFAR10
from .cifar100 import CIFAR100
from .dataset import Dataset, DataSplits, OfEps, Split, UpTo
from .digits import DIGITS
from .extra import with_extra
from .fashion_mnist import FASHION_MNIST
from .images import Images
from .loader import Batch, Batches
from .mnist import MNIST
from .pictures import Pictures
from .streamed import Streamed, in_order
from .svhn import SVHN

__all__ = [
    "Batch",
    "Batches",
    "DataSplits",
    "Dataset",
    "Images",
    "OfEps",
    "Pictures",
    "Split",
    "Streamed",
    "UpTo",
    "asked",
    "declared",
    "from_arrays",
    "from_dataset",
    "get",
    "in_order",
    "load",
    "names",
    "usual",
    "with_extra",
]

_DATASETS = {dataset.name: dataset for dataset in (DIGITS, MNIST, FASHION_MNIST, CIFAR10, CIFAR100, SVHN)}
#: What `load` knows beside them: data of the user's own, in a form that is known.
FORMS = ("folder", "npz")
#: Settings of how their pictures are read.
READING = ("image_size", "grey", "skip_unreadable", "stream")


def names() -> tuple[str, ...]:
    """The data sets that `get` and `load` know."""
    return tuple(_DATASETS)


def get(name: str) -> Dataset:
    """What is declared of the data set of that name, in capitals or not. Raises ValueError that names the nearest."""
    name = canonical(name, _DATASETS)
    if name not in _DATASETS:
        known = *_DATASETS, *FORMS
        near = suggestion(str(name).replace("-", ""), known)
        code = f"{plain(name)}:factory" if str(name).endswith(".py") else "package.module:factory"
        raise ValueError(
            f"name: no data set {shown(name)}{near} (known: {', '.join(known)}; for data of your own write {code})"
        )
    return _DATASETS[name]


def usual(name: str) -> Dataset | None:
    """What is declared of a data set before it is read, if it is known by its name or its form."""
    return own.USUAL if name in FORMS else _DATASETS.get(name)


def declared(splits: DataSplits) -> Dataset:
    """What is declared of these data: by themselves, or by their name. Of others no more is known than they say."""
    return (
        splits.declared
        or _DATASETS.get(splits.name)
        or Dataset(
            name=splits.name,
            load=lambda data_dir, download: (splits.train, splits.test),
            num_classes=splits.num_classes,
            eps=splits.eps,
        )
    )


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    *,
    image_size: int | None = None,
    grey: bool = False,
    skip_unreadable: bool = False,
    stream: bool | None = None,
) -> DataSplits:
    """A data set: "digits" (8x8, embedded in scikit-learn), "mnist" and "fashion_mnist" (28x28), "cifar10", "cifar100"
    and "svhn" (32x32, RGB), or your own.

    Files are looked for in `data_dir`, then in the folder named by the environment variable ATLAS_DATA, then in the
    cache folder ($XDG_CACHE_HOME or ~/.cache, /atlas_kernels). There, mnist may lie in mnist/, MNIST/raw/ or the folder
    itself, fashion_mnist in fashion_mnist/, FashionMNIST/raw/ or the folder itself, cifar10 in cifar-10-batches-py/,
    cifar100 in cifar-100-python/, svhn in svhn/ or the folder itself. Every file's md5 is checked on every load.
    With `download`, files found nowhere are downloaded into the first of these folders that is set.

    Your own: "folder", the pictures in `data_dir`, which may be read by image_size, grey, skip_unreadable and stream
    (see `folder.load`); "npz", the arrays in the file `data_dir` (`arrays.load`); or "package.module:factory" or
    "path/to/file.py:factory", where the factory is a `Dataset`, or a function that gives `DataSplits`. It is called
    with the arguments that are given.

    Raises ValueError for an unknown name, a path that leads nowhere, a factory that gives anything else or a damaged
    file, FileNotFoundError for missing files, ImportError when scikit-learn (digits), SciPy (svhn), pooch
    (download) or Pillow (folder) is missing, OSError when a download fails.
    """
    reading: dict[str, Any] = dict(zip(READING, (image_size, grey, skip_unreadable, stream), strict=True))
    pictures = asked(reading)
    name = canonical(name, (*_DATASETS, *FORMS))
    if is_import_path(name):
        given: dict[str, Any] = {"data_dir": data_dir} if data_dir is not None else {}
        splits = _imported(name, **given, **({"download": True} if download else {}), **pictures)
    elif pictures and name != "folder":
        raise ValueError(
            f"{next(iter(pictures))} is for pictures in files, --dataset folder: leave it out for {plain(name)}"
        )
    elif name in FORMS:
        splits = _renamed(folder.load(data_dir, **pictures) if name == "folder" else arrays.load(data_dir), name)
    else:
        splits = get(name)(data_dir, download)
    return dataclasses.replace(splits, loader=name)


def _renamed(splits: DataSplits, form: str) -> DataSplits:
    """The same under a name that is none of ours, whose defaults would otherwise be meant."""
    if splits.name not in (*_DATASETS, *FORMS):
        return splits
    name, declared = f"{splits.name}-{form}", splits.declared
    return dataclasses.replace(splits, name=name, declared=declared and dataclasses.replace(declared, name=name))


def asked(reading: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings ``READING`` those that say something."""
    return {key: value for key, value in reading.items() if value or (key == "stream" and value is not None)}


def _imported(path: str, **given: Any) -> DataSplits:
    """``factory(**given)``: the code at ``path`` is run. Raises ValueError that says what is wrong with it."""
    factory = find("dataset", path)
    call = called("dataset", path, given)
    try:
        splits = factory(**given)
    except Exception as error:
        raise refused(call, factory, given, error) from error
    if not isinstance(splits, DataSplits):
        remedy = "; name the Dataset itself, or call it" if isinstance(splits, Dataset) else ""
        raise ValueError(f"{call}, and must give DataSplits (atlas_train.data), got {type(splits).__name__}{remedy}")
    return splits
