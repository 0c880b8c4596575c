"""Mixup and CutMix around a method: images made of two, with the labels of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from atlas_kernels.layout import compute_dtype

from ..data import Batch
from ..noise import normal, uniform
from ..options import option
from .around import Around
from .base import Descent, Method, Metrics, State
from .mixed import MixedBatch

#: Numbers of the draws, which no attack and no method comes to.
_PAIRS, _SHARE, _NORMAL, _PLACE = range(2**32 - 4, 2**32)
_CANDIDATES = 32  # of a gamma variate: each is taken with a probability above 0.95


@dataclass(frozen=True)
class Mixing(Around):
    """Trains the method inside on images that are made of two of the batch, with the labels of both.

        mixup   lambda x_i + (1 - lambda) x_j     (Zhang, Cisse, Dauphin & Lopez-Paz 2018, arXiv 1710.09412)
        cutmix  x_i, but x_j in a box of area 1 - lambda at a random place, cut off at the edges; lambda is then the
                share of x_i that is left    (Yun et al. 2019, arXiv 1905.04899)

    lambda ~ Beta(alpha, alpha), one for a batch as in both published codes; j is a permutation of the batch. What takes
    labels becomes lambda times that of y_i plus 1 - lambda times that of y_j: losses, accuracies, and the gradients of
    attacks, as in the robust training of Rice, Wong & Kolter (2020, arXiv 2002.11569; mixup with alpha 1.4). Rebuffi et
    al. (2021, arXiv 2103.01946) find CutMix to help where the weights are averaged.

    Everything is drawn on the device from the step's key and the samples' numbers, after crops and flips. Raises
    ValueError for a method that asks for one label of each image.
    """

    kind: Literal["mixup", "cutmix"] = option("mixup", "how images are mixed")
    alpha: float = option(1.0, "of the Beta distribution of lambda: the smaller, the less is mixed", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mixable(self.method, self.kind)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        return self.method.loss(model, self.mixed(batch, key), key, state)

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        return self.method.train_step(model, self.mixed(batch, key), key, state, descent)

    def mixed(self, batch: Batch, key: Tensor) -> MixedBatch:
        """The batch with its images mixed, those that ``key`` says."""
        images, labels, ids = map(batch.deal.gathered, batch)
        places = uniform(torch.zeros(len(images), 1, device=key.device), key, ids, _PAIRS)
        partner = batch.deal.own(places[:, 0].argsort(stable=True))
        share = beta(self.alpha, key)
        other = images.index_select(0, partner)
        if self.kind == "mixup":
            x = torch.lerp(other, batch.x, share.to(batch.x.dtype)).clamp(0, 1)
        else:
            box = _box(1 - share, key, *batch.x.shape[-2:])
            x, share = torch.where(box, other, batch.x), 1 - box.double().mean()
        x = torch.empty_like(batch.x).copy_(x)  # in the layout of the batch
        return MixedBatch.of(batch, x, labels.index_select(0, partner), share.to(compute_dtype(x.dtype)))


def require_mixable(method: Method, kind: str) -> None:
    """Raises ValueError for a method that asks for one label of each image."""
    if method.one_label:
        raise ValueError(f"{kind} cannot be had with {method.one_label}: set {kind}=0, or choose another method")


def beta(alpha: float, key: Tensor) -> Tensor:
    """A number from Beta(alpha, alpha), 0-dim float64 on the key's device: a function of the key's seed alone.

    G / (G + G') of two gamma variates (Marsaglia & Tsang 2000), each that of alpha + 1 times U^(1 / alpha), which does
    not reject more for a small alpha. Computed in logarithms: for a small alpha both can underflow.
    """
    like = torch.zeros(1, 2, _CANDIDATES + 1, dtype=torch.float64, device=key.device)
    z, u = normal(like, key, None, _NORMAL)[0, :, 1:], _unit(like, key, _SHARE)
    d = alpha + 2 / 3
    v = (1 + z / (9 * d) ** 0.5).clamp(min=1e-100) ** 3
    taken = u[:, 1:].log() < z * z / 2 + d - d * v + d * v.log()
    first = taken & (taken.cumsum(1) == 1)
    logarithm = (v.log() * first).sum(1) + u[:, 0].log() / alpha
    return (logarithm[0] - logarithm[1]).sigmoid()


def _unit(like: Tensor, key: Tensor, draw: int) -> Tensor:
    """Uniform numbers in (0, 1), of sample 0."""
    return (uniform(like, key, None, draw)[0] + 1 + 2.0**-24) / 2


def _box(area: Tensor, key: Tensor, height: int, width: int) -> Tensor:
    """Where the box of that share of the image lies, bool [height, width], as in the published code."""
    centre = _unit(torch.zeros(1, 2, dtype=torch.float64, device=key.device), key, _PLACE)
    sides = []
    for size, at in ((height, centre[0]), (width, centre[1])):
        half = (size * area.sqrt()).floor().div(2, rounding_mode="floor")
        middle, pixels = (size * at).floor(), torch.arange(size, device=key.device)
        sides.append((pixels >= middle - half) & (pixels < middle + half))
    return sides[0][:, None] & sides[1]
