"""Batches of a data set that lives on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

import atlas_kernels as ak
from atlas_kernels.core import advise_huge_pages

from ..deal import WHOLE, Part, Whole
from ..noise import noise_keys
from .images import Images
from .pictures import Pictures

PADDING = 4  # of augmented images, on every side


class Batch(NamedTuple):
    """x [B, C, H, W] in [0, 1]; y int64 [B]; ids int64 [B], the samples' rows in the set."""

    x: torch.Tensor
    y: torch.Tensor
    ids: torch.Tensor

    def over_labels(self, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What ``value`` makes of the labels; for images with two labels (``methods.Mixing``) the mean by shares."""
        return value(self.y)

    @property
    def deal(self) -> Whole:
        """How other processes, which have other rows of the batch, are asked for theirs."""
        return WHOLE


class DealtBatch(Batch):
    """The rows of one process of a batch that is dealt out to several."""

    _deal: Whole

    @property
    def deal(self) -> Whole:
        return self._deal

    @classmethod
    def dealt(cls, batch: Batch, deal: Whole) -> DealtBatch:
        made = cls(*batch)
        made._deal = deal
        return made


class Batches:
    """Iterates over `Batch`es of `images`; one iteration is one epoch.

    The set is kept on `device` as uint8, so an epoch copies only its order; one operator makes x of it. What an epoch
    holds depends on (seed, epoch), and a sample's crop and flip on (seed, epoch, its row in the set), never on what was
    drawn before: a run resumed at an epoch sees the batches that an uninterrupted run sees, on every kind of device.
    Call `set_epoch` before each epoch, or every epoch is the same.

    With ``extra`` images every batch takes ``extra_share`` of its samples from them, after its own: drawn anew each
    epoch by (seed, epoch), with replacement; an epoch has as many batches as without, so it sees less of its own. They
    are numbered on from the set's. (Carmon et al. 2019, arXiv 1905.13736, whose share is a half.)

    With ``place`` = (r, W), W processes share each batch, and this one, number r, gets its rows of it (``deal.Part``):
    a ``DealtBatch``. Order, crops and flips are those of one process.

    batch_size: samples per batch. shuffle: a new order per epoch, else the set's own.
    augment: crop (padding 4) and horizontal flip. dtype: of x; u/255 is rounded once, to float32 (float64 for
    float64), then cast. channels_last: memory format of x. drop_last: leave out a last, smaller batch.
    """

    #: Whether images are read when they are needed.
    streams: ClassVar[bool] = False

    def __init__(
        self,
        images: Images | Pictures,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        device: torch.device | str,
        augment: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        drop_last: bool = False,
        extra: Images | None = None,
        extra_share: float = 0.5,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}; images are in [0, 1]")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none; check the subset or split")
        if drop_last and batch_size > len(images):
            raise ValueError(
                f"batch_size {batch_size} exceeds the set's {len(images)} images, so drop_last leaves no batch; "
                "choose a smaller batch_size or drop_last=False"
            )
        if (least := min(batch_size, len(images))) < place[1]:
            raise ValueError(
                f"batch_size: a batch of {least} images cannot be dealt out to {place[1]} processes: start fewer "
                "processes (--nproc-per-node), or take a larger batch_size"
            )
        self.batch_size, self.shuffle, self.seed, self.augment = batch_size, shuffle, seed, augment
        self._place = place
        self.dtype, self.drop_last = dtype, drop_last
        self.epoch = 0
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._labels = images.labels.to(device)
        self._hold(images, layout)
        self._extra, self._share = None, extra_share
        if extra is not None:
            least = min(batch_size, len(images))
            if not 0 < round(least * extra_share) < least:
                raise ValueError(
                    f"extra_share {extra_share:g} of batches of {least} images is none or all of them: set another "
                    "share or batch_size"
                )
            more = extra.images.to(device)  # gigabytes, which are not copied into another layout
            as_it_lies = more.is_contiguous() or more.is_contiguous(memory_format=torch.channels_last)
            more = more if as_it_lies else more.contiguous(memory_format=layout)
            self._extra = Images(more, extra.labels.to(device))
        self._key = noise_keys(seed, 0, 1)[0].to(device)

    def _hold(self, images: Any, layout: torch.memory_format) -> None:
        """Keeps on the device what batches are made of."""
        self._images = images.images.to(self._labels.device).contiguous(memory_format=layout)

    def close(self) -> None:
        """Ends what makes batches ahead of time; the next iteration begins it again."""

    def take_wait(self) -> float:
        """The seconds since the last call in which the loop waited for data, of which a set on the device has none."""
        return 0.0

    def __len__(self) -> int:
        full, rest = divmod(len(self._labels), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The epoch (from 0) that the next iteration yields. Raises ValueError for a negative one."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}; epochs count from 0")
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.starting(0)

    def starting(self, first: int) -> Iterator[Batch]:
        """The epoch's batches from number ``first`` (from 0) on. Those before it cost nothing."""
        epoch = self.epoch  # fixed, should set_epoch come while this iteration lasts
        order = self._order(epoch)
        more = None if self._extra is None else self._extra_order(len(self._extra), epoch)
        for batch in range(first, len(self)):
            start = batch * self.batch_size
            ids = order[start : start + self.batch_size]
            deal = self._deal(ids)
            made = self._batch(deal.own(ids), epoch) if more is None else self._joint(ids, more[start:], epoch, deal)
            yield made if deal is WHOLE else DealtBatch.dealt(made, deal)

    def _deal(self, ids: torch.Tensor) -> Whole:
        """Which of the rows of a batch this process has."""
        return Part.of(len(ids), *self._place) if self._place[1] > 1 else WHOLE

    def _batch(self, ids: torch.Tensor, epoch: int) -> Batch:
        x = self._augmented(self._images, ids, epoch, channels_last=self.channels_last)
        return Batch(x, self._labels[ids], ids)

    def _joint(self, ids: torch.Tensor, rows: torch.Tensor, epoch: int, deal: Whole) -> Batch:
        """A batch of as many samples, of which the last ``extra_share`` are the first of these extra rows."""
        assert self._extra is not None
        count = round(len(ids) * self._share)
        first, mine = len(ids) - count, deal.places(len(ids))
        own, rows = ids[count:][mine], rows[max(mine.start - first, 0) : max(mine.stop - first, 0)]
        ids = torch.cat([own, rows + len(self._labels)])
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (len(ids), *self._images.shape[1:])
        x = advise_huge_pages(torch.empty(shape, dtype=self.dtype, device=ids.device, memory_format=layout))
        self._augmented(self._images, own, epoch, out=x[: len(own)])
        self._augmented(self._extra.images, rows, epoch, ids=ids[len(own) :], out=x[len(own) :])
        return Batch(x, torch.cat([self._labels[own], self._extra.labels[rows]]), ids)

    def _augmented(self, images: torch.Tensor, rows: torch.Tensor, epoch: int, **how: Any) -> torch.Tensor:
        return ak.augment(
            images,
            rows,
            padding=PADDING if self.augment else 0,
            flip=self.augment,
            key=self._key,
            draw=epoch,
            dtype=self.dtype,
            **how,
        )

    def _extra_order(self, count: int, epoch: int) -> torch.Tensor:
        """Row numbers of extra samples, one for each sample of the epoch; a batch uses the first of its part."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(1, epoch)))
        return torch.from_numpy(rng.integers(count, size=len(self._labels))).to(self._labels.device)

    def _order(self, epoch: int) -> torch.Tensor:
        n = len(self._labels)
        if not self.shuffle:
            return torch.arange(n, device=self._labels.device)
        # NumPy mixes (seed, key) into independent streams; torch's CPU generator keeps only 32 bits of a seed.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(0, epoch)))
        return torch.from_numpy(rng.permutation(n)).to(self._labels.device)
