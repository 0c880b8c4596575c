"""ADV: training on PGD adversaries (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch, OfEps
from ..options import Norm, option
from .base import EVERY_NORM, AttackMode, Method, Metrics, State
from .terms import accuracy, attacked, update_statistics


@dataclass(frozen=True)
class ADV(Method):
    """Adversarial training (Madry, Makelov, Schmidt, Tsipras & Vladu 2018, arXiv 1706.06083): L = CE(z(x'), y).

    x' comes from PGD on cross-entropy from a uniform start; no gradient flows through it. Steps and step size are those
    of the authors' challenges: 40 of eps/30 on MNIST, 10 of eps/4 on CIFAR-10. 2K + 3 passes.
    """

    name: ClassVar[str] = "adv"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"steps": 40, "step_size": OfEps(1 / 30)},
        "cifar10": {"steps": 10, "step_size": OfEps(1 / 4)},
    }

    steps: int = option(10, "attack steps", low=1)
    step_size: float | None = option(None, "step of the attack; default: PGD's own, 1.25 eps for one step", above=0)
    attack_mode: AttackMode = option(
        "train",
        "mode of BatchNorm and dropout in the attack. train, as Madry et al. and Rice et al. do: the attack then sees "
        "the function that the update differentiates. eval: as TRADES and GAIRAT do",
    )
    bn_compat: bool = option(
        False,
        "BatchNorm's running statistics as in Rice, Wong & Kolter's code: they also see every forward of the attack, "
        "one at its last iterate, and one of the clean images after the update (2 passes more)",
    )

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        attack = PGD(
            self.eps, self.step_size, self.steps, norm=self.norm, attack_mode=self.attack_mode,
            update_buffers=self.bn_compat,
        )  # fmt: skip
        adv = attacked(attack, model, batch, key)
        if self.bn_compat:
            update_statistics(model, adv)
        return adv

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given))
        return self.ce(logits, batch), {"adv": accuracy(logits, batch)}

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        if self.bn_compat:
            update_statistics(model, batch.x)
