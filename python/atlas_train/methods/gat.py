"""GAT: guided adversarial training (Sriramanan et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from atlas_kernels import consistency_loss

from ..data import Batch
from ..options import Switches, option
from .base import Metrics, State
from .clean_kept import CleanKept
from .terms import accuracy


@dataclass(frozen=True)
class GAT(CleanKept):
    """GAT (Sriramanan et al. 2020, "Guided adversarial attack for evaluating and enhancing adversarial defenses",
    NeurIPS): L = CE(z(x), y) + weight ||p(x) - p(x')||^2, p = softmax(z).

    x' is one sign step of eps from x +- eps/2, on CE(z0, y), and in every second batch on the weighted distance of p(x)
    and p0 too. There is no CE at x'. The weight is 10, and 40 from 86 % of training on; on MNIST 15, three times as
    much after each quarter, with noise of eps and the distance in every batch; on ImageNet-100 20, then 140.

    The published file for MNIST compares the epoch with epochs / 4 and 3 epochs / 4, which its 50 epochs never meet: in
    those the weight grows once, half-way. The file for ImageNet-100 has the clean images of the attack in eval mode;
    here they are those of the training forward, as in the file for CIFAR-10.
    """

    name: ClassVar[str] = "gat"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {
            "weight": 15.0, "growth": 3.0, "growth_start": 0.25, "growth_period": 0.25, "noise_magnitude": 1.0,
            "alternate": False,
        },
        "imagenet100": {"weight": 20.0, "growth": 7.0, "growth_start": 0.75},
    }  # fmt: skip

    switches: ClassVar[Switches] = {
        "growth": [("weight", (0,)), ("growth_start", (1,))],
        "growth_start": [("weight", (0,)), ("growth", (1,))],
        "growth_period": [("weight", (0,)), ("growth", (1,)), ("growth_start", (1,))],
    }

    weight: float = option(10.0, "weight of the squared distance between the predictions at image and adversary", low=0)
    growth: float = option(4.0, "factor by which the weight grows", low=0)
    growth_start: float = option(
        0.86, "share of training after which the weight is multiplied by growth; 1: never", low=0, high=1
    )
    growth_period: float = option(0.0, "the same again after each such share of training; 0: only once", low=0, high=1)
    code: Literal["authors", "fastat"] = option(
        "authors",
        "whose code. fastat (the FastAT Benchmark): in batches without the distance the attack takes the probabilities "
        "for logits, softmax(softmax(z)), in its CE; a mistake there, but its published figures were made with it",
    )

    def changing(self, state: State) -> tuple[float, ...]:
        past = state.epoch - self.growth_start * state.epochs + 1e-9  # epochs; of a share that is not exact
        if past < 0 or self.growth_start == 1:
            return (self.weight,)
        times = 1 + (int(past / (self.growth_period * state.epochs)) if self.growth_period else 0)
        return (self.weight * self.growth**times,)

    def attack_loss(self, logits: Tensor, clean_logits: Tensor, batch: Batch, numbers: Tensor, guided: bool) -> Tensor:
        if guided:
            return self._tied(logits, clean_logits, batch, numbers)
        return self.ce(logits.softmax(1) if self.code == "fastat" else logits, batch)

    def combine(
        self, clean_logits: Tensor, adv_logits: Tensor, batch: Batch, numbers: Tensor
    ) -> tuple[Tensor, Metrics]:
        loss = self._tied(clean_logits, adv_logits, batch, numbers)
        return loss, {"clean": accuracy(clean_logits, batch), "adv": accuracy(adv_logits, batch)}

    def _tied(self, logits: Tensor, other_logits: Tensor, batch: Batch, numbers: Tensor) -> Tensor:
        weight, smoothing = numbers[0], self.label_smoothing
        return batch.over_labels(
            lambda y: consistency_loss(
                logits, other_logits, y, distance="prob", weight=weight, label_smoothing=smoothing
            )
        )
