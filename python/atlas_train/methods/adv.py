"""ADV: training on PGD adversaries (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from atlas_kernels import cross_entropy
from atlas_kernels.attacks import PGD

from ..data import Batch
from ..options import option
from .base import AttackMode, Method, Metrics
from .terms import accuracy


@dataclass(frozen=True)
class ADV(Method):
    """Adversarial training (Madry, Makelov, Schmidt, Tsipras & Vladu 2018, arXiv 1706.06083): L = CE(z(x'), y).

    x' comes from PGD on cross-entropy from a uniform start; no gradient flows through it.
    """

    name: ClassVar[str] = "adv"

    steps: int = option(10, "attack steps", low=1)
    step_size: float | None = option(None, "step of the attack; default: PGD's own, 1.25 eps for one step", above=0)
    attack_mode: AttackMode = option(
        "train",
        "mode of BatchNorm and dropout in the attack. train, as Madry et al. and Rice et al. do: the attack then sees "
        "the function that the update differentiates. eval: as TRADES and GAIRAT do",
    )

    def loss(self, model: nn.Module, batch: Batch, key: Tensor) -> tuple[Tensor, Metrics]:
        attack = PGD(self.eps, self.step_size, self.steps, attack_mode=self.attack_mode)
        adv = attack(model, batch.x, batch.y, key=key, ids=batch.ids)
        logits = model(adv)
        return cross_entropy(logits, batch.y), {"adv": accuracy(logits, batch.y)}
