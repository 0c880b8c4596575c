"""Labelled uint8 images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: `images` uint8 [N, C, H, W], `labels` int64 [N], tensors or arrays of NumPy, which become such.

    files: of images that were read from files of their own, what tells these from others (`Pictures.files`).

    Raises ValueError for anything else, images [N, H, W, C] included.
    """

    images: torch.Tensor
    labels: torch.Tensor
    files: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        arrays = {name: isinstance(getattr(self, name), np.ndarray) for name in ("images", "labels")}
        for name in arrays:
            object.__setattr__(self, name, _tensor(name, getattr(self, name)))
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            remedies = []
            if self.images.dtype != torch.uint8:
                cast = ".astype(numpy.uint8)" if arrays["images"] else ".to(torch.uint8)"
                remedies.append(f"images in [0, 1] become uint8 by (255 * images).round(){cast}")
            if self.images.dim() == 3:
                remedies.append("add the channel: images[:, None]")
            raise ValueError(
                "; ".join(
                    [f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}", *remedies]
                )
            )
        _, first, second, last = self.images.shape
        if last in (1, 3, 4) and first > 4 and second != last:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {list(self.images.shape)}, which is [N, H, W, C]; give "
                "images.permute(0, 3, 1, 2), or images.transpose(0, 3, 1, 2) of an array of NumPy"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            cast = "labels.astype(numpy.int64)" if arrays["labels"] else "labels.long()"
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], one per image, got {self.labels.dtype} "
                f"{list(self.labels.shape)}; convert them with {cast} and check their number"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Images({self.images.dtype} {list(self.images.shape)})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, for images in [0, 1]."""
        counts = torch.zeros(self.images.shape[1], 256, dtype=torch.int64)
        for part in self.images.split(1000):  # never a copy of the whole set
            for channel, row in enumerate(counts):
                row += torch.bincount(part[:, channel].flatten(), minlength=256).cpu()
        share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean = share @ value
        std = (share * (value - mean[:, None]).square()).sum(1).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())

    def first(self, n: int) -> torch.Tensor:
        """The pixels of the first `n` images."""
        return self.images[:n]

    def subset(self, n: int, seed: int | None = None) -> Images:
        """`n` of the images, in their original order: the first `n`, or, with a seed, a stratified draw.

        A stratified draw keeps every class's share (to within one image) and depends only on the labels, `n` and
        `seed`, on every machine. Sample number i of the subset is its row i, not the row of the full set.
        Raises ValueError when `n` is not in 1..len(self).
        """
        return self.take(drawn(self.labels, n, seed))

    def take(self, rows: np.ndarray) -> Images:
        """The images of these rows."""
        chosen = torch.from_numpy(rows).to(self.labels.device)
        return Images(self.images[chosen], self.labels[chosen])


def _tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor, or an array of NumPy as one: labels of any integer type as int64. Raises ValueError."""
    if isinstance(value, np.ndarray):
        if name == "labels" and value.dtype.kind in "iu":
            value = value.astype(np.int64)  # of either byte order
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:  # objects, texts
            raise ValueError(f"{name} must hold numbers, got an array of {value.dtype}") from error
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor or an array of NumPy, got {type(value).__name__}")
    whole = value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())
    return value.long() if name == "labels" and whole else value


def drawn(labels: torch.Tensor, n: int, seed: int | None) -> np.ndarray:
    """The rows of `Images.subset`."""
    if not 1 <= n <= len(labels):
        raise ValueError(f"n must be in 1..{len(labels)} (the size of this set), got {n}; ask for fewer images")
    return np.arange(n) if seed is None else stratified(labels.cpu().numpy(), n, seed)


def stratified(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sorted rows (int64 [n]) of a random draw in which every class keeps its share, by largest remainder."""
    # RandomState, not default_rng: NumPy froze its streams, so the draw is the same under every version.
    words = [seed & 0xFFFFFFFF, seed >> 32]  # of a larger seed, which it does not take as one number
    order = np.random.RandomState(words if words[1] else seed).permutation(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    quota, remainder = np.divmod(counts * n, len(labels))
    largest = np.argsort(-remainder, kind="stable")[: n - quota.sum()]
    quota[largest] += 1
    rows = [order[labels[order] == c][:k] for c, k in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(rows)).astype(np.int64)
