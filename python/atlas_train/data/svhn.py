"""SVHN (Netzer et al. 2011), cropped digits: 73,257 + 26,032 colour images of 32x32, in files of MATLAB."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch

from ..options import one_line, plain
from . import files
from .dataset import Dataset
from .images import Images

MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
SUBFOLDERS = ("svhn", "SVHN", ".")
URL = "http://ufldl.stanford.edu/housenumbers/"


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """SVHN, uint8 [N, 3, 32, 32], the label of each its digit; see `atlas_train.data.load` for the arguments and
    errors."""
    wanted = {name: (name,) for name in MD5}
    folder = files.find(
        "SVHN", data_dir, SUBFOLDERS, lambda f: files.absent(f, wanted), fetch_all if download else None
    )
    train, test = (read(folder / name, md5) for name, md5 in MD5.items())
    return train, test


def read(path: Path, md5: str | None) -> Images:
    """The images of a file. md5: its checksum, None: not checked. Raises ValueError for another or a damaged file,
    ImportError when SciPy is missing."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("the svhn data set needs SciPy: pip install 'atlas-kernels[train]'") from error
    content = files.read_checked(path, md5)
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        pixels, labels = arrays["X"], arrays["y"].reshape(-1)
    except Exception as error:  # of a damaged file SciPy raises nearly anything
        raise ValueError(f"{plain(path)} is no file of SVHN ({one_line(error)}); {files.REMEDY}") from error
    # Rows, columns, channels, images; the digit 0 is class 10 there.
    whole = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return Images(whole, torch.from_numpy(labels.astype(np.int64) % 10))


def fetch_all(folder: Path) -> None:
    """Downloads the two files into `folder`; a file that is there and right stays."""
    for name, md5 in MD5.items():
        files.fetch([URL + name], md5, folder / name)


SVHN = Dataset(
    name="svhn",
    load=load,
    num_classes=10,
    class_names=tuple("0123456789"),
    like="cifar10",
    eps=8 / 255,
    model="preact_resnet18",
    # Andriushchenko & Flammarion 2020 (arXiv 2007.02617), tml-epfl/understanding-fast-adv-training
    # sh/exps_diff_eps_svhn.sh: SGD, triangular 0 -> 0.05 at 2/5 -> 0. They also let eps grow (--eps-warmup 5).
    epochs=15,
    batch_size=128,
    lr=0.05,
    weight_decay=5e-4,
    cyclic_peak=0.4,
)
