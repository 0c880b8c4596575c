"""ADR: adversary divergence reduction (Bui et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_kernels import compactness, entropy, kl_div, trades_loss
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Batch, OfEps
from ..options import Norm, Switches, option
from .base import EVERY_NORM, AttackMode, Method, Metrics, State
from .terms import Parts, accuracy, near_start, split, wide

#: Terms of a loss by name: the weight, and what computes the term.
Terms = dict[str, tuple[float, Callable[[], Tensor]]]
#: s of the compactness weights: a pair of different classes weighs 1 - 1/s = -0.0101.
SCALE = 0.99


@dataclass(frozen=True)
class ADR(Method):
    """Adversary divergence reduction (Bui et al. 2020, arXiv 2007.05123):

        L = alpha_nat CE(z(x), y) + alpha_adv CE(z(x'), y) + lc LC + gc GC + conf CONF + vat VAT + gs GS

    h: the network's ``features``, flattened to k numbers; p = softmax(z); sg = no gradient: in every term but the first
    two only the adversaries are moved. w_ij = 1 if y_i = y_j, else 1 - 1/0.99 = -0.0101.

        LC    mean_i |sg h(x_i) - h(x'_i)|_1 / k               local compactness
        GC    mean_ij w_ij |sg h(x_j) - h(x'_i)|_1 / k         global compactness; all B^2 pairs, i = j among them
        CONF  mean_i H(p(x'_i))                                confidence
        VAT   mean_i CE(sg p(x_i), p(x'_i))                    smoothness; CE(q, p) = -sum_c q_c log p_c
        GS    mean_ij w_ij CE(sg p(x_j), p(x'_i))              global smoothness; the authors call it exploratory

    A term of weight 0 is not computed. x' comes from PGD on cross-entropy from a uniform start. ``form="trades"``: CE +
    beta KL(p(x) || p(x')) in place of the first two terms, attack and start those of TRADES (the TensorFlow code climbs
    the reverse KL, the authors' PyTorch code this one). 2K + 6 passes, 2K + 7 for trades.

    Not to be confused with annealing self-distillation rectification, which is also called ADR (arXiv 2305.12118).

    The defaults are those of the TensorFlow code, which the authors published first. Their PyTorch port has alpha_nat =
    alpha_adv = 1, so the same weights are half as strong there; their later copy (in ASCL) has alpha_nat = 0, and 6 for
    beta. Their weight decay is the trainer's. The port's start is not clipped to the image range, ours is. Published
    code makes a B x B x k tensor for GC, and NaN of a batch of one class, whose weights are 1 here. Where they take the
    flattened output of the MNIST network's convolutions as h, the models here give their last hidden layer.
    """

    name: ClassVar[str] = "adr"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"steps": 40, "step_size": OfEps(1 / 30), "beta": 1.0},
        "cifar10": {"steps": 10, "step_size": OfEps(1 / 4)},
    }

    switches: ClassVar[Switches] = {
        "beta": [("form", ("adv",))],
        "alpha_nat": [("form", ("trades",))],
        "alpha_adv": [("form", ("trades",))],
    }

    steps: int = option(10, "attack steps", low=1)
    step_size: float | None = option(None, "step of the attack; default: PGD's own", above=0)
    form: Literal["adv", "trades"] = option("adv", "what the regularisers are added to")
    alpha_nat: float = option(0.5, "weight of cross-entropy on clean images, for form=adv", low=0)
    alpha_adv: float = option(0.5, "weight of cross-entropy on adversaries, for form=adv", low=0)
    beta: float = option(6.0, "weight of the KL term, for form=trades", low=0)
    lc: float = option(1.0, "weight of local compactness", low=0)
    gc: float = option(1.0, "weight of global compactness", low=0)
    conf: float = option(1.0, "weight of the entropy of the prediction on adversaries", low=0)
    vat: float = option(1.0, "weight of the cross-entropy from the prediction on x to that on x'", low=0)
    gs: float = option(0.0, "weight of global smoothness", low=0)
    attack_mode: AttackMode = option(
        "eval",
        "mode of BatchNorm and dropout in the attack. eval, as in the authors' PyTorch port; train, as in their "
        "TensorFlow code and in ASCL",
    )
    bn_compat: bool = option(
        False,
        "with attack_mode=train and form=adv: BatchNorm's running statistics also see every forward of the attack, as "
        "in the TensorFlow code; costs nothing. The port's extra forwards for its log are not repeated",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bn_compat and (self.attack_mode != "train" or self.form != "adv"):
            raise ValueError(
                "adr: bn_compat is for attack_mode='train' and form='adv', where the published attack moves running "
                f"statistics, got {self.attack_mode!r} and {self.form!r}: leave it out"
            )
        weights = (self.alpha_nat, self.alpha_adv, self.lc, self.gc, self.conf, self.vat, self.gs)
        if self.form == "adv" and not any(weights):
            raise ValueError("adr: all weights are 0, so nothing is left to train on: set alpha_adv, say")

    @property
    def one_label(self) -> str:
        return "adr, which compares the images of a class with those of others"

    def require(self, model: nn.Module) -> None:
        self._parts(model)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        self.require(model)
        trades = self.form == "trades"
        attack = PGD(
            self.eps, self.step_size, self.steps, objective="kl" if trades else "ce", attack_mode=self.attack_mode,
            update_buffers=self.bn_compat, norm=self.norm,
        )  # fmt: skip
        start = near_start(batch, key) if trades else None
        return attack(model, batch.x, batch.y, start=start, key=key, ids=batch.ids)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        features, head = self._parts(model)
        h, h_adv = features(batch.x), features(given)
        logits, adv_logits = head(h), head(h_adv)
        terms = {
            **self._base(logits, adv_logits, batch),
            **self._regularisers(h.detach().flatten(1), h_adv.flatten(1), logits.detach(), adv_logits, batch),
        }
        values = {name: term() for name, (weight, term) in terms.items() if weight}
        loss = torch.stack([terms[name][0] * value for name, value in values.items()]).sum()
        metrics = {"clean": accuracy(logits, batch), "adv": accuracy(adv_logits, batch)}
        return loss, metrics | {name: value.detach() for name, value in values.items()}

    def _parts(self, model: nn.Module) -> Parts:
        """Features and head apart, if a term looks at features."""
        return split(model) if self.lc or self.gc else (lambda x: logits_of(model(x)), lambda logits: logits)

    def _base(self, logits: Tensor, adv_logits: Tensor, batch: Batch) -> Terms:
        """The terms that train the network on both images, each with its weight."""
        if self.form == "trades":
            loss = trades_loss(logits, adv_logits, batch.y, beta=self.beta)
            return {"trades": (1.0, lambda: self.smoothed(loss, logits, batch.y))}
        return {
            "ce": (self.alpha_nat, lambda: self.ce(logits, batch)),
            "ce_adv": (self.alpha_adv, lambda: self.ce(adv_logits, batch)),
        }

    def _regularisers(self, h: Tensor, h_adv: Tensor, logits: Tensor, adv_logits: Tensor, batch: Batch) -> Terms:
        """The terms that move the adversaries alone, each with its weight."""
        of_all = batch.deal.gathered
        return {
            "lc": (self.lc, lambda: F.l1_loss(wide(h_adv), wide(h))),
            "gc": (self.gc, lambda: compactness(of_all(h), of_all(h_adv), of_all(batch.y), scale=SCALE)),
            "conf": (self.conf, lambda: entropy(adv_logits)),
            "vat": (self.vat, lambda: kl_div(logits, adv_logits) + entropy(logits)),
            "gs": (self.gs, lambda: global_smoothness(of_all(logits), of_all(adv_logits), of_all(batch.y))),
        }


def global_smoothness(logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy from every clean prediction, of which no gradient flows, to every adversary's, weighted as GC."""
    weights = 1.0 - (y[:, None] != y).double() / SCALE  # in float64, which autocast leaves alone
    adv = wide(adv_logits).log_softmax(1)
    targets = weights @ logits.detach().double().softmax(1)
    return -(targets.to(adv.dtype) * adv).sum() / len(y) ** 2
