"""A data set: its declaration, which reads no file, and the same with its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..options import fraction, number, plain, shown
from .images import Images
from .pictures import Pictures

Split = Images | Pictures
Load = Callable[[str | os.PathLike[str] | None, bool], tuple[Split, Split]]


class OfEps(float):
    """A length as a share of eps, among the defaults of a method on a data set."""


class UpTo(float):
    """A number for radii up to ``eps``, and another ``above``, among the defaults of a method on a data set."""

    def __new__(cls, eps: float, number: float, above: float) -> UpTo:
        made = super().__new__(cls, number)
        made.eps, made.numbers = eps, (number, above)
        return made

    eps: float
    numbers: tuple[float, float]

    def at(self, eps: float) -> float:
        return self.numbers[eps > self.eps * (1 + 1e-6)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """A data set, declared in one place: where its images are, and what training takes where nothing else is set.

    ``dataset(data_dir, download)`` gives its ``DataSplits``, so that `--dataset path/to/file.py:NAME` takes one.

    load: gives training and test images; see `atlas_train.data.load` for its arguments, (data_dir, download).
    eps, model and all after it but ``methods``: the defaults of the settings of ``TrainConfig`` with these names. None
    means that there is none: what training needs (model, epochs, batch_size, lr) then has to be set, and mean and std
    of colour images are measured.
    radii: the usual radii in l2 and l1: {"l2": 128 / 255}; that in l_inf is ``eps``.
    like: the data set whose hyper-parameters methods take here, where they have none for this one
    (``Method.defaults``).
    methods: hyper-parameters of methods on this data set, by name: {"trades": {"steps": 40}}; lengths may be shares of
    eps, ``OfEps(1 / 4)``, and a number may be another above a radius, ``UpTo(8 / 255, 20, 10)``. They win over those
    that the method has for this data set (``Method.defaults``), and these over the method's own; what the user sets
    wins over all.
    """

    name: str
    load: Load
    num_classes: int
    class_names: tuple[str, ...] | None = None
    like: str | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    radii: Mapping[str, float] = field(default_factory=dict)

    eps: float
    augment: bool = False
    model: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 0.0
    cyclic_peak: float = 0.5
    threads: int | None = None
    beside: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The defaults of ``TrainConfig``, by name."""
        own = ("name", "load", "num_classes", "class_names", "like", "methods", "radii")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    def radius(self, norm: str) -> float | None:
        """The usual radius of the ball in a norm, or None where none is declared."""
        return self.eps if norm == "linf" else self.radii.get(norm)

    def __call__(self, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> DataSplits:
        images = self.load(data_dir, download)
        if not isinstance(images, tuple) or len(images) != 2:
            raise ValueError(
                f"data set {plain(self.name)}: load must give two Images, for training and for test, got "
                f"{type(images).__name__}"
            )
        train, test = images
        splits = DataSplits(
            self.name, train, test, self.num_classes, self.eps, self.augment, self.class_names, declared=self
        )
        if isinstance(self.mean, Sequence) and len(self.mean) != splits.train.shape[0]:  # else the settings say no
            raise ValueError(
                f"data set {plain(self.name)}: mean must be a number for each of the images' {splits.train.shape[0]} "
                f"channels, got {shown(self.mean)}"
            )
        return splits


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set with its images, for training and for test, and the facts that a trainer takes its defaults from.

    name: that of a data set that we have (`atlas_train.data.names`) stands for its defaults too.
    eps: the usual l_inf radius for this set, in the unit of images in [0, 1].
    augment: whether training usually crops and flips (natural images: yes; digits: no).
    loader: the name or import path by which `data.load` makes these images; None: data of your own.
    declared: where all other defaults come from; None: from ``name``, or there are none.
    extra: more images to train on, generated ones say, of which every batch takes a share (``extra_share``).
    notes: what the user should know of the images, a line each: it is said before training.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    eps: float
    augment: bool = False
    class_names: tuple[str, ...] | None = None
    loader: str | None = None
    declared: Dataset | None = None
    extra: Images | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = ("train", "test", *(["extra"] if self.extra is not None else []))
        for split in parts:
            if not isinstance(images := getattr(self, split), Images if split == "extra" else Split):
                raise ValueError(f"{split} must be Images(images, labels), got {type(images).__name__}")
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a text, got {shown(self.name)}")
        classes = self.num_classes
        if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {shown(classes)}")
        object.__setattr__(self, "num_classes", int(classes))
        object.__setattr__(self, "eps", _radius(self.eps))
        shapes = list(self.train.shape), list(self.test.shape)
        if len(self.train) and len(self.test) and shapes[0] != shapes[1]:
            raise ValueError(
                f"{plain(self.name)}: training images are {shapes[0]}, test images {shapes[1]}: give both one shape"
            )
        if self.extra is not None and list(self.extra.shape) != shapes[0]:
            raise ValueError(
                f"{plain(self.name)}: training images are {shapes[0]}, extra images {list(self.extra.shape)}: give "
                "both one shape"
            )
        for split in parts:
            images = getattr(self, split)
            if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < self.num_classes:
                raise ValueError(
                    f"{self.name}: labels of the {split} split must be in 0..{self.num_classes - 1}, got "
                    f"{int(images.labels.min())}..{int(images.labels.max())}; check num_classes and the files"
                )

    def told(self, say: Callable[[str], Any]) -> DataSplits:
        """The same after its notes were said, without them."""
        for note in self.notes:
            say(note)
        return replace(self, notes=())

    def __repr__(self) -> str:
        parts = f"train={self.train!r}, test={self.test!r}, num_classes={self.num_classes}, eps={fraction(self.eps)}"
        return f"DataSplits({self.name!r}, {parts})"


def _radius(eps: Any) -> float:
    """Raises ValueError unless it lies in (0, 1)."""
    try:
        value = number(eps.item() if isinstance(eps, np.generic) else eps)
        if 0 < value < 1:
            return value
    except ValueError:
        pass
    raise ValueError(
        f"eps must be a number > 0 and < 1, got {shown(eps)}; images are in [0, 1], so write 8/255 instead of 8"
    )
