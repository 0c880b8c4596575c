"""A batch dealt out to the processes that train together, and what they tell each other of it.

Process r of W has the rows ``[B r // W, B (r + 1) // W)`` of a batch of B. Whatever a method computes of its own rows
alone is as in one process, for noise goes by the samples' numbers. What couples the batch asks ``Batch.deal`` for the
rows of all. The loss of a process is either the mean of its own rows or, where all rows were gathered, that of the
batch; either way the loss of the batch is the mean of the processes' losses by their shares, and so is its gradient.

Gradients are averaged when a method steps (``Descent.step``), in buckets, after all of its backwards. torch's
DistributedDataParallel averages within the backward, and expects of a step one forward through its wrapper and one
backward after it. That does not hold here: some methods run parts of the network (``adr``, ``yopo``), stop in a forward
(``yopo``), add up several backwards (``yopo``, ``free``), or ask autograd for gradients (``awp``, ``liet``), of which
its hooks see none. There is nothing to wrap, either: attacks, hooks and exported weights see the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from atlas_kernels.layout import is_channels_last

from .processes import place

BUCKET = 25 * 2**20  # bytes that are averaged together, as DistributedDataParallel has it


class Whole:
    """A batch that one process has whole: everything is as it is."""

    def total(self, rows: Tensor) -> int:
        """How many rows the batch has."""
        return len(rows)

    def gathered(self, rows: Tensor, *, of_mean: bool = False) -> Tensor:
        """The rows of all processes, in the order of the batch, with their graph.

        of_mean: the rows are a gradient of a mean over this process's rows; those that come back are of the batch's.
        """
        return rows

    def places(self, total: int) -> slice:
        """Where the rows of this process are in the batch, which has so many."""
        return slice(0, total)

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this process, of rows of the batch."""
        return rows

    def agreed(self, value: Tensor) -> Tensor:
        """The first process's values of a tensor, which is written in place."""
        return value

    def averaged(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of the batch's loss by ``weights``, from those of this process's loss."""
        return gradients

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """Makes ``.grad`` of the weights that of the batch's loss."""

    def summed(self, counts: Tensor) -> Tensor:
        """Counts of this process's rows added up to those of the batch."""
        return counts

    def settled(
        self, loss: Tensor, metrics: Mapping[str, Tensor], model: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the batch, from those of this process's rows.

        model: at the end of a step the network, whose running statistics become the means over the processes. They move
        by an average, so it is the same whether each of a step's forwards is averaged or all at its end. So whatever
        runs in eval mode (attacks, evaluation), averages of the weights and checkpoints have the same network in every
        process without more.
        """
        return loss, dict(metrics)


WHOLE = Whole()


@dataclass(frozen=True)
class Part(Whole):
    """What process ``rank`` of the group has of a batch; ``bounds``: of all processes' rows, W + 1 numbers."""

    rank: int
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, rank: int, count: int) -> Part:
        return cls(rank, tuple(rows * process // count for process in range(count + 1)))

    def places(self, total: int) -> slice:
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def share(self) -> float:
        return (self.bounds[self.rank + 1] - self.bounds[self.rank]) / self.bounds[-1]

    def total(self, rows: Tensor) -> int:
        return self.bounds[-1]

    def gathered(self, rows: Tensor, *, of_mean: bool = False) -> Tensor:
        made: Tensor = _Gathered.apply(rows, self)
        if not of_mean:
            return made
        scales = [(end - begin) / self.bounds[-1] for begin, end in pairwise(self.bounds) for _ in range(begin, end)]
        return made * made.new_tensor(scales).view(-1, *[1] * (made.dim() - 1))

    def own(self, rows: Tensor) -> Tensor:
        return rows[self.places(len(rows))]

    def agreed(self, value: Tensor) -> Tensor:
        dense = value.contiguous()
        dist.broadcast(dense, src=0)
        return value if dense is value else value.copy_(dense)

    def averaged(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """A weight that has a gradient in some of the processes alone counts as 0 in the others."""
        known = torch.tensor([gradient is not None for gradient in gradients], dtype=weights[0].dtype)
        filled = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
        *means, anywhere = _sums([*filled, known.to(weights[0].device)], self.share)
        if bool(known.all()):
            return means
        return [mean if some else None for mean, some in zip(means, anywhere.tolist(), strict=True)]

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        trained = [weight for weight in weights if weight.requires_grad]
        for weight, mean in zip(trained, self.averaged([w.grad for w in trained], trained), strict=True):
            if weight.grad is None or mean is None:
                weight.grad = mean
            else:
                weight.grad.copy_(mean)

    def summed(self, counts: Tensor) -> Tensor:
        dist.all_reduce(counts)
        return counts

    def settled(
        self, loss: Tensor, metrics: Mapping[str, Tensor], model: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        statistics = [] if model is None else list(_running_statistics(model))
        values = [loss, *metrics.values(), *statistics]
        # In float64, so that a number which is the same in all of them stays as it is.
        sums = _sums([value.double() for value in values], self.share)
        means = [mean.to(value.dtype) for mean, value in zip(sums, values, strict=True)]
        for value, mean in zip(statistics, means[1 + len(metrics) :], strict=True):
            value.copy_(mean)
        return means[0], dict(zip(metrics, means[1:], strict=False))


def dealt(rows: int) -> Whole:
    """How so many rows are dealt out to the processes that there are."""
    rank, count = place()
    return Part.of(rows, rank, count) if count > 1 else WHOLE


def _running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Those that forwards in train mode move."""
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            yield from (module.running_mean, module.running_var)  # type: ignore[misc]


def _sums(tensors: Sequence[Tensor], share: float) -> list[Tensor]:
    """The sums over the processes of each tensor, times the share of the process that it is of."""
    plain = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    under_way = []
    for bucket in _buckets(plain):
        flat = torch.cat([plain[number].reshape(-1) for number in bucket]).mul_(share)
        under_way.append((dist.all_reduce(flat, async_op=True), flat, bucket))
    sums = dict[int, Tensor]()
    for work, flat, bucket in under_way:
        work.wait()
        parts = flat.split([plain[number].numel() for number in bucket])
        sums |= {number: part.view(plain[number].shape) for number, part in zip(bucket, parts, strict=True)}
    return [torch.view_as_complex(sums[i]) if t.is_complex() else sums[i] for i, t in enumerate(tensors)]


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the tensors, by dtype, those together that come to about ``BUCKET`` bytes."""
    buckets: list[list[int]] = []
    filling: dict[torch.dtype, tuple[int, list[int]]] = {}
    for number, tensor in enumerate(tensors):
        size, bucket = filling.get(tensor.dtype, (BUCKET, []))
        if size >= BUCKET:
            size, bucket = 0, []
            buckets.append(bucket)
        bucket.append(number)
        filling[tensor.dtype] = size + tensor.nbytes, bucket
    return buckets


class _Gathered(torch.autograd.Function):
    """``Part.gathered``. All processes make the same of the rows, so each takes its own rows of the gradient. The loss
    that was made of all rows counts by this process's share in the mean over the processes; its gradient must not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: Part) -> Tensor:
        ctx.part = part
        channels_last = is_channels_last(rows)
        rows = rows.permute(0, 2, 3, 1) if channels_last else rows
        counts = [end - begin for begin, end in pairwise(part.bounds)]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        made = torch.cat([each[:count] for each, count in zip(parts, counts, strict=True)])
        return made.permute(0, 3, 1, 2) if channels_last else made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.part.own(grad) / ctx.part.share, None
