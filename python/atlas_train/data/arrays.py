"""Data sets of your own: from arrays, from a file of arrays (.npz), and from any map-style data set of torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..options import one_line, plain, shown
from . import own
from .dataset import DataSplits
from .images import Images
from .pictures import counted, pixels

#: The names under which a file has its images and labels: ours, those of Keras' files and those of MedMNIST's.
TRAIN = (("train_image", "train_label"), ("x_train", "y_train"), ("train_images", "train_labels"), ("image", "label"))
TEST = (("test_image", "test_label"), ("x_test", "y_test"), ("test_images", "test_labels"))
NAMES = "class_names"


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any] | None = None,
    *,
    name: str = "own",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    **defaults: Any,
) -> DataSplits:
    """A data set from arrays of NumPy or tensors, for ``train(config, splits=...)`` and the like.

    Args:
        train, test: (images, labels). Images are uint8, or floats in [0, 1] that are rounded to 1/255; [N, H, W],
            [N, H, W, C] or [N, C, H, W], C being 1 or 3. Labels are integers from 0. Without ``test`` a fifth of each
            class is held out for it, always the same one of the same labels.
        name: by which the data are known in results.
        num_classes: default: that of ``class_names``, or as many as there are labels, which then must have no gaps.
        defaults: what else training takes from these data: eps, epochs, lr and so on (`Dataset`). Default: the recipe
            of CIFAR-10, with the mean and std of the training images.

    Raises ValueError for anything else.
    """
    whole = _images(train, "train")
    return _splits(whole, test and _images(test, "test"), name, num_classes, class_names, **defaults)


def from_dataset(
    train: Any,
    test: Any = None,
    *,
    name: str = "own",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    **defaults: Any,
) -> DataSplits:
    """A data set from map-style ones of torch, whose items are (image, label): each is read once, and kept as uint8.

    An image is one of Pillow, an array [H, W] or [H, W, C], or a tensor [C, H, W]: uint8, or floats in [0, 1]. All have
    one shape. Leave random transforms out, for an image is read only once, and normalisation, which is the network's.
    Class names are those of ``train.classes`` where it has them. Else as `from_arrays`.
    """
    if class_names is None and num_classes is None:
        known = getattr(train, "classes", None)
        named = isinstance(known, (list, tuple)) and all(isinstance(each, str) for each in known)
        class_names = known if named and known else None
    whole = _read(train, "train")
    return _splits(whole, None if test is None else _read(test, "test"), name, num_classes, class_names, **defaults)


def load(path: str | os.PathLike[str] | None) -> DataSplits:
    """The data set in an .npz file: arrays named as in ``TRAIN`` and ``TEST``, and class_names where there are any; see
    `from_arrays`. Raises ValueError, FileNotFoundError."""
    if path is None:
        raise ValueError(
            "data_dir: dataset npz is a file of yours: say which (--data-dir FILE.npz), also to resume or to evaluate, "
            "for a checkpoint does not hold it"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.exists() else "is not there"
        raise FileNotFoundError(f"data_dir: {plain(file)} {what}: give the .npz file")
    wanted = {NAMES, *(name for pair in (*TRAIN, *TEST) for name in pair)}
    found, names = read_npz(file, "data_dir", wanted)
    pairs = [next((pair for pair in known if set(pair) <= found.keys()), None) for known in (TRAIN, TEST)]
    if pairs[0] is None:
        known = ", or ".join(f"{image} and {label}" for image, label in TRAIN)
        raise ValueError(f"data_dir {plain(file)} must hold {known}; it has {_listed(names)}")
    train, test = ((found[pair[0]], found[pair[1]]) if pair else None for pair in pairs)
    assert train
    unused = sorted(set(names) - {NAMES} - {name for pair in pairs if pair for name in pair})
    notes = [f"{plain(file)}: arrays that are not used: {', '.join(map(plain, unused))}"] if unused else []
    named = [str(each) for each in found[NAMES].reshape(-1)] if NAMES in found else None
    try:
        whole, held = _images(train, "train"), test and _images(test, "test")
        return _splits(whole, held, own.name_of(file), None, named, notes)
    except ValueError as error:
        raise ValueError(f"data_dir {plain(file)}: {error}") from error


def read_npz(
    path: str | os.PathLike[str], owner: str, wanted: Collection[str]
) -> tuple[dict[str, np.ndarray], Sequence[str]]:
    """Those of the wanted arrays that an .npz file has, and the names of all. Raises ValueError that begins with the
    setting ``owner``."""
    try:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        names = getattr(file, "files", ())  # a lone array has none
        if not names:
            return {}, ()
        with file:
            return {name: file[name] for name in names if name in wanted}, names
    except Exception as error:  # no archive, objects in it, or damaged, which raises nearly anything
        raise ValueError(f"{owner} {plain(path)} cannot be read as .npz: {one_line(error)}") from error


def _listed(names: Sequence[str]) -> str:
    return f"the arrays {', '.join(map(plain, names))}" if names else "no arrays by name"


def _splits(
    train: Images,
    test: Images | None,
    name: str,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    notes: Sequence[str] = (),
    **defaults: Any,
) -> DataSplits:
    if any(_by_class(part.labels) for part in (train, test) if part):
        train = train.take(own.shuffled(len(train)))
        test = test and test.take(own.shuffled(len(test)))
        notes = (*notes, f"{plain(name)} has its images class by class: they are shuffled, always the same way")
    if test is None:
        chosen, held, note = own.split(train.labels)
        train, test = train.take(chosen), train.take(held)
        notes = (*notes, f"{plain(name)} has no test images of its own: {note}")
    if class_names is not None:
        num_classes = len(class_names) if num_classes is None else num_classes
        if num_classes != len(class_names):
            raise ValueError(f"class_names must be {num_classes} names, as num_classes says, got {len(class_names)}")
    return own.declared(name, train, test, num_classes or _counted(train, test), class_names, notes, **defaults)


def _by_class(labels: torch.Tensor) -> bool:
    """Whether images of several classes lie class by class."""
    return bool((labels.diff() >= 0).all() and labels[0] < labels[-1])


def _counted(train: Images, test: Images) -> int:
    """How many classes there are, if nobody says it. Raises ValueError for labels with gaps."""
    labels = torch.cat([train.labels, test.labels])
    low, high = (int(value) for value in torch.aminmax(labels))
    empty = sorted(set(range(high + 1)) - set(train.labels.unique().tolist())) if low >= 0 else []
    if low < 0 or empty:
        gaps = f"there is no training image of class {', '.join(map(str, empty[:5]))}{', ...' if empty[5:] else ''}"
        raise ValueError(
            f"labels must be 0, 1, 2 and so on, without gaps, got labels from {low} to {high}"
            f"{', and ' + gaps if empty else ''}: number the classes anew, "
            "numpy.unique(labels, return_inverse=True)[1], or say how many there are (num_classes, class_names)"
        )
    return high + 1


def _images(given: Any, what: str) -> Images:
    """Images and labels as tensors, of the types that were given. Raises ValueError."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(f"{what} must be (images, labels), got {type(given).__name__}")
    images, labels = (each if isinstance(each, torch.Tensor) else _array(each, what) for each in given)
    if not images.numel():
        raise ValueError(f"{what} holds no images")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels of {what} must be integers [{len(images)}], one for each image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return Images(_bytes(_channels_first(images, what), what), labels.long())


