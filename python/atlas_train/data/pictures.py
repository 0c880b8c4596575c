"""Labelled pictures in files, and how one of them is read (with Pillow)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..options import plain
from ..terminal_line import Line
from .images import Images, drawn

#: From this side on evaluation resizes pictures to 8/7 of the side before it cuts out their middle: to 256 for 224, as
#: is usual for ImageNet.
LARGE, MARGIN = 224, 8 / 7
#: Pictures by which mean and std are measured.
MEASURED = 4000
#: Pictures that one thread reads before it takes more.
_CHUNK = 32


class Unreadable(ValueError):
    """A file that is no whole picture."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled pictures in files, which are not read yet: what `Images` are before they are in memory.

    paths: their files, in the folder ``root``. labels: int64 [N]. size: (H, W) that each has after `read`. channels: 3
    (RGB) or 1 (grey).
    """

    paths: Sequence[str]
    labels: torch.Tensor
    size: tuple[int, int]
    channels: int = 3
    root: str = ""

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.paths),):
            raise ValueError(
                f"labels must be int64 [{len(self.paths)}], one per picture, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {self.channels}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Pictures({[len(self), *self.shape]})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture, as it is read."""
        return (self.channels, *self.size)

    def path(self, row: int) -> str:
        """Where a picture lies."""
        return os.path.join(self.root, self.paths[row])

    def read(self, row: int) -> torch.Tensor:
        """A picture, uint8 [C, H, W], as it is evaluated. Raises Unreadable."""
        return read(self.path(row), self.size, self.channels)

    def first(self, n: int) -> torch.Tensor:
        """The pixels of the first `n` pictures, read as `read` does."""
        return torch.stack([self.read(row) for row in range(min(n, len(self)))])

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`Images.mean_std`, of at most ``MEASURED`` of the pictures, always the same ones."""
        few = self if len(self) <= MEASURED else self.subset(MEASURED, seed=0)
        return few.resident().mean_std()

    def subset(self, n: int, seed: int | None = None) -> Pictures:
        """`n` of the pictures; see `Images.subset`."""
        return self.take(drawn(self.labels, n, seed))

    def take(self, rows: np.ndarray) -> Pictures:
        """The pictures of these rows."""
        return replace(self, paths=[self.paths[row] for row in rows], labels=self.labels[torch.from_numpy(rows)])

    def resident(self, skipped: list[str] | None = None) -> Images:
        """All pictures in memory, read by as many threads as there are CPU cores.

        skipped: takes the errors of files that cannot be read, which are then left out. None: they raise Unreadable.
        """
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        faults: dict[int, str] = {}

        def fill(row: int) -> None:
            try:
                pixels[row] = self.read(row)
            except Unreadable as error:
                faults[row] = str(error)

        in_threads(fill, len(self), "reading pictures")
        kept = self.readable(faults, skipped)
        if len(kept) == len(self):
            return Images(pixels, self.labels, self.files())
        own = self.take(kept)
        return Images(pixels[torch.from_numpy(kept)], own.labels, own.files())

    def sound(self, skipped: list[str]) -> Pictures:
        """The pictures that can be read, each of which is read for that; ``skipped`` as for `resident`."""
        faults: dict[int, str] = {}

        def look(row: int) -> None:
            try:
                self.read(row)
            except Unreadable as error:
                faults[row] = str(error)

        in_threads(look, len(self), "looking at pictures")
        return self.take(self.readable(faults, skipped))

    def readable(self, faults: Mapping[int, str], skipped: list[str] | None) -> np.ndarray:
        """The rows of the pictures that can be read. faults: the errors of the others, by row. skipped: as for
        `resident`."""
        errors = sorted(faults.values())
        if errors and skipped is None:
            few = "; ".join(errors[:3]) + (f"; and {len(errors) - 3:,} more" if len(errors) > 3 else "")
            raise Unreadable(
                f"{len(errors):,} of {len(self):,} pictures cannot be read: {few}. Mend or delete them, or leave them "
                "out with --skip-unreadable (skip_unreadable=True)"
            )
        if skipped is not None:
            skipped += errors
        return np.setdiff1d(np.arange(len(self)), list(faults))

    def files(self) -> dict[str, str]:
        """What tells these files from others: of each folder in ``root``, how many there are and the sha256 of their
        paths (below ``root``), classes and sizes in bytes."""
        lines: dict[str, list[str]] = {}
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            place, size = Path(path).as_posix(), os.path.getsize(os.path.join(self.root, path))
            lines.setdefault(place.partition("/")[0], []).append(f"{place}\0{label}\0{size}\n")
        digests = {
            folder: hashlib.sha256("".join(sorted(own)).encode("utf-8", "surrogateescape"))
            for folder, own in lines.items()
        }
        return {folder: f"{len(lines[folder])} {digests[folder].hexdigest()[:16]}" for folder in sorted(lines)}


def read(path: str | os.PathLike[str], size: tuple[int, int] | None = None, channels: int = 3) -> torch.Tensor:
    """A picture, uint8 [C, H, W], as it is evaluated.

    size: (H, W) to which it is resized (bilinear, as torchvision's Resize does) until it covers that, and of which the
    middle is cut out; a picture that has the size, or with None any, stays as it is. channels: 3 (RGB) or 1 (grey).

    As torchvision's ImageFolder, it drops transparency and leaves a picture as it lies in the file, whatever EXIF says
    of its orientation: networks that are trained here and there see the same pixels.

    Raises Unreadable, which names the file, for one that is empty, cut off, or no picture.
    """
    return pixels(centred(decoded(path, channels), size))


def decoded(path: str | os.PathLike[str], channels: int = 3) -> Any:
    """The picture of a file as one of Pillow, in RGB or grey. Raises Unreadable."""
    pillow = require_pillow()
    try:
        with open(path, "rb") as file, pillow.open(file) as picture:
            picture.load()
            return _converted(picture, channels)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise Unreadable(f"{plain(path)} {_fault(path, error)}") from error


def header(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(H, W) of a picture, whose pixels are not read. Raises Unreadable."""
    pillow = require_pillow()
    try:
        with open(path, "rb") as file, pillow.open(file) as picture:
            width, height = picture.size
            return height, width
    except Exception as error:
        raise Unreadable(f"{plain(path)} {_fault(path, error)}") from error


def centred(picture: Any, size: tuple[int, int] | None) -> Any:
    """The middle of a picture of Pillow, in a size; see `read`."""
    if size is None or picture.size == size[::-1]:
        return picture
    (height, width), (old_width, old_height) = size, picture.size
    margin = MARGIN if min(size) >= LARGE else 1
    high, wide = round(height * margin), round(width * margin)
    if high * old_width >= wide * old_height:  # the height is what has to grow most, or to shrink least
        wide = high * old_width // old_height
    else:
        high = wide * old_height // old_width
    left, top = round((wide - width) / 2), round((high - height) / 2)
    if picture.size != (wide, high):
        picture = picture.resize((wide, high), require_pillow().Resampling.BILINEAR)
    return picture.crop((left, top, left + width, top + height))


def pixels(picture: Any) -> torch.Tensor:
    """A picture of Pillow, in RGB or grey, as uint8 [C, H, W]."""
    array = np.array(picture)  # a copy, which torch may write to
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1).contiguous()


