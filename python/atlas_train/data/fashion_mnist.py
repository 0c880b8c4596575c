"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): grey images of 28x28 in files like those of MNIST."""

from __future__ import annotations

import os
from pathlib import Path

from . import files, mnist
from .dataset import Dataset
from .images import Images

# As published, and as in torchvision.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
SUBFOLDERS = ("fashion_mnist", "FashionMNIST/raw", ".")
MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """60,000 + 10,000 images, uint8 [N, 1, 28, 28]; see `atlas_train.data.load` for the arguments and errors."""
    wanted = {name: (name,) for name in MD5}
    folder = files.find(
        "Fashion-MNIST", data_dir, SUBFOLDERS, lambda f: files.absent(f, wanted), fetch_all if download else None
    )
    return mnist.read_split(folder, "train", MD5), mnist.read_split(folder, "t10k", MD5)


def fetch_all(folder: Path) -> None:
    """Downloads the four files into `folder`; a file that is there and right stays."""
    for name, md5 in MD5.items():
        files.fetch([mirror + name for mirror in MIRRORS], md5, folder / name)


FASHION_MNIST = Dataset(
    name="fashion_mnist",
    load=load,
    num_classes=10,
    class_names=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    like="mnist",
    methods=mnist.MNIST.methods,
    # A choice of ours, eps too: the recipe is that of MNIST, for twice the epochs.
    eps=0.1,
    model="small_cnn",
    epochs=10,
    batch_size=100,
    optimizer="adam",
    lr=5e-3,
    cyclic_peak=0.4,
)  # fmt: skip
