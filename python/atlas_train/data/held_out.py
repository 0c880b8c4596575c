"""Training images that are held out for validation: how many, and which."""

from __future__ import annotations

import numpy as np

from .dataset import Split
from .images import stratified

LEAST, MOST, SHARE, OF_SMALL = 500, 1000, 50, 10


def default_size(images: int, train_size: int | None) -> int:
    """2 % of the images to be trained on, but 500 to 1000, and at most a tenth: a validation costs a few passes of as
    many images in each epoch. Where ``train_size`` leaves fewer than that, all that it leaves."""
    wanted = images if train_size is None else train_size
    size = min(MOST, wanted // OF_SMALL, max(LEAST, wanted // SHARE))
    return size if train_size is None else max(0, min(size, images - train_size))


def require_room(images: int, train_size: int | None, val_size: int) -> None:
    """Raises ValueError unless there are as many training images."""
    if train_size is None and val_size >= images:
        raise ValueError(
            f"config: val_size {val_size:,} leaves none of the {images:,} training images to train on: give less, or 0 "
            "for no validation"
        )
    if train_size is not None and train_size <= images < train_size + val_size:
        raise ValueError(
            f"config: train_size {train_size:,} and val_size {val_size:,} are more than the {images:,} training "
            "images: give less of one of them, or val_size=0 for no validation"
        )


def split(images: Split, train_size: int | None, val_size: int, seed: int) -> tuple[Split, Split | None]:
    """Images to train on and others to validate on, each a stratified draw by the seed (``Images.subset``).

    With ``train_size`` the first are those of a run without validation. Without it they are all that validation leaves.
    """
    if not val_size:
        return (images if train_size is None else images.subset(train_size, seed)), None
    chosen, held = rows(images.labels.cpu().numpy(), train_size, val_size, seed)
    train = images.subset(train_size, seed) if train_size is not None else images.take(chosen)
    return train, images.take(held)


def rows(labels: np.ndarray, train_size: int | None, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the images that ``split`` gives for training and for validation, int64 in ascending order."""
    rest = np.ones(len(labels), dtype=bool)
    if train_size is not None:
        rest[stratified(labels, train_size, seed)] = False
    held = np.flatnonzero(rest)[stratified(labels[rest], val_size, seed)]
    unseen = rest.copy()
    unseen[held] = False
    return np.flatnonzero(unseen if train_size is None else ~rest), held
