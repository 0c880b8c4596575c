"""A folder of pictures as torchvision's ImageFolder lays it out: a folder for each class, named as the class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..options import plain, shown
from . import own
from .dataset import DataSplits, Split
from .pictures import Pictures, Unreadable, header, in_threads

#: Those of torchvision's ImageFolder, in capitals or not.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAIN, TESTS = "train", ("test", "val", "valid")
#: Bytes of training and test pictures together that are kept in memory.
RESIDENT = 2 * 2**30


@dataclass(frozen=True)
class Found:
    """The pictures of a folder, not yet read, and what the user should know of them."""

    name: str
    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def load(
    data_dir: str | os.PathLike[str] | None,
    *,
    image_size: int | None = None,
    grey: bool = False,
    skip_unreadable: bool = False,
    stream: bool | None = None,
) -> DataSplits:
    """The pictures of a folder; see `find` for the arguments.

    stream: they are read anew in each epoch, instead of kept in memory. None: where they take more than ``RESIDENT``.
    With ``skip_unreadable`` all are read once to find those that cannot be.

    Raises ValueError, FileNotFoundError, ImportError (Pillow is missing).
    """
    found = find(data_dir, image_size=image_size, grey=grey, skip_unreadable=skip_unreadable)
    size = sum(len(part) * int(np.prod(part.shape)) for part in (found.train, found.test))
    skipped: list[str] | None = [] if skip_unreadable else None
    train: Split
    test: Split
    if size > RESIDENT if stream is None else stream:
        train, test = (part if skipped is None else part.sound(skipped) for part in (found.train, found.test))
    else:
        train, test = found.train.resident(skipped), found.test.resident(skipped)
    require_every_class(train.labels, found.class_names, found.train.root)
    notes = (*found.notes, *_said(skipped))
    return own.declared(found.name, train, test, len(found.class_names), found.class_names, notes)


def find(
    data_dir: str | os.PathLike[str] | None,
    *,
    image_size: int | None = None,
    grey: bool = False,
    skip_unreadable: bool = False,
) -> Found:
    """The pictures in ``data_dir``: train/CLASS/... and test/CLASS/... (or val, or valid), or CLASS/... alone, of which
    a share of each class is then held out for the test, always the same one of the same files.

    Classes are numbered in the order of their names; pictures may lie in folders below that of their class. Hidden
    files, and those that have not one of ``EXTENSIONS``, are passed over.

    image_size: pictures are resized, and cut, to so many pixels on each side (`read`). None: all must have one size.
    grey: in one channel instead of RGB. skip_unreadable: files that are no whole pictures are left out.
    """
    root = _root(data_dir)
    trained = root / TRAIN if _folders(root / TRAIN) else root  # a class may be called train
    tests = [root / name for name in TESTS if trained != root and _folders(root / name)]
    names, others = _classes(trained), Counter[str]()
    size, channels = (image_size, image_size) if image_size else (1, 1), 1 if grey else 3
    parts = []
    for folder in (trained, *tests[:1]):
        files, labels = _listed(folder, names, others, trained)
        parts.append(Pictures(files, labels, size, channels, str(folder)))
    notes = _notes(root, tests, names, parts, others)
    skipped: list[str] | None = [] if skip_unreadable else None
    if image_size is None:
        parts = _of_one_size(parts, skipped)
    if not tests:
        chosen, held, note = own.split(parts[0].labels)
        parts = [parts[0].take(chosen), parts[0].take(held)]
        notes.append(f"{plain(trained)} has no test pictures of their own: {note}")
    train, test = parts
    return Found(own.name_of(root), train, test, names, (*notes, *_said(skipped)))


def _notes(
    root: Path, tests: Sequence[Path], names: Sequence[str], parts: Sequence[Pictures], others: Counter[str]
) -> list[str]:
    """What the user should know of the files that were found."""
    notes = [f"{plain(other)} is not used: the test is that of {tests[0].name}" for other in tests[1:]]
    if tests and (missing := _empty(parts[1].labels, names)):
        notes.append(f"{plain(tests[0])} has no picture of {_some(missing)}")
    if others:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
        notes.append(f"{plain(root)}: files that are no pictures by their names are passed over: {counts}")
    return notes


def _empty(labels: torch.Tensor, names: Sequence[str]) -> list[str]:
    """The classes that no label is of."""
    return [name for name, n in zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True) if not n]


def require_every_class(labels: torch.Tensor, names: Sequence[str], source: object) -> None:
    """Raises ValueError for classes without a training picture that could be read."""
    if empty := _empty(labels, names):
        raise ValueError(
            f"{plain(source)}: no picture of the class {_some(empty)} can be read: delete it, or mend some"
        )


def _root(data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is None:
        raise ValueError(
            "data_dir: dataset folder has its pictures in a folder of yours: say which (--data-dir DIR), also to "
            "resume or to evaluate, for a checkpoint does not hold it"
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise FileNotFoundError(f"data_dir: {plain(root)} {what}: give the folder of the pictures")
    return root


def _folders(folder: Path) -> list[str]:
    """The folders in a folder that are not hidden, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _classes(folder: Path) -> tuple[str, ...]:
    names = _folders(folder)
    if len(names) < 2:
        has = f"has the one folder {shown(names[0])}" if names else "has no folders"
        raise ValueError(
            f"{plain(folder)} {has}: the pictures of each class have to lie in a folder, named as the class, as in "
            "DIR/cat/1.jpg and DIR/dog/1.jpg, or DIR/train/cat/1.jpg and DIR/test/cat/1.jpg"
        )
    return tuple(names)


