"""What training takes for data that say nothing on it: pictures, files of arrays, arrays and data sets of your own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dataset import Dataset, DataSplits, Split
from .images import stratified

#: Share of each class that is held out for the test where there is none, and the seed by which it is drawn and images
#: are shuffled: they are part of the data, as another draw is another test.
TEST_SHARE, SEED = 0.2, 0


def _nothing(data_dir: str | os.PathLike[str] | None, download: bool) -> tuple[Split, Split]:
    raise ValueError("no images are known here")


#: What is declared of them: the recipe of CIFAR-10, which is a choice of ours. Mean and std are measured.
USUAL = Dataset(
    name="own",
    load=_nothing,
    num_classes=1,
    like="cifar10",
    eps=8 / 255,
    model="preact_resnet18",
    epochs=15,
    batch_size=128,
    lr=0.2,
    weight_decay=5e-4,
)


def declared(
    name: str,
    train: Split,
    test: Split,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    **defaults: Any,
) -> DataSplits:
    """The images with what is ``USUAL``, or these ``defaults``; grey ones are neither cropped nor flipped."""
    made = replace(
        USUAL,
        name=name,
        load=lambda data_dir, download: (train, test),
        num_classes=num_classes,
        class_names=None if class_names is None else tuple(class_names),
        augment=train.shape[0] == 3,
        **defaults,
    )
    return replace(made(), notes=tuple(notes))


def name_of(path: Path) -> str:
    """A name for the data in a file or folder: the file's own, unless it means something else."""
    path = path.resolve()
    name = path.stem if path.suffix == ".npz" else path.name
    return name.replace(":", "_") or "folder"  # with a colon it would be an import path


def shuffled(count: int) -> np.ndarray:
    """The rows of images that lie class by class, in an order of which the first ones stand for all: evaluations and
    the probe look at the first. It is always the same (see `images.stratified`)."""
    return np.random.RandomState(SEED).permutation(count)


def split(labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to train on and rows for the test, by classes, and how that is said."""
    count = round(TEST_SHARE * len(labels))
    held = stratified(labels.numpy(), count, SEED)
    note = f"{TEST_SHARE:.0%} of each class, {count:,} in all, are held out for it, always the same ones"
    return np.setdiff1d(np.arange(len(labels)), held), held, note
