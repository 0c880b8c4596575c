"""Signs that a figure cannot be trusted (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv 1802.00420).

Each is a pure function of what was measured; ``probe`` measures, on few images, what an evaluation alone does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels.attacks import PGD, Batch, Model
from atlas_kernels.attacks.contract import leave_no_trace
from atlas_kernels.attacks.examined import leads_nowhere
from atlas_kernels.attacks.objective import Objective
from atlas_kernels.attacks.progress import counted
from atlas_kernels.outputs import logits_of, predicted, require_rows_of_logits

from ..inference import predict
from ..options import Norm, radius
from .named import CLEAN
from .outcome import Outcome

PROBED = 100  # images
STEPS = 20  # of the probe's PGD
#: Two forwards of one network differ by rounding alone; published checks allow as much of normalised logits.
SAME = 1e-4
#: A one-step attack that leaves this share of images right more than an iterative one does, and twice as many, has
#: found nothing: a network that collapsed (FGSM 61 %, PGD-20 1 %), or a standard one.
FAR, TIMES = 0.15, 2.0
#: The black box may find some images that gradients did not; published checks allow so many.
BLACK_BOX = 0.002


@dataclass(frozen=True)
class Sign:
    """What is wrong, in words, and the figure that it is about: an attack and eps, or None for all of them."""

    sign: str
    text: str
    attack: str | None = None
    eps: float | None = None

    def of(self, outcome: Outcome) -> bool:
        """Whether it is about that figure."""
        return self.attack in (None, outcome.attack.name) and self.eps in (None, outcome.eps)


@dataclass(frozen=True)
class Probe:
    """What few images say of a network.

    images: of which those that are right. differs: the largest difference of two forwards, as a share of the logits'
    norm. probabilities: whether its outputs are such. classes: of the network. differentiable: whether its logits have
    a gradient to the input; if not, nothing below is known. zero_gradients: how many images have none at all, or one
    with NaN or infinity.
    losses: mean cross-entropy at the images, at a random start in the ball, and after each step of PGD. large_eps:
    a radius from which every image can become the same one, and left: the share that PGD leaves right there.
    """

    images: int
    classes: int
    differs: float
    probabilities: bool
    differentiable: bool
    zero_gradients: int | None = None
    losses: tuple[float, ...] = ()
    large_eps: float | None = None
    left: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def of_outcomes(outcomes: Sequence[Outcome]) -> Iterator[Sign]:
    """What the figures of one network say of each other, by radius."""
    for outcome in outcomes:
        yield from unfounded(outcome)
        yield from unconfirmed(outcome)
    for eps in dict.fromkeys(outcome.eps for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.eps == eps]
        kinds = {kind: [o for o in here if o.attack.kind == kind] for kind in ("one step", "iterative", "black box")}
        for one in kinds["one step"]:
            for strong in kinds["iterative"]:
                yield from one_step_stronger(one, strong)
        if strongest := min(kinds["iterative"], key=lambda o: o.accuracy, default=None):
            for one in kinds["one step"]:
                yield from one_step_blind(one, strongest)
            for black in kinds["black box"]:
                yield from black_box(black, strongest)
        for whole in here:
            yield from black_box_in(whole)
    for name in dict.fromkeys(outcome.attack.name for outcome in outcomes):
        yield from over_radii([outcome for outcome in outcomes if outcome.attack.name == name])


def unfounded(outcome: Outcome) -> Iterator[Sign]:
    """NaN, and an adversary outside the ball."""
    own = outcome.attack.name, outcome.eps
    if outcome.nan:
        yield Sign(
            "nan",
            f"{counted(outcome.nan, 'image')} with NaN as logits, which counts as not robust. Find out where it comes "
            "from",
            *own,
        )
    if outcome.eps is not None and outcome.distance > outcome.eps * (1 + 1e-4) + 1e-6:
        yield Sign("outside", f"an adversary is {outcome.distance:.6g} from its image: outside of the ball", *own)


def unconfirmed(outcome: Outcome) -> Iterator[Sign]:
    """Adversaries that AutoAttack found, and that its last check did not confirm."""
    if count := outcome.settings.get("unconfirmed"):
        yield Sign(
            "unconfirmed",
            f"{counted(count, 'image')} had an adversary that the last check did not confirm, and count as right: the "
            "figure may be too high by as many. The logits are random, or depend on the images beside or the hardware",
            outcome.attack.name,
            outcome.eps,
        )


def one_step_stronger(one: Outcome, strong: Outcome) -> Iterator[Sign]:
    """A one-step attack beside an iterative one of the same ball, image by image."""
    only_one = int((~one.right & strong.right).sum())
    only_strong = int((one.right & ~strong.right).sum())
    if only_one - only_strong > 2 * math.sqrt(only_one + only_strong):  # McNemar's test, two standard errors
        yield Sign(
            "one step stronger than many",
            f"{_beside(one, strong)}: the iterative attack is the weaker one, so it is stuck (masked gradients, or "
            "steps of a wrong size), and its figure is too high",
            strong.attack.name,
            strong.eps,
        )


def one_step_blind(one: Outcome, strong: Outcome) -> Iterator[Sign]:
    """A one-step attack that finds next to nothing of what an iterative one finds."""
    if one.accuracy - strong.accuracy > FAR and one.accuracy > TIMES * strong.accuracy:
        yield Sign(
            "hides from one step",
            f"{_beside(one, strong)}: the network hides from one step (catastrophic overfitting, or no adversarial "
            f"training at all), and the figure of {one.attack.label} says nothing",
            one.attack.name,
            one.eps,
        )


def _beside(one: Outcome, other: Outcome) -> str:
    return f"{one.attack.label} leaves {one.percent} right, {other.attack.label} {other.percent}"


def black_box(black: Outcome, white: Outcome) -> Iterator[Sign]:
    """An attack on the logits alone beside the strongest one on gradients."""
    if white.accuracy - black.accuracy > BLACK_BOX and int((~black.right & white.right).sum()) > 1:
        yield Sign(
            "black box stronger than white box",
            f"{_beside(black, white)}: the gradients are masked, and the true figure is lower still",
            white.attack.name,
            white.eps,
        )


def black_box_in(whole: Outcome) -> Iterator[Sign]:
    """The same, of the parts of one ensemble, by what was left after each; Square alone is beside no other."""
    parts = list(whole.parts.items())
    for (earlier, before), (name, after) in zip(parts, parts[1:], strict=False):
        more = name == "square" and earlier != CLEAN and before - after > BLACK_BOX
        if more and (before - after) * len(whole.right) > 1.5:
            yield Sign(
                "black box stronger than white box",
                f"Square takes it from {100 * before:.2f} % to {100 * after:.2f} %: the gradients are masked, and the "
                "true figure may be lower still. An attack made for this network is due",
                whole.attack.name,
                whole.eps,
            )


def over_radii(outcomes: Sequence[Outcome]) -> Iterator[Sign]:
    """One attack at growing radii: a larger ball holds the smaller one."""
    ordered = sorted((o for o in outcomes if o.eps is not None), key=lambda o: o.eps or 0.0)
    for small, large in zip(ordered, ordered[1:], strict=False):
        rises, falls = int((large.right & ~small.right).sum()), int((small.right & ~large.right).sum())
        if rises - falls > 2 * math.sqrt(rises + falls):
            yield Sign(
                "accuracy rises with eps",
                f"{small.percent} right at {small.ball}, {large.percent} at {large.ball}, where it has more room: it "
                "misses what it found before",
                large.attack.name,
                large.eps,
            )


def of_probe(probe: Probe, norm: Norm) -> Iterator[Sign]:
    """What few images said of the network."""
    if probe.probabilities:
        yield Sign(
            "probabilities",
            "the outputs are probabilities (each in [0, 1], a sum of 1), and attacks take them for logits: softmax "
            "hides gradients. Leave the last softmax out",
        )
    if probe.differs > SAME:
        yield Sign(
            "random",
            f"two forwards of the same images differ by {100 * probe.differs:.2g} % of the logits: the network is "
            "random, so one draw of it is attacked and another judged. Use --autoattack-version rand, which averages",
        )
    if not probe.differentiable:
        yield Sign(
            "no gradient",
            "the logits have no gradient to the images (no_grad, quantised, or not of torch): attacks on gradients "
            "cannot run, and were left out. Only a black-box attack, Square, says something of this network",
        )
        return
    if probe.zero_gradients:
        yield Sign(
            "zero gradients",
            f"the gradient is zero, or not finite, for {probe.zero_gradients} of {counted(probe.images, 'image')}: "
            "attacks along it may not move these, so their robustness is not known. Use autoattack, whose Square needs "
            "no gradient",
        )
    if len(probe.losses) > 2 and not probe.losses[-1] > probe.losses[1]:
        yield Sign(
            "loss does not rise",
            f"the loss does not rise along PGD: {probe.losses[1]:.4g} at its random start, {probe.losses[-1]:.4g} "
            f"after {len(probe.losses) - 2} steps. The gradients do not lead to adversaries",
        )
    if probe.large_eps is not None and probe.left:
        yield Sign(
            "robust at any eps",
            f"PGD-{STEPS} leaves {100 * probe.left:.0f} % of {counted(probe.images, 'image')} right at eps "
            f"{radius(probe.large_eps, norm)}, where every image can become the same one, and an attack that works "
            "leaves 0 %",
        )


def large_radius(shape: Sequence[int], norm: Norm) -> float:
    """The largest distance of an image from the grey one: from here on every image can become that."""
    size = math.prod(shape)
    return {"linf": 0.5, "l2": 0.5 * math.sqrt(size), "l1": 0.5 * size}[norm]


def probe(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: Norm, key: Tensor, ids: Tensor) -> Probe:
    """What the first ``PROBED`` of these images say, those that are right; the model is in eval mode already.

    It costs ``2 * STEPS + 1`` forwards and backwards of so many images, and six forwards.
    """
    with torch.no_grad():
        first, second = (logits_of(model(x[:PROBED])) for _ in range(2))
    require_rows_of_logits(first, x[:PROBED])
    rows = (predicted(first) == y[:PROBED]).nonzero()[:, 0]
    first, second = first.cpu().double(), second.cpu().double()  # not every device has double
    size = first.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    differs = ((first - second).norm(dim=1) / size).nan_to_num(0.0).max().item() if len(first) else 0.0
    shares = bool((first >= 0).all() & ((first.sum(1) - 1).abs() < 1e-4).all())
    known: dict[str, Any] = {"classes": first.shape[1], "differs": differs, "probabilities": shares}
    differentiable = _differentiable(model, x[:1])
    x, y, ids = x[rows], y[rows], ids[rows]
    known |= {"images": len(rows), "differentiable": differentiable}
    if not len(rows) or not differentiable:
        return Probe(**known)
    near = PGD(eps, _step(eps, norm), STEPS, norm=norm)
    losses, zero = near.loop(_climb, model, near.batch(x, y, key=key, ids=ids))
    large = large_radius(x.shape[1:], norm)
    left = predict(model, PGD(large, _step(large, norm), STEPS, norm=norm)(model, x, y, key=key, ids=ids)) == y
    share = left.cpu().double().mean().item()
    return Probe(**known, zero_gradients=zero, losses=losses, large_eps=large, left=share)


def _step(eps: float, norm: Norm) -> float | None:
    return None if norm == "l1" else 2.5 * eps / STEPS


def _differentiable(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits have a gradient to the images, and not to the weights alone."""
    with leave_no_trace(model, "eval", None):
        leaf = x.detach().clone().requires_grad_()
        logits = logits_of(model(leaf))
        try:
            return torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no graph, or one without a way back
            return False


def _climb(attack: Any, model: Model, batch: Batch) -> tuple[tuple[float, ...], int]:
    """The mean loss at x and at each iterate; and how many images have no gradient at x."""
    labels = batch.goal.labels
    assert labels is not None
    clean, grad = Objective(labels).gradient(model, batch.x, sized=False)
    zero = int(leads_nowhere(grad).sum())

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits.detach().cpu().double(), labels.cpu()).item()

    at, losses = attack.begin(batch), [loss(clean)]
    for _ in attack.climb(model, at):
        losses.append(loss(at.logits))
    losses.append(loss(batch.goal.predict(model, at.adv)))
    return tuple(losses), zero
