"""MMA: max-margin adversarial training (Ding et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import cross_entropy
from atlas_kernels.attacks import PGD, attacking
from atlas_kernels.attacks.objective import Model, never_alone
from atlas_kernels.layout import column
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import option
from .base import Method, Metrics, State
from .terms import accuracy

#: The search goes a little further than d_max, so that margins beyond it can be told.
_REACH = 1.05


class Boundary(NamedTuple):
    """Where the margins end: images [B, ...], the weights of their losses [B] and the margins [B]."""

    images: Tensor
    weights: Tensor
    margins: Tensor


@dataclass(frozen=True)
class MMA(Method):
    """Max-margin adversarial training (Ding et al. 2020, arXiv 1812.02637), with w = clean_weight:

        L = w mean CE(z(x), y) + (1 - w) / B [sum_sure, eps* < d_max  CE(z(x + eps* u), y) + sum_unsure CE(z(x), y)]

    sure: p_y(x) > 1/2, that is a soft logit margin (SLM = logsumexp of the other logits - z_y) below 0. u: the way of
    PGD on the SLM, over the sample's last radius; eps*: where SLM becomes 0 on it, by bisection up to 1.05 d_max; the
    images x + eps* u are not clipped. Every sample is trained at the end of its own margin; eps sets defaults alone.

    PGD climbs cross-entropy, whose image gradient is that of SLM times 1 - p_y: the steps are the same. Its radius is
    max(min_eps, the sample's last eps*), kept by ``ids`` in ``state.memory["eps"]``; what was unsure last time starts
    at min_eps again. The search runs in train mode on the sure samples alone, as published: with BatchNorm they judge
    each other, so they are taken out of the batch, and a GPU is waited for (the seed of its dropout, too, is read). A
    single sure sample is run beside two others, as BatchNorm may have no statistics of one.

    The published code also makes an eleventh forward whose outcome nobody reads, keeps graphs in the search, and copies
    gradients and radii one by one. At most 2K + search_steps + 6 passes, fewer where samples are unsure. ``prepare``
    and ``objective`` on their own run x twice, one pass more.
    """

    name: ClassVar[str] = "mma"
    lengths: ClassVar[tuple[str, ...]] = ("d_max", "min_eps")
    no_graph: ClassVar[str] = "mma, which waits to know how many samples it is sure of, and takes them out of the batch"
    sizes_vary: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"steps": 40, "d_max": 0.45, "min_eps": 0.1},
        "cifar10": {"steps": 10, "d_max": 32 / 255, "min_eps": 0.005},
    }

    steps: int = option(10, "attack steps; one is 2.5 / steps of the sample's radius", low=1)
    d_max: float | None = option(
        None,
        "margins from here on are wide enough and no longer trained; default: 1.5 eps. Published: 12, 20 or 32/255 on "
        "CIFAR-10, 0.45 on MNIST",
        above=0,
        below=1 / _REACH,
        hint="images are in [0, 1], so write 32/255 instead of 32",
    )
    min_eps: float | None = option(None, "smallest radius of the attack; default: d_max/10", above=0)
    search_steps: int = option(10, "steps of the bisection", low=1)
    clean_weight: float = option(1 / 3, "weight of the clean loss, w; 0 is the paper's OMMA", low=0, below=1)
    bn_compat: bool = option(
        False,
        "BatchNorm's running statistics as in the published code: they also see the search's forwards, the unread one "
        "included (1 pass more)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._min_eps > _REACH * self._d_max:
            raise ValueError(
                f"mma: min_eps must be at most {_REACH} d_max = {_REACH * self._d_max:.4g}, got {self._min_eps:.4g}; "
                "set a smaller min_eps, or a larger d_max"
            )

    @property
    def _d_max(self) -> float:
        return 1.5 * self.eps if self.d_max is None else self.d_max

    @property
    def _min_eps(self) -> float:
        return self._d_max / 10 if self.min_eps is None else self.min_eps

    @property
    def one_label(self) -> str:
        return "mma, which looks for the place where an image stops being of its class"

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        eps, most = memory.get("eps"), _REACH * self._d_max
        if eps is not None and not (
            eps.dim() == 1
            and len(eps) <= shape[0]
            and eps.is_floating_point()
            and bool(((eps >= 0) & (eps <= most * (1 + 1e-6))).all())
        ):
            raise ValueError(f"memory eps must be margins of at most {shape[0]} images, from 0 to {most:.4g}")

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Boundary:
        with torch.no_grad():
            logits = logits_of(model(batch.x))
        return self._boundary(model, batch, key, state, logits)

    def objective(self, model: nn.Module, batch: Batch, given: Boundary) -> tuple[Tensor, Metrics]:
        return self._combine(model, batch, given, logits_of(model(batch.x)))

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(batch.x))
        given = self._boundary(model, batch, key, state or State(), logits.detach())
        return self._combine(model, batch, given, logits)

    def _combine(self, model: nn.Module, batch: Batch, given: Boundary, logits: Tensor) -> tuple[Tensor, Metrics]:
        loss = self.ce(logits_of(model(given.images)), batch, given.weights)
        if self.clean_weight:
            loss = self.clean_weight * self.ce(logits, batch) + (1 - self.clean_weight) * loss
        return loss, {"clean": accuracy(logits, batch), "margin": given.margins.mean()}

    def _boundary(self, model: nn.Module, batch: Batch, key: Tensor, state: State, logits: Tensor) -> Boundary:
        """Attacks the sure samples and remembers how far they went; the others stay where they are, at margin 0."""
        table = _margins(batch, state)
        rows = _sure(logits, batch.y).nonzero()[:, 0]
        images, margins = batch.x, torch.zeros_like(table[batch.ids])
        if len(rows):
            sure = Batch(*(part[rows] for part in batch))
            network = never_alone(model, batch.x) if len(rows) == 1 else model
            adv, reached = self._attack(network, sure, table[sure.ids].clamp(min=self._min_eps), key)
            images, margins = images.index_copy(0, rows, adv), margins.index_copy(0, rows, reached)
        table[batch.deal.gathered(batch.ids)] = batch.deal.gathered(margins)
        return Boundary(images, (margins < self._d_max).to(margins.dtype), margins)

    def _attack(self, model: Model, batch: Batch, eps: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        attack = PGD(eps, 2.5 * eps / self.steps, self.steps)
        adv = attack(model, batch.x, batch.y, key=key, ids=batch.ids)
        way = (adv - batch.x) / column(eps + 1e-12, adv)
        with attacking(model, "keep", key, update_buffers=self.bn_compat), torch.no_grad():
            margins = self._search(model, batch, adv, way, eps)
        return batch.x + column(margins, way) * way, margins

    def _search(self, model: Model, batch: Batch, adv: Tensor, way: Tensor, eps: Tensor) -> Tensor:
        """Bisects for the radius at which the model stops being sure, from that of the attack."""
        low, high = torch.zeros_like(eps), torch.full_like(eps, _REACH * self._d_max)
        sure = _sure(logits_of(model(adv)), batch.y)
        for step in range(self.search_steps):
            low, high = torch.where(sure, eps, low), torch.where(sure, high, eps)
            eps = (low + high) / 2
            if step + 1 < self.search_steps or self.bn_compat:
                sure = _sure(logits_of(model((batch.x + column(eps, way) * way).clamp(0, 1))), batch.y)
        return eps


def _sure(logits: Tensor, y: Tensor) -> Tensor:
    """Where the soft logit margin is below 0: the label is likelier than all others together."""
    return cross_entropy(logits, y, reduction="none") < math.log(2)


def _margins(batch: Batch, state: State) -> Tensor:
    """The margin of every sample in the set, 0 where none has been found yet."""
    size = state.size or int(batch.ids.max()) + 1  # nobody said how large the set is: a loss outside of the trainer
    kept = state.memory.get("eps", batch.x.new_zeros(0))
    if len(kept) < size:
        kept = state.memory["eps"] = torch.cat([kept, kept.new_zeros(size - len(kept))])
    return kept
