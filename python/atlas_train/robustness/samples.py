"""The images of an evaluation: of a data set, of arrays, or of a loader of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atlas_kernels.attacks.saved import digest

from ..data import Images, Pictures, Split, in_order
from ..data.identity import of_files
from ..data.images import stratified
from ..options import shown

SUBSET_SEED = 0  # one fixed draw, so that every model sees the same images
_FORMS = "Images, a pair (images, labels) of tensors or arrays, or a loader of batches (images, labels)"


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images, uint8 [N, C, H, W] or float [N, ...] in [0, 1], or pictures in files, which are read in parts;
    and where they stand in the set they are of.

    ids: their numbers in the noise; default: 0 to N - 1.
    """

    x: Tensor | Pictures
    y: Tensor
    numbers: Tensor
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def part(self, number: int, parts: int) -> Samples:
        """One of so many parts of all; its noise is that of the whole."""
        rows = torch.arange(number, len(self), parts)
        return self.take(rows, rows if self.ids is None else self.ids[rows])

    def take(self, rows: Tensor, ids: Tensor | None = None) -> Samples:
        """The samples of these rows, with these ids."""
        x = self.x.take(rows.numpy()) if isinstance(self.x, Pictures) else self.x[rows.to(self.x.device)]
        return Samples(x, self.y[rows.to(self.y.device)], self.numbers[rows], ids)

    def digest(self) -> str:
        """Tells these images and labels from others; pictures by the names and sizes of their files."""
        if isinstance(self.x, Pictures):
            return f"{of_files(self.x.files(), self.x.shape)} {digest([self.y])}"
        return digest([self.x, self.y])

    def images(self) -> Split | None:
        """As the trainer has them, if they are of whole numbers."""
        if isinstance(self.x, Pictures):
            return self.x
        return Images(self.x, self.y) if self.x.dtype == torch.uint8 else None

    @property
    def channels(self) -> int:
        """What is normalised one by one."""
        return self.x.channels if isinstance(self.x, Pictures) else self.x.shape[1]

    def batches(
        self, model: nn.Module, size: int, device: torch.device, channels_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of x in [0, 1], of the numbers that the model computes in, y, and their ids, on the device."""
        ids = None if self.ids is None else self.ids.to(device)
        for x, y, rows in self._batches(model, size, device, channels_last):
            yield x, y, rows if ids is None else ids[rows]

    def _batches(
        self, model: nn.Module, size: int, device: torch.device, channels_last: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same, with the rows of both."""
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        if (images := self.images()) is not None:
            yield from in_order(images, size, device=device, dtype=dtype, channels_last=channels_last)
            return
        assert isinstance(self.x, Tensor)
        layout = torch.channels_last if channels_last and self.x.dim() == 4 else torch.contiguous_format
        for rows in torch.arange(len(self)).split(size):
            x = self.x[rows.to(self.x.device)].to(device, dtype).contiguous(memory_format=layout)
            yield x, self.y[rows.to(self.y.device)].to(device), rows.to(device)

    def everything(self, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """All of them as one batch."""
        return next(self.batches(model, len(self), device))


def gathered(data: Any, size: int | None = None) -> Samples:
    """The images of ``data``, or ``size`` of them: of a loader the first, else a stratified draw, always the same.

    Raises TypeError or ValueError for what is none, for pixels that are not in [0, 1] and labels that are no integers.
    """
    x: Tensor | Pictures
    if isinstance(data, Samples):
        x, y = data.x, data.y
    elif isinstance(data, Pictures):
        x, y = data, data.labels
    elif isinstance(data, Images):
        x, y = data.images, data.labels
    elif _is_pair(data):
        x, y = _tensor("images", data[0]), _tensor("labels", data[1])
    else:
        x, y = _of_loader(data, size)
    if isinstance(x, Tensor):
        x, y = _checked(x, y)
    numbers = data.numbers if isinstance(data, Samples) else torch.arange(len(y))
    if size is None or size >= len(y):
        return Samples(x, y, numbers)
    chosen = stratified(y.cpu().numpy(), size, SUBSET_SEED)
    rows = torch.from_numpy(chosen)
    return Samples(x, y, numbers).take(rows)


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(v, (Tensor, np.ndarray)) for v in data)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {type(value).__name__}") from error


def _of_loader(data: Any, size: int | None) -> tuple[Tensor, Tensor]:
    """The first ``size`` images of a loader, in the order in which they come, in the memory of the CPU."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict, Tensor, np.ndarray)):
        raise TypeError(f"data must be {_FORMS}, got {type(data).__name__}")
    parts: list[tuple[Tensor, Tensor]] = []
    count = 0
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"data must be {_FORMS}; this loader gives {type(batch).__name__}: {shown(batch)}")
        x, y = _tensor("images", batch[0]).detach().cpu(), _tensor("labels", batch[1]).cpu()
        if y.dim() != 1 or not len(y) == len(x):
            raise ValueError(
                f"data: a batch must be images [B, ...] and labels [B], got {list(x.shape)} and {list(y.shape)}: put a "
                "data set of single images into torch.utils.data.DataLoader"
            )
        parts.append((x, y))
        count += len(y)
        if size is not None and count >= size:
            break
    if not parts:
        raise ValueError("data must hold at least one image, and the loader gave none: check its data set")
    x, y = (torch.cat([part[i] for part in parts])[:size] for i in (0, 1))
    return x, y


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers [N], got {y.dtype} {list(y.shape)}: convert them (labels.long())")
    if y.dim() != 1 or x.dim() < 2 or len(x) != len(y):
        raise ValueError(
            f"images [N, ...] and labels [N] must be as many, got {list(x.shape)} and {list(y.shape)}: one label, a "
            "number, for each image"
        )
    if not len(y):
        raise ValueError("data must hold at least one image, got none")
    if x.dtype == torch.uint8:
        Images(x, y.long())
        return x, y.long()
    if not x.is_floating_point():
        raise ValueError(f"images must be float in [0, 1] or uint8, got {x.dtype}: divide them by their largest value")
    low, high = (float(value) for value in torch.aminmax(x))
    if low != low:
        raise ValueError(f"images must be in [0, 1], got NaN in {int(x.isnan().flatten(1).any(1).sum())} of them")
    if not (low >= 0 and high <= 1):
        remedy = "divide by 255" if low >= 0 and 1 < high <= 255 else "give the images as they are before it"
        apart = "" if low >= 0 else ", and mean and std apart (mean=..., std=...)"
        normalised = "" if low >= 0 else ": they look normalised"
        raise ValueError(
            f"images must be in [0, 1], as eps is in their unit, got values from {low:.4g} to {high:.4g}{normalised}; "
            f"{remedy}{apart}"
        )
    return x, y.long()
