"""The digits of scikit-learn: 1797 grey images of 8x8, embedded in the library, so that nothing is downloaded."""

from __future__ import annotations

import os

import numpy as np
import torch

from .dataset import Dataset
from .images import Images, stratified

TEST_SIZE = 500
SPLIT_SEED = 0  # part of the data set's definition: another seed is another test set


def load(data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> tuple[Images, Images]:
    """1297 training and 500 test images, uint8 [N, 1, 8, 8]; both arguments are accepted and not needed.

    The original values 0..16 become round(v * 255 / 16). The split is fixed and keeps every class's share.
    Raises ImportError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("the digits data set needs scikit-learn: pip install 'atlas-kernels[train]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)

    in_test = np.zeros(len(labels), dtype=bool)
    in_test[stratified(labels, TEST_SIZE, SPLIT_SEED)] = True
    train, test = (Images(torch.from_numpy(pixels[m]), torch.from_numpy(labels[m])) for m in (~in_test, in_test))
    return train, test


DIGITS = Dataset(
    name="digits",
    load=load,
    num_classes=10,
    class_names=tuple("0123456789"),
    eps=0.2,
    model="digits_net",
    # Ours, tuned on 300 held-out training images: a minute on one CPU core; with more epochs robustness overfits.
    epochs=40,
    batch_size=64,
    optimizer="adam",
    lr=5e-3,
    cyclic_peak=0.4,
    threads=1,  # on so small a network threads wait for each other, badly so on a busy machine
    beside=("standard", "one_step_adv"),
)