def require_pillow() -> Any:
    """Pillow's Image, or ImportError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'atlas-kernels[train]'") from error
    return Image


def in_threads(work: Callable[[int], None], count: int, what: str) -> None:
    """``work`` of every number below ``count``, in as many threads as this process has CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def some(start: int) -> int:
        for number in range(start, min(start + _CHUNK, count)):
            work(number)
        return min(start + _CHUNK, count)

    pool = ThreadPoolExecutor(min(cores, 16))
    try:
        for _ in counted(pool.map(some, range(0, count, _CHUNK)), count, what):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def counted(done: Iterable[int], count: int, what: str) -> Iterator[int]:
    """The numbers, which a terminal shows."""
    line = Line(what, count)
    try:
        for number in done:
            yield number
            line.show(number)
    finally:
        line.end()


def _converted(picture: Any, channels: int) -> Any:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts values above 255 off
        picture = require_pillow().fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of 32 bits (mode {picture.mode}), which says not what is white")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # else Pillow warns
    return picture.convert("RGB" if channels == 3 else "L")


def _fault(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if not os.path.getsize(path):
        return "is empty (0 bytes)"
    if type(error).__name__ == "UnidentifiedImageError":
        return "is no picture, or of a format that Pillow does not know"
    return f"is damaged, cut off, or of an unusual kind: {' '.join(str(error).split()) or type(error).__name__}"
