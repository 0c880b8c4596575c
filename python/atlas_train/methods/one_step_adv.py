"""One-step ADV: training on FGSM adversaries from a random start (Wong, Rice & Kolter 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from atlas_kernels import pgd_step
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import OF_RUN, Norm, Switches, option
from .adv import ADV
from .base import EVERY_NORM, AttackMode, Method, Metrics, State
from .terms import NO_BALL, WIDE_START, accuracy, attacked, from_wide_noise, require_wide


@dataclass(frozen=True)
class OneStepADV(Method):
    """Fast adversarial training (Wong, Rice & Kolter 2020, arXiv 2001.03994): L = CE(z(x'), y).

    x' is one sign step of 1.25 eps from a uniform start in the eps-ball, projected on the ball and the image range.
    It can overfit catastrophically: robust to its own attack, defenceless against PGD. The trainer's alarm says so.
    """

    name: ClassVar[str] = "one_step_adv"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM

    switches: ClassVar[Switches] = {"bn_compat": [("attack_mode", ("eval",))]}

    step_size: float | None = option(None, "step of the attack; default: 1.25 eps", above=0)
    wide_start: float = option(0.0, WIDE_START, low=0)
    attack_mode: AttackMode = option(
        "train",
        "mode of BatchNorm and dropout in the attack. train, as Wong et al. do: the one gradient is then that of the "
        "function which the update differentiates (a maintainer measured 44.9 % under PGD, against 44.3 % for eval)",
    )
    bn_compat: bool = option(
        False, "BatchNorm's running statistics also see the attack's forward, as in the published code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_wide(self, self.wide_start)

    @property
    def _step_size(self) -> float:
        return (1.0 if self.wide_start else 1.25) * self.eps if self.step_size is None else self.step_size

    def with_steps(self, steps: int) -> Method:
        kept = {name: getattr(self, name) for name in (*OF_RUN, "attack_mode")}
        return ADV(steps=steps, **kept)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        attack = PGD(
            self.eps, self._step_size, 1, norm=self.norm, attack_mode=self.attack_mode, update_buffers=self.bn_compat
        )
        if not self.wide_start:
            return attacked(attack, model, batch, key)
        last = from_wide_noise(attack, self.wide_start, model, batch, key)
        return pgd_step(last.adv, last.grad, batch.x, NO_BALL, self._step_size)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given))
        return self.ce(logits, batch), {"adv": accuracy(logits, batch)}
