"""N-FGSM: training on FGSM adversaries of noisy images (de Jorge et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from atlas_kernels import pgd_step
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import Switches, option
from .base import AttackMode, Method, Metrics, State
from .terms import NO_BALL, accuracy, from_wide_noise


@dataclass(frozen=True)
class NFGSM(Method):
    """N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): L = CE(z(x'), y), x' = clip(x + eta + eps sign(grad CE)).

    The gradient is taken at x + eta, eta uniform in [-2 eps, 2 eps] and clipped to the image range. x' is clipped to
    that range alone, so it may lie up to 3 eps from x; strong noise without projection is the paper's remedy against
    the catastrophic overfitting of one-step methods. 5 passes; the published code wastes none.
    """

    name: ClassVar[str] = "n_fgsm"

    switches: ClassVar[Switches] = {"bn_compat": [("attack_mode", ("eval",))]}

    noise_magnitude: float = option(
        2.0,
        "radius of the uniform noise, in eps. The authors' exceptions: 3 for SVHN at 12/255, 4 for a WideResNet on "
        "CIFAR-10 at 16/255",
        low=0,
    )
    step_size: float | None = option(None, "step of the attack; default: eps", above=0)
    project: bool = option(False, "also project x' onto the eps-ball of x; the published default does not")
    attack_mode: AttackMode = option("train", "mode of BatchNorm and dropout in the attack; train, as published")
    bn_compat: bool = option(
        False, "BatchNorm's running statistics also see the attack's forward, as in the published code; costs nothing"
    )

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        step_size = self._step_size
        attack = PGD(self.eps, step_size, 1, attack_mode=self.attack_mode, update_buffers=self.bn_compat)
        last = from_wide_noise(attack, self.noise_magnitude, model, batch, key)
        return pgd_step(last.adv, last.grad, batch.x, self.eps if self.project else NO_BALL, step_size)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given))
        return self.ce(logits, batch), {"adv": accuracy(logits, batch)}
