"""Batches of pictures that are not kept in memory: decoded, in processes of their own, while the network trains."""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import atlas_kernels as ak

from ..deal import WHOLE
from .dataset import Split
from .images import Images
from .loader import PADDING, Batch, Batches, DealtBatch
from .pictures import Pictures, Unreadable, centred, decoded, require_pillow

Crop = Literal["shift", "resized"]
#: Of a crop that is resized: its share of the picture, its width over its height, and how often it is drawn at most.
SCALE, RATIO, DRAWS = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: Batches that each worker process has ready, and workers where nobody says how many.
AHEAD, MOST = 2, 16


#: What may have workers. They ignore signals, so they have to be told when the process ends.
_OPEN: weakref.WeakSet[Streamed] = weakref.WeakSet()


class Asked(NamedTuple):
    """What is asked of a worker: the pictures of these rows, as they are in an epoch."""

    epoch: int
    rows: Sequence[int]


class Streamed(Batches):
    """As `Batches`, of `Pictures`, which are read anew in each epoch.

    Order, crops and flips depend on (seed, epoch, row) alone, never on workers or their number. Pictures travel as
    uint8, on CUDA from pinned memory, and become x on the device, by the operator that `Batches` uses: with ``shift``
    the batches have the bits of those of `Batches`.

    crop: how ``augment`` crops, beside the flip. shift: as `Batches`. resized: a part of random size and shape, resized
    to that of the set (Szegedy et al. 2015, arXiv 1409.4842, as is usual for ImageNet).
    workers: processes that decode; 0: this one does. None: one less than there are CPU cores, but 1 to 16.

    A file that cannot be read raises `Unreadable`, which names it. `close` ends the workers, which the next iteration
    starts again. They end too with the process, if it is killed within five seconds.
    """

    streams = True

    def __init__(
        self, pictures: Pictures, batch_size: int, *, crop: Crop = "shift", workers: int | None = None, **how: Any
    ) -> None:
        super().__init__(pictures, batch_size, **how)
        resized = self.augment and crop == "resized"
        self._padding = PADDING if self.augment and not resized else 0
        self._workers = usual_workers() if workers is None else workers
        self._reader = Reader(pictures, self.seed if resized else None)
        self._plan = Plan()
        self._loader: DataLoader[Any] | None = None
        self._waited = 0.0
        _OPEN.add(self)

    def close(self) -> None:
        loader, self._loader = self._loader, None
        if loader is not None and (found := getattr(loader, "_iterator", None)) is not None:
            found._shutdown_workers()  # also of an iteration that a traceback holds

    def take_wait(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def starting(self, first: int) -> Iterator[Batch]:
        epoch, order = self.epoch, self._order(self.epoch)
        parts = order.split(self.batch_size)[first : len(self)]
        begun = time.perf_counter()
        rows = order.cpu().split(self.batch_size)[first : len(self)]
        self._plan.asked = [Asked(epoch, self._deal(part).own(part).tolist()) for part in rows]
        self._loader = self._loader or self._started()
        found = iter(self._loader)
        for ids in parts:
            pixels = next(found)
            self._waited += time.perf_counter() - begun
            if isinstance(pixels, str):
                remedy = "Mend or delete it, or leave such files out with --skip-unreadable (skip_unreadable=True)"
                raise Unreadable(f"{pixels}. {remedy}")
            deal = self._deal(ids)
            made = self._made(pixels, deal.own(ids), epoch)
            yield made if deal is WHOLE else DealtBatch.dealt(made, deal)
            begun = time.perf_counter()

    def _hold(self, images: Any, layout: torch.memory_format) -> None:
        """Keeps nothing."""

    def _made(self, pixels: torch.Tensor, ids: torch.Tensor, epoch: int) -> Batch:
        x = ak.augment(
            pixels.to(ids.device, non_blocking=True).permute(0, 3, 1, 2),
            torch.arange(len(ids), device=ids.device),
            padding=self._padding,
            flip=self.augment,
            key=self._key,
            ids=ids,
            draw=epoch,
            dtype=self.dtype,
            channels_last=self.channels_last,
        )
        return Batch(x, self._labels[ids], ids)

    def _started(self) -> DataLoader[Any]:
        several: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": AHEAD, "worker_init_fn": _begin}
        return DataLoader(
            self._reader,
            batch_size=None,  # a batch is what the reader gives
            sampler=self._plan,
            collate_fn=_same,
            num_workers=self._workers,
            pin_memory=self._labels.is_cuda,
            generator=torch.Generator(),  # else it would draw from torch's own, in which dropout draws
            **(several if self._workers else {}),
        )


def in_order(images: Split, batch_size: int, **how: Any) -> Iterator[Batch]:
    """Batches of the images as they are, in their order. Pictures are read in threads, one batch ahead.

    how: device, dtype, channels_last, as for `Batches`.
    """
    if isinstance(images, Images):
        yield from Batches(images, batch_size, shuffle=False, seed=0, **how)
        return
    pool = ThreadPoolExecutor(usual_workers())
    parts = torch.arange(len(images)).split(batch_size)
    try:
        coming = [[pool.submit(images.read, row) for row in parts[0].tolist()]]
        for rows, following in zip_longest(parts, parts[1:], fillvalue=parts[0][:0]):
            pixels = torch.stack([each.result() for each in coming.pop()])
            coming.append([pool.submit(images.read, row) for row in following.tolist()])
            (batch,) = Batches(Images(pixels, images.labels[rows]), len(rows), shuffle=False, seed=0, **how)
            yield batch._replace(ids=batch.ids + rows[0].item())
    finally:
        pool.shutdown(cancel_futures=True)


class Plan:
    """The batches of the epoch that is asked for, in their order."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.asked)

    def __len__(self) -> int:
        return len(self.asked)


class Reader(Dataset[Any]):
    """Reads batches, in a worker: uint8 [B, H, W, C], or what is wrong with a file, in words.

    seed: of crops that are resized; None: pictures are read as they are evaluated.
    """

    def __init__(self, pictures: Pictures, seed: int | None) -> None:
        # One array: workers would copy a list of texts piece by piece, as each look at a text counts its references.
        self._paths = np.array([os.fsencode(path) for path in pictures.paths])
        self._root, self._size, self._channels, self._seed = pictures.root, pictures.size, pictures.channels, seed

    def __getitem__(self, asked: Asked) -> torch.Tensor | str:
        made = torch.empty(len(asked.rows), *self._size, self._channels, dtype=torch.uint8)
        places = made.numpy().squeeze(3) if self._channels == 1 else made.numpy()
        try:
            for place, row in enumerate(asked.rows):
                places[place] = np.asarray(self._picture(row, asked.epoch))
        except Unreadable as error:
            return str(error)
        return made

    def _picture(self, row: int, epoch: int) -> Any:
        picture = decoded(os.path.join(self._root, os.fsdecode(self._paths[row])), self._channels)
        if self._seed is None:
            return centred(picture, self._size)
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(2, epoch, row)))
        box, size = part_of(picture.size, rng), self._size[::-1]
        return picture.resize(size, require_pillow().Resampling.BILINEAR, box=box)


def part_of(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a part of random size and shape, of a picture (width, height); the middle, if none
    that was drawn fits in."""
    width, height = size
    for _ in range(DRAWS):
        area, ratio = width * height * rng.uniform(*SCALE), np.exp(rng.uniform(*np.log(RATIO)))
        wide, high = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide = min(width, max(1, round(height * RATIO[1])))
    high = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def usual_workers() -> int:
    """One less than this process has CPU cores, but 1 to 16. Processes that torchrun has started on one machine share
    its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, MOST))


@atexit.register  # after multiprocessing's own, so it is called before that waits for the workers
def close_all() -> None:
    """Ends the workers of all."""
    for batches in list(_OPEN):
        batches.close()


def _begin(worker: int) -> None:
    """A worker ends with the process that trains, which ends as it sees fit: after a batch and a checkpoint, say."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _same(made: Any) -> Any:
    return made
