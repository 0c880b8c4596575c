"""NuAT: nuclear-norm adversarial training (Sriramanan et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from atlas_kernels import nuclear_norm

from ..data import Batch
from ..options import Switches, option
from .base import AttackMode, Metrics, State
from .clean_kept import CleanKept
from .terms import accuracy, wide


@dataclass(frozen=True)
class NuAT(CleanKept):
    """NuAT (Sriramanan et al. 2021, "Towards efficient and effective adversarial training", NeurIPS):
    L = CE(z(x), y) + R ||z(x) - z(x')||_* / B, the nuclear norm of the [B, C] matrix of a batch's differences.

    x' is one sign step of eps from x +- eps/2, on CE(z0, y), and in every second batch on R ||z(x) - z0||_* / B too.
    There is no CE at x'. R is 0 in the first epoch and grows by the same amount after each, up to 4.5 over the first
    90 % of training. The published script divides by its batch size, 64, also where the last batch has fewer images.

    ``code`` fastat is the FastAT Benchmark's: R grows over all of training towards 4 (3.96 in the last of its 100
    epochs), and BatchNorm and dropout of the attack are in train mode; it also trains with label smoothing, which is a
    setting of the run. There NuAT's AutoAttack accuracy is 50.10 % on CIFAR-10, but 14.41 on CIFAR-100 and 10.20 on
    Tiny-ImageNet, where PGD-10 has 26.90 and 19.77.
    """

    name: ClassVar[str] = "nuat"

    switches: ClassVar[Switches] = dict.fromkeys(("growth_share", "divisor"), [("weight", (0,))])

    weight: float | None = option(
        None, "weight R of the nuclear norm, once it has grown; default: 4.5, with code=fastat 4", low=0
    )
    growth_share: float | None = option(
        None,
        "share of training over which R grows from 0; 0: R is constant; default: 0.9, with code=fastat 1",
        low=0,
        high=1,
    )
    divisor: int = option(0, "what the norm is divided by; 0: the images of the batch", low=0)
    attack_mode: AttackMode | None = option(
        None, "mode of BatchNorm and dropout in the attack; default: eval, with code=fastat train"
    )
    code: Literal["authors", "fastat"] = option("authors", "whose defaults")

    @property
    def _weight(self) -> float:
        return (4.0 if self.code == "fastat" else 4.5) if self.weight is None else self.weight

    @property
    def _growth_share(self) -> float:
        return (1.0 if self.code == "fastat" else 0.9) if self.growth_share is None else self.growth_share

    @property
    def _attack_mode(self) -> AttackMode:
        return self.attack_mode or ("train" if self.code == "fastat" else "eval")

    def changing(self, state: State) -> tuple[float, ...]:
        growing = self._growth_share * state.epochs
        return (self._weight * (min(state.epoch / growing, 1.0) if growing else 1.0),)

    def attack_loss(self, logits: Tensor, clean_logits: Tensor, batch: Batch, numbers: Tensor, guided: bool) -> Tensor:
        if guided:
            return self._tied(logits, clean_logits, logits, batch, numbers)
        return self.ce(logits, batch)

    def combine(
        self, clean_logits: Tensor, adv_logits: Tensor, batch: Batch, numbers: Tensor
    ) -> tuple[Tensor, Metrics]:
        loss = self._tied(clean_logits, clean_logits, adv_logits, batch, numbers)
        return loss, {"clean": accuracy(clean_logits, batch), "adv": accuracy(adv_logits, batch)}

    def _tied(self, judged: Tensor, a: Tensor, b: Tensor, batch: Batch, numbers: Tensor) -> Tensor:
        """The cross-entropy of ``judged``, and the norm of a - b; in float32, of which 16 bits would leave little."""
        differences = batch.deal.gathered(wide(a) - wide(b))
        norm = nuclear_norm(differences)
        return self.ce(judged, batch) + numbers[0] * norm / (self.divisor or max(len(differences), 1))
