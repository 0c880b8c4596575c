"""CIFAR-10 (Krizhevsky, Nair, Hinton): 50,000 + 10,000 colour images of 32x32, in the original Python batches."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from ..writing import write_bytes
from . import files
from .dataset import Dataset
from .images import Images

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
SUBFOLDERS = ("cifar-10-batches-py", ".")
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
URLS = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """CIFAR-10, uint8 [N, 3, 32, 32]; see `atlas_train.data.load` for the arguments and errors."""
    alternatives = {name: (name,) for name in MD5}
    folder = files.find(
        "cifar10", data_dir, SUBFOLDERS, lambda f: files.absent(f, alternatives), fetch_all if download else None
    )
    return read_batches(folder, TRAIN), read_batches(folder, TEST)


def read_batches(
    folder: Path, names: tuple[str, ...], md5: Mapping[str, str] = MD5, labels_in: bytes = b"labels"
) -> Images:
    """The images of some batch files, one after the other. md5: checksum per file name. labels_in: what the labels are
    called in these files.

    Raises ValueError for a file that is another one.
    """
    batches = [read_batch(folder / name, md5[name], labels_in) for name in names]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def read_batch(path: Path, md5: str, labels_in: bytes) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 3, 32, 32] and int64 [n] of one batch file."""
    data = files.read_checked(path, md5)
    batch = pickle.loads(data, encoding="bytes")  # runs what it asks for: the checksum says that this is the known file
    return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[labels_in], dtype=np.int64)


def fetch_all(folder: Path) -> None:
    """Downloads the archive and leaves its batch files in `folder`."""
    archive = folder / ARCHIVE
    files.fetch(URLS, ARCHIVE_MD5, archive)
    unpack(archive, folder, SUBFOLDERS[0], MD5)
    archive.unlink()


def unpack(archive: Path, folder: Path, inside: str, names: Iterable[str]) -> None:
    """Takes the batch files of these names, and nothing else, out of the archive, whose checksum is known to be right.

    inside: the folder in which the archive has them.
    """
    with tarfile.open(archive) as tar:
        for name in names:
            content = tar.extractfile(f"{inside}/{name}")
            assert content is not None
            write_bytes(folder / name, content.read())


CIFAR10 = Dataset(
    name="cifar10",
    load=load,
    num_classes=10,
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    eps=8 / 255,
    radii={"l2": 128 / 255, "l1": 12.0},  # of RobustBench; of Croce & Hein 2021, arXiv 2103.01208
    augment=True,
    model="preact_resnet18",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    # Wong, Rice & Kolter 2020, locuslab/fast_adversarial CIFAR10/train_fgsm.py: SGD, triangular 0 -> 0.2 -> 0.
    epochs=15,
    batch_size=128,
    optimizer="sgd",
    lr=0.2,
    weight_decay=5e-4,
    cyclic_peak=0.5,
)