def _listed(folder: Path, names: Sequence[str], others: Counter[str], trained: Path) -> tuple[list[str], torch.Tensor]:
    """The pictures of a folder, in an order that only their names decide, and their classes.

    others: counts other files by their extensions. trained: the folder that has the classes; in another one a class may
    have no pictures.
    """
    if unknown := [name for name in _folders(folder) if name not in set(names)]:
        raise ValueError(
            f"{plain(folder)} has folders that {plain(trained)} lacks: {_some(unknown)}; give both the same classes"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        passed: Counter[str] = Counter()
        found = sorted(_pictures(folder, name, passed))
        if not found and folder == trained:
            only = f"; it has files {', '.join(sorted(passed))}" if passed else ""
            raise ValueError(
                f"the class {shown(name)} has no pictures: {plain(folder / name)} holds no file "
                f"{', '.join(EXTENSIONS)}{only}. Delete the folder, or fill it"
            )
        others += passed
        files += found
        labels += [label] * len(found)
    order = own.shuffled(len(files))
    return [files[row] for row in order], torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(order)]


def _pictures(root: Path, name: str, others: Counter[str]) -> list[str]:
    """The pictures of a class, below ``root``; ``others`` counts other files by their extensions."""
    found = []
    for folder, below, files in os.walk(root / name, followlinks=True):
        below[:] = [each for each in below if not each.startswith(".")]
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if extension in EXTENSIONS and not file.startswith("."):
                found.append(os.path.relpath(os.path.join(folder, file), root))
            elif not file.startswith("."):
                others[extension or "without an extension"] += 1
    return found


def _of_one_size(parts: Sequence[Pictures], skipped: list[str] | None) -> list[Pictures]:
    """The pictures with the size that all of them have. Raises ValueError if they have several."""
    kept: list[Pictures] = []
    first: tuple[str, tuple[int, int]] | None = None
    for part in parts:
        sizes = np.zeros((len(part), 2), dtype=np.int64)
        faults: dict[int, str] = {}

        def look(row: int, part: Pictures = part, sizes: np.ndarray = sizes, faults: dict[int, str] = faults) -> None:
            try:
                sizes[row] = header(part.path(row))
            except Unreadable as error:
                faults[row] = str(error)

        in_threads(look, len(part), "looking at pictures")
        rows = part.readable(faults, skipped)
        if first is None and len(rows):
            first = part.path(rows[0]), (int(sizes[rows[0]][0]), int(sizes[rows[0]][1]))
        if first is None:
            raise Unreadable(f"{plain(part.root)}: none of {len(part):,} pictures can be read: {faults[0]}")
        if len(other := rows[(sizes[rows] != first[1]).any(1)]):
            height, width = sizes[other[0]]
            raise ValueError(
                f"the pictures have several sizes: {plain(first[0])} is {first[1][1]}x{first[1][0]}, "
                f"{plain(part.path(other[0]))} is {width}x{height}: say to which all are resized and cut, "
                "--image-size 64 (image_size=64) for example"
            )
        kept.append(replace(part.take(rows), size=first[1]))
    return kept


def _said(skipped: Sequence[str] | None) -> list[str]:
    return (
        [f"WARNING: pictures left out because they cannot be read: {len(skipped):,} ({_some(skipped)})"]
        if skipped
        else []
    )


def _some(names: Sequence[str]) -> str:
    few = ", ".join(map(plain, names[:5]))
    return few if len(names) <= 5 else f"{few} and {len(names) - 5:,} more"
