"""TRADES: a trade-off between accuracy and robustness (Zhang et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from atlas_kernels import trades_loss
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch, OfEps
from ..options import Norm, option
from .base import EVERY_NORM, AttackMode, Method, Metrics, State
from .terms import accuracy, near_start, update_statistics


@dataclass(frozen=True)
class TRADES(Method):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573): L = CE(z(x), y) + beta KL(p(x) || p(x')).

    x' comes from PGD on that KL, from x + 0.001 normal noise. Gradients flow to both arguments of the KL. The published
    code runs the network on x again in every attack step and once more in the loss; here once each: 2K + 7 passes.
    """

    name: ClassVar[str] = "trades"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"steps": 40, "step_size": OfEps(1 / 30), "beta": 1.0},
        "cifar10": {"steps": 10, "step_size": OfEps(0.007 / 0.031), "beta": 6.0},
    }

    steps: int = option(10, "attack steps", low=1)
    step_size: float | None = option(None, "step of the attack; default: 2.5 eps / steps", above=0)
    beta: float = option(6.0, "weight of the KL term, 1/lambda in the paper", low=0)
    attack_mode: AttackMode = option("eval", "mode of BatchNorm and dropout in the attack; eval, as published")
    bn_compat: bool = option(
        False,
        "BatchNorm's running statistics as in the published code, which runs x, x' and x again in train mode (1 pass "
        "more); else x and x' once each. With dropout the published KL sees another mask than its CE; here both share",
    )

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        attack = PGD(self.eps, self.step_size, self.steps, norm=self.norm, objective="kl", attack_mode=self.attack_mode)
        start = near_start(batch, key)
        return attack(model, batch.x, start=start, key=key, ids=batch.ids)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(batch.x))
        adv_logits = logits_of(model(given))
        if self.bn_compat:
            update_statistics(model, batch.x)
        loss = batch.over_labels(lambda y: self.smoothed(trades_loss(logits, adv_logits, y, beta=self.beta), logits, y))
        return loss, {"clean": accuracy(logits, batch), "adv": accuracy(adv_logits, batch)}
