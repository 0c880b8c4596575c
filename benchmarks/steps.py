"""What a training step of each method is: the published algorithm with its arguments, and the passes that ours makes.

The published statements are those of ``tests/published``, to which ours agree to 1e-9 in the tests. ATLAS has no
published code: its statement is our documentation of it in plain PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import random_start, sample_neighbours
from atlas_kernels.attacks import PGD
from atlas_kernels.backends.reference.philox import below, words
from atlas_train import methods
from atlas_train.methods import Batch
from atlas_train.methods.terms import near_start
from atlas_train.noise import normal, uniform
from network_passes import Attack, FirstLayer, Forward, Learn, Look, Pass, first_layer, normalised

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import published.adr
import published.adv
import published.atlas
import published.backward_smoothing
import published.cure
import published.fgsm_pgi
import published.fgsm_uap
import published.free
import published.gairat
import published.gat
import published.grad_align
import published.jacobian
import published.liet
import published.llr
import published.mart
import published.mma
import published.n_fgsm
import published.nuat
import published.stored_adv
import published.trades
import published.yopo


class Statement(NamedTuple):
    """``algorithm(model, x, y, start, optimizer, **how)`` -> (x', loss), as in ``tests/published``.

    memory: more of its arguments, and what of the method's memory each of them is: a copy of its own.
    """

    algorithm: Callable[..., tuple[Tensor, Tensor]]
    start: Tensor | None
    how: Mapping[str, Any]
    memory: Mapping[str, str] = {}


#: From our method, the batch and the noise key of the step: the published step with the same settings and noise.
Published = Callable[[Any, Batch, Tensor], Statement]


@dataclass(frozen=True)
class Step:
    """A row of the table.

    published: by name, where two projects' code costs differently. passes: those of our step, from our method and the
    number of samples that MMA attacks. hyper: settings of both sides that are not the method's own defaults.
    by_data: the number of passes depends on the batch.
    """

    method: str
    published: Mapping[str, Published]
    passes: Callable[[Any, int], Sequence[Pass]]
    hyper: Mapping[str, Any] = field(default_factory=dict)
    by_data: bool = False

    @property
    def has_steps(self) -> bool:
        """Whether its attack has a number of steps that methods are compared at; ATLAS and BS are made for one."""
        steps = methods.hyper_parameters(methods.get(self.method)).get("steps")
        return steps is not None and steps.default > 1


def pgd(m: Any) -> dict[str, Any]:
    """The attack of a method with eps, step_size and steps."""
    step_size = PGD(m.eps, m.step_size, m.steps).effective_step_size
    return {"eps": m.eps, "step_size": step_size, "steps": m.steps}


def in_ball(m: Any, batch: Batch, key: Tensor, radius: float = 1.0) -> Tensor:
    return random_start(batch.x, radius * m.eps, key=key, ids=batch.ids)


def adv(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.adv.adv, in_ball(m, batch, key), pgd(m))


def adv_fast(m: Any, batch: Batch, key: Tensor) -> Statement:
    return adv(m, batch, key)._replace(algorithm=published.adv.adv_fast)


def one_step_adv(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "step_size": PGD(m.eps, m.step_size, 1).effective_step_size}
    return Statement(published.adv.one_step_adv, in_ball(m, batch, key), how)


def atlas(m: Any, batch: Batch, key: Tensor) -> Statement:
    names = ("local", "local_objective", "global_term", "global_weight", "bn", "project")
    noise = sample_neighbours(torch.zeros_like(batch.x), 1.0, m.count, clip_min=-1, key=key, ids=batch.ids)
    how = {name: m.in_use()[name] for name in names} | pgd(m)
    how |= {"radius": m._radius, "local_weight": m._local_weight, "noise": noise.view(m.count, *batch.x.shape)}
    return Statement(published.atlas.atlas, in_ball(m, batch, key), how)


def atlas_start(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {name: m.in_use()[name] for name in ("local_objective", "local_weight", "global_term", "global_weight")}
    return Statement(published.atlas.atlas_start, in_ball(m, batch, key), pgd(m) | how)


def liet(m: Any, batch: Batch, key: Tensor, classes: int = 10) -> Statement:
    large, like = m.eps > 8 / 255, batch.x.new_empty(len(batch.y), classes)
    pixels = batch.x.flatten(2).shape
    word = words(pixels, key.cpu(), batch.ids.cpu(), 0, 3, 0).view(batch.x.shape).to(batch.x.device)
    one, two = words((1, 1, 1), key.cpu(), torch.zeros(1, dtype=torch.int64), 0, 3, 1)[0, 0, :2]
    low, high = round(4096 * m._share_low), round(4096 * m._share_high)
    drawn = ((word + 2**19) % 2**20 - 2**19).to(batch.x.dtype) / 2**19
    how = {
        "replaced": word >> 20 < low + int(below(one, high - low + 1)),
        "uniform": m._noise_magnitude * m.eps * drawn,
        "minus": int(two) >= 2**31,
        "numbers": [uniform(like, key, batch.ids, draw) + (1 + 2.0**-24) for draw in (2, 3)],
        "cur_lambda": m._weight,  # of the only epoch
        "smoothing": m._smoothing,
    }
    return Statement(published.liet.liet, None, {"eps": m.eps, "large": large, **how}, {"noise": "label_noise"})


def fgsm_pgi(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "clip_start": m.code == "fastat", "lamda": m.weight, "decay": m.decay, "idx": batch.ids}
    memory = {"all_delta": "perturbations", "all_momentum": "momentum"}
    return Statement(published.fgsm_pgi.fgsm_pgi, None, how | {"smoothing": m.label_smoothing}, memory)


def stored_adv(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "step_size": m._step_size, "decay": m.decay, "weight": m.local_weight, "idx": batch.ids}
    memory = {name: name for name in m.stores}
    return Statement(published.stored_adv.stored_adv, None, how | {"smoothing": m.label_smoothing}, memory)


def fgsm_uap(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "uap_eps": m._radius, "per_class": m.per_class, "lamda": m.weight, "decay": m.momentum_decay}
    memory = {"uaps": "perturbation", "momentum": "momentum"}
    return Statement(published.fgsm_uap.fgsm_uap, None, how | {"smoothing": m.label_smoothing}, memory)


def gat(m: Any, batch: Batch, key: Tensor) -> Statement:
    """A batch whose attack has the guide, as every second one; the authors' code costs the same in the others."""
    signs = torch.where(uniform(batch.x, key, batch.ids, 0) < 0, -1.0, 1.0).to(batch.x)
    how = {"noise": m.noise_magnitude * m.eps, "l2_reg": m.weight, "attack": m._attack_mode, "slip": m.code == "fastat"}
    return Statement(gat_step, signs, {"eps": m.eps, "smooth": m.label_smoothing, **how})


def gat_step(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, optimizer: torch.optim.Optimizer, **how: Any
) -> tuple[Tensor, Tensor]:
    advs, losses = published.gat.gat(model, [[(x, y, start)]], optimizer, mul=1, after=(), alternate=False, **how)
    return advs[0], losses[0]


def nuat(m: Any, batch: Batch, key: Tensor) -> Statement:
    """With the weight that it grows to. Of the batches, likewise."""
    signs = torch.where(uniform(batch.x, key, batch.ids, 0) < 0, -1.0, 1.0).to(batch.x)
    how = {
        "noise": m.noise_magnitude * m.eps,
        "nuc_reg": m._weight,
        "attack": m._attack_mode,
        "divisor": m.divisor or None,
    }
    return Statement(nuat_step, signs, {"eps": m.eps, "smooth": m.label_smoothing, **how})


def nuat_step(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, optimizer: torch.optim.Optimizer, **how: Any
) -> tuple[Tensor, Tensor]:
    advs, losses = published.nuat.nuat(model, [[(x, y, start)]], optimizer, nuc_max=0.0, growing=1, first=1, **how)
    return advs[0], losses[0]


def trades(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.trades.trades, near_start(batch, key), {**pgd(m), "beta": m.beta})


def mart(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.mart.mart, near_start(batch, key), {**pgd(m), "beta": m.beta})


def gairat(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {**pgd(m), "lam": m.lam, "kind": m.weighting, "begun": True}
    return Statement(published.gairat.gairat, in_ball(m, batch, key), how)


def adr(m: Any, batch: Batch, key: Tensor) -> Statement:
    names = ("form", "beta", "alpha_nat", "alpha_adv", "lc", "gc", "conf", "vat", "gs")
    start = near_start(batch, key) if m.form == "trades" else in_ball(m, batch, key)
    return Statement(published.adr.adr, start, {**pgd(m), **{n: getattr(m, n) for n in names}, "log": True})


def backward_smoothing(m: Any, batch: Batch, key: Tensor, classes: int = 10) -> Statement:
    psi = uniform(batch.x.new_empty(len(batch.y), classes), key, batch.ids, 1)
    how = {"eps": m.eps, "step_size": m.step_size or m.eps, "steps": m.steps, "beta": m.beta, "gamma": m.gamma}
    return Statement(published.backward_smoothing.backward_smoothing, psi, how)


def free(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.free.free, torch.zeros_like(batch.x), {"eps": m.eps, "replays": m.replays})


def yopo(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "sigma": m.sigma or m.eps / 4, "outer": m.outer, "inner": m.inner, "f1": f1, "rest": rest}
    return Statement(published.yopo.yopo, batch.x + m.eps * uniform(batch.x, key, batch.ids, 0), how)


def f1(model: nn.Module, x: Tensor) -> Tensor:
    return first_layer(model)(normalised(model, x))  # type: ignore[no-any-return]


def rest(model: nn.Module, h: Tensor) -> Tensor:
    """The network from its first layer's output on."""
    layer: Any = first_layer(model)
    layer.forward = lambda _: h
    try:
        size = model.image_size or h.shape[-1]
        return model(h.new_zeros(1, model.in_channels, size, size))  # type: ignore[no-any-return]
    finally:
        del layer.forward


def n_fgsm(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "step_size": m.step_size or m.eps, "project": m.project}
    return Statement(published.n_fgsm.n_fgsm, in_ball(m, batch, key, m.noise_magnitude), how)


def grad_align(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "weight": m.effective_weight, "noise": m.eps * uniform(batch.x, key, batch.ids, 1)}
    return Statement(published.grad_align.grad_align, batch.x, how)


def mma(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"steps": m.steps, "d_max": m._d_max, "min_eps": m._min_eps, "search_steps": m.search_steps}
    how |= {"clean_weight": m.clean_weight, "ids": batch.ids, "known": {}}
    return Statement(published.mma.mma, uniform(batch.x, key, batch.ids, 0), how)


def llr(m: Any, batch: Batch, key: Tensor) -> Statement:
    how = {"eps": m.eps, "steps": m.steps, "lr": m.step_size, "ce_weight": m.ce_weight, "weight": m.weight}
    return Statement(published.llr.llr, in_ball(m, batch, key), how | {"smoothing": m.mu_ratio})


def cure(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.cure.cure, None, {"h": m.h, "weight": m.weight})


def jacobian(m: Any, batch: Batch, key: Tensor, classes: int = 10) -> Statement:
    like = batch.x.new_empty(len(batch.y), m.projections, classes)
    vectors = list(normal(like, key, batch.ids, 1).unbind(1))
    return Statement(published.jacobian.jacobian, None, {"weight": m.weight, "vectors": vectors})


def standard(m: Any, batch: Batch, key: Tensor) -> Statement:
    return Statement(published.adv.standard, None, {})


_PAIR = Learn((Forward(), Forward()))  # x and x', one after the other
_KEPT = Learn((Forward(kept=True), Forward()))  # the start and x', with the gradient of the first between them
_REPLAY = Learn((Forward(to_input=True),))

STEPS: dict[str, Step] = {
    "standard": Step("standard", {"": standard}, lambda m, _: [Learn()]),
    "one_step_adv": Step("one_step_adv", {"": one_step_adv}, lambda m, _: [Attack(1), Learn()]),
    "n_fgsm": Step("n_fgsm", {"": n_fgsm}, lambda m, _: [Attack(1), Learn()]),
    "grad_align": Step("grad_align", {"": grad_align}, lambda m, _: [Attack(1), Learn((Forward(), Forward(slopes=1)))]),
    "atlas": Step("atlas", {"": atlas}, lambda m, _: [Attack(m.steps), Learn((Forward(wide=2 + m.count),))]),
    "atlas start": Step("atlas", {"": atlas_start}, lambda m, _: [_KEPT], {"local": "start"}),
    "liet": Step("liet", {"": liet}, lambda m, _: [_KEPT]),
    "fgsm_pgi": Step("fgsm_pgi", {"": fgsm_pgi}, lambda m, _: [_KEPT]),
    "fgsm_uap": Step("fgsm_uap", {"": fgsm_uap}, lambda m, _: [_KEPT]),
    "stored_adv": Step("stored_adv", {"": stored_adv}, lambda m, _: [_REPLAY] * m.replays),
    "gat": Step("gat", {"": gat}, lambda m, _: [Attack(1, m._attack_mode), _PAIR]),
    "nuat": Step("nuat", {"": nuat}, lambda m, _: [Attack(1, m._attack_mode), _PAIR], {"growth_share": 0.0}),
    "backward_smoothing": Step(
        "backward_smoothing", {"": backward_smoothing}, lambda m, _: [Attack(1 + m.steps, "eval"), _PAIR]
    ),
    "free": Step("free", {"": free}, lambda m, _: [_REPLAY] * m.replays),
    "yopo": Step("yopo", {"": yopo}, lambda m, _: [_REPLAY, FirstLayer()] * m.outer),
    "adv": Step(
        "adv",
        {"robust_overfitting": adv, "fast_adversarial": adv_fast},
        lambda m, _: [Attack(m.steps), Learn()],
    ),
    "gairat": Step("gairat", {"": gairat}, lambda m, _: [Attack(m.steps, "eval"), Learn()], {"burn_in": 0.0}),
    "mart": Step("mart", {"": mart}, lambda m, _: [Attack(m.steps, "eval"), _PAIR]),
    "trades": Step("trades", {"": trades}, lambda m, _: [Look(1, "eval"), Attack(m.steps, "eval"), _PAIR]),
    "adr": Step("adr", {"": adr}, lambda m, _: [Attack(m.steps, "eval"), _PAIR]),
    "adr trades": Step(
        "adr", {"": adr}, lambda m, _: [Look(1, "eval"), Attack(m.steps, "eval"), _PAIR], {"form": "trades"}
    ),
    "mma": Step(
        "mma",
        {"": mma},
        lambda m, sure: (
            [Attack(m.steps, "eval", sure), Look(m.search_steps, "train", sure), _PAIR] if sure else [_PAIR]
        ),
        by_data=True,
    ),
    # BatchNorm with statistics that are given costs what it does in eval mode, where no gradient goes through them.
    "llr": Step(
        "llr",
        {"": llr},
        lambda m, _: [Attack(m.steps, "eval"), Learn((Forward(slopes=1), Forward(mode="eval")))],
        {"ramp": 0.0},
    ),
    "cure": Step(
        "cure",
        {"": cure},
        lambda m, _: [Learn((Forward(), Forward(mode="eval", slopes=1), Forward(mode="eval", slopes=1)))],
        {"grow": False},
    ),
    "jacobian": Step("jacobian", {"": jacobian}, lambda m, _: [Learn((Forward(slopes=m.projections),))]),
}
