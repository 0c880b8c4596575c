"""CIFAR-100 (Krizhevsky): 50,000 + 10,000 colour images of 32x32 in 100 classes, in the original Python files."""

from __future__ import annotations

import os
from pathlib import Path

from . import cifar10, files
from .dataset import Dataset
from .images import Images

MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
SUBFOLDERS = ("cifar-100-python", ".")
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
URLS = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)
NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """CIFAR-100, uint8 [N, 3, 32, 32], with the labels of the 100 classes; see `atlas_train.data.load` for the
    arguments and errors."""
    wanted = {name: (name,) for name in MD5}
    folder = files.find(
        "cifar100", data_dir, SUBFOLDERS, lambda f: files.absent(f, wanted), fetch_all if download else None
    )
    train, test = (cifar10.read_batches(folder, (name,), MD5, b"fine_labels") for name in ("train", "test"))
    return train, test


def fetch_all(folder: Path) -> None:
    """Downloads the archive and leaves its two files in `folder`."""
    archive = folder / ARCHIVE
    files.fetch(URLS, ARCHIVE_MD5, archive)
    cifar10.unpack(archive, folder, SUBFOLDERS[0], MD5)
    archive.unlink()


CIFAR100 = Dataset(
    name="cifar100",
    load=load,
    num_classes=100,
    class_names=tuple(NAMES.split()),
    like="cifar10",
    eps=8 / 255,
    augment=True,
    model="preact_resnet18",
    # de Jorge et al. 2022 (N-FGSM, arXiv 2202.01181), pdejorge/N-FGSM train.py: SGD, triangular 0 -> 0.2 -> 0.
    epochs=30,
    batch_size=128,
    lr=0.2,
    weight_decay=5e-4,
)