def _array(value: Any, what: str) -> torch.Tensor:
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be arrays of numbers or tensors, got {shown(value)}") from error


def _channels_first(images: torch.Tensor, what: str) -> torch.Tensor:
    """[N, C, H, W] from that, [N, H, W, C] or [N, H, W]. Raises ValueError where they are none or both."""
    if images.dim() == 3:
        return images[:, None]
    first, last = (images.dim() == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        raise ValueError(
            f"images of {what} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, got "
            f"{list(images.shape)}{', which may be either: give Images of them' if first else ''}"
        )
    return images if first else images.permute(0, 3, 1, 2)


def _bytes(images: torch.Tensor, what: str) -> torch.Tensor:
    """uint8 images from those or from floats in [0, 1]. Raises ValueError."""
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise ValueError(f"images of {what} must be uint8, or floats in [0, 1], got {images.dtype}")
    low, high = (value.item() for value in torch.aminmax(images))
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN too
        raise ValueError(
            f"images of {what} must be uint8, or floats in [0, 1], got {images.dtype} from {low:.4g} to {high:.4g}: "
            "give them before normalisation, which is the network's; divide by 255 what is 0 to 255"
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def _read(dataset: Any, what: str) -> Images:
    """All items of a map-style data set. Raises ValueError that names the item."""
    try:
        count = len(dataset)
        dataset.__getitem__  # noqa: B018
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{what} must be a map-style data set, with a length and items (image, label), got {shown(dataset)}: read "
            "one that streams into arrays, and give these (from_arrays)"
        ) from error
    if not count:
        raise ValueError(f"{what} holds no images")
    labels = torch.empty(count, dtype=torch.int64)
    images = torch.empty(0, dtype=torch.uint8)
    for row in counted(range(count), count, f"reading {what}"):
        image, labels[row] = _item(dataset, row, f"{what}[{row}]")
        if not row:
            images = torch.empty(count, *image.shape, dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"images must have one shape: {what}[0] is {list(images.shape[1:])}, {what}[{row}] is "
                f"{list(image.shape)}: let its transform resize or convert them"
            )
        images[row] = image
    return Images(images, labels)


def _item(dataset: Any, row: int, what: str) -> tuple[torch.Tensor, int]:
    """uint8 [C, H, W] and the label of an item. Raises ValueError."""
    try:
        item = dataset[row]
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {one_line(error)}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise ValueError(f"{what} must be (image, label), got {shown(item)}")
    image, label = item
    if isinstance(label, (torch.Tensor, np.ndarray, np.generic)) and np.ndim(label) == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"the label of {what} must be an integer, the number of its class, got {shown(label)}")
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of Pillow
        return pixels(image.convert("L" if image.mode in ("1", "L") else "RGB")), label
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise ValueError(f"the image of {what} must be one of Pillow, an array or a tensor, got {shown(image)}")
    whole = image if isinstance(image, torch.Tensor) else _array(image, what)
    return _bytes(_channels_first(whole[None], what), what)[0], label
