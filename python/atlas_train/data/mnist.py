"""MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 grey images of 28x28, in four idx files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..options import plain
from . import files
from .dataset import Dataset, OfEps
from .images import Images

# As published, and the same files unpacked.
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
ALTERNATIVES = {name: (f"{name}.gz", name) for name in MD5 if not name.endswith(".gz")}
SUBFOLDERS = ("mnist", "MNIST/raw", ".")
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """MNIST, uint8 [N, 1, 28, 28]; see `atlas_train.data.load` for the arguments and errors."""
    folder = files.find(
        "MNIST", data_dir, SUBFOLDERS, lambda f: files.absent(f, ALTERNATIVES), fetch_all if download else None
    )
    return read_split(folder, "train"), read_split(folder, "t10k")


def read_split(folder: Path, split: str, md5: Mapping[str, str] | None = MD5) -> Images:
    """One split ("train" or "t10k") from the idx files in `folder`. md5: checksum per file name, None: not checked.

    Raises ValueError for a damaged file or for images and labels that differ in number.
    """
    pixels = read_idx(folder, f"{split}-images-idx3-ubyte", 3, md5)
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", 1, md5)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{plain(folder)}: {len(pixels)} {split} images but {len(labels)} labels; the files are no pair"
        )
    return Images(torch.from_numpy(pixels[:, None]), torch.from_numpy(labels.astype(np.int64)))


def read_idx(folder: Path, name: str, ndim: int, md5: Mapping[str, str] | None) -> np.ndarray:
    """The uint8 array of an idx file: magic number 00 00 08 ndim, `ndim` big-endian uint32 sizes, then the bytes."""
    path = next(p for p in (folder / n for n in ALTERNATIVES[name]) if p.is_file())
    data = files.read_checked(path, md5[path.name] if md5 is not None else None)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{plain(path)} is no whole gzip file ({error}); {files.REMEDY}") from error
    magic = bytes((0, 0, 8, ndim))
    if data[:4] != magic:
        raise ValueError(
            f"{plain(path)}: idx magic number found {data[:4].hex()!r}, expected {magic.hex()!r}; {files.REMEDY}"
        )
    start = 4 + 4 * ndim
    shape = tuple(np.frombuffer(data[4:start].ljust(4 * ndim, b"\0"), dtype=">u4").tolist())
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{plain(path)}: {len(data)} bytes found, {expected} expected for shape {shape}; {files.REMEDY}"
        )
    array: np.ndarray = np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()  # writable, for torch
    return array


def fetch_all(folder: Path) -> None:
    """Downloads the four .gz files into `folder`; a file that is there and right stays."""
    for name in (n for n in MD5 if n.endswith(".gz")):
        files.fetch([mirror + name for mirror in MIRRORS], MD5[name], folder / name)


MNIST = Dataset(
    name="mnist",
    load=load,
    num_classes=10,
    class_names=tuple("0123456789"),
    methods={"gairat": {"steps": 40, "step_size": OfEps(1 / 30)}},  # the usual attack here; GAIRAT has no recipe for it
    eps=0.3,
    model="small_cnn",
    # Wong, Rice & Kolter 2020, locuslab/fast_adversarial MNIST/train_mnist.py: Adam, 0 -> 5e-3 at 2/5 of training -> 0
    # (10 epochs there).
    epochs=5,
    batch_size=100,
    optimizer="adam",
    lr=5e-3,
    cyclic_peak=0.4,
)
