"""FAB, the fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044), as in AutoAttack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from ..checks import flag, number_in
from ..hyperplane import hyperplane_step
from ..layout import column, compute_dtype
from ..schema import L1, L2, LINF
from ..vjp import vjp
from . import float16, row_noise
from .arguments import require_count
from .batch import Batch
from .objective import Model, Objective
from .search import Search, State, finite


@dataclass(frozen=True)
class FAB(Search):
    """Looks for the nearest adversary, whatever eps is: from each iterate, and from x, to the plane on which the
    linearised network changes its class (see ``hyperplane_step``); where the new iterate is an adversary, some of the
    way back to x.

    ``adv`` is the nearest adversary found, and ``objective`` of the result its distance from x, negated; x and -inf
    where there is none. A sample is fooled, and leaves, when one lies within eps; so with eps=0 all rounds are made,
    and the smallest distance is found. A round takes ``2 steps`` forwards and ``steps`` backwards; untargeted, C - 1
    times as many backwards.

    Arguments and calls as in ``Search``, with the published defaults, and:

    Args:
        targeted: the plane of a round is that of the label and one other class, in the order of the clean logits. An
            image is fooled all the same when its class is not the label. Else the plane is the nearest of all C - 1.
        target_classes: how many classes a targeted attack tries, of the C - 1 there are; each has ``restarts`` rounds.
        alpha_max: largest weight of the step from x.
        eta: how far a step goes beyond the plane, as a factor.
        beta: what is left of the way from x to an adversary, before the next step.
    """

    _: KW_ONLY
    targeted: bool = True
    target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("targeted", self.targeted)
        require_count("target_classes", self.target_classes, 1)
        number_in("alpha_max", self.alpha_max, 0.0, 1.0)
        number_in("eta", self.eta, 1.0)
        number_in("beta", self.beta, 0.0, 1.0)

    @property
    def passes(self) -> int:
        return 3

    def rounds(self, classes: int) -> int:
        return self.restarts * (min(self.target_classes, classes - 1) if self.targeted else 1)

    def begin(self, model: Model, batch: Batch, draw: Tensor) -> State:
        state = {
            "at": self._start(batch, draw),
            "adv": batch.x.clone(),
            "fooled": torch.zeros_like(draw, dtype=torch.bool),
            "objective": torch.full_like(draw, -torch.inf, dtype=torch.float64),
            "number": torch.zeros_like(draw),
        }
        if self.targeted:
            state["target"] = self.target(batch, draw)
        return state

    def _start(self, batch: Batch, draw: Tensor) -> Tensor:
        """x in the first round of a target; later a random point at half of eps from it, but for the range."""
        if self.restarts == 1:
            return batch.x.clone()
        shape = batch.x.shape[1:]
        if self.norm == LINF:
            noise = 2 * row_noise.uniform(batch, draw, 0, shape) - 1
        else:
            noise = row_noise.normal(batch, draw, 0, shape)
        size = _length(noise, self.norm).clamp_min(torch.finfo(noise.dtype).tiny)
        radius = (draw % self.restarts > 0) * 0.5 * batch.eps / size
        return batch.inside(batch.x + noise * column(radius.to(noise.dtype), noise))

    def advance(self, model: Model, batch: Batch, state: State) -> State:
        if self.targeted:
            goal = _Gap.between(batch, state["target"])
            gap, grad = goal.plane(model, state["at"])
            batch.goal.learn(goal)
        else:
            gap, grad = self._nearest(model, batch, state["at"])
        at = hyperplane_step(
            state["at"], finite(grad), batch.x, gap, norm=self.norm, alpha_max=self.alpha_max, overshoot=self.eta,
            clip_min=batch.clip_min, clip_max=batch.clip_max,
        )  # fmt: skip
        _, wrong = batch.goal.judge(batch.goal.predict(model, at))
        inside = (batch.inside(at) == at).flatten(1).all(1)
        objective = -_length(at.to(torch.float64) - batch.x, self.norm)
        fooled = wrong & inside
        nearer = fooled | (wrong & (objective > state["objective"]))
        back = batch.x + (at - batch.x) * self.beta
        return state | {
            "at": torch.where(column(wrong, at), back, at),
            "adv": torch.where(column(nearer, at), at, state["adv"]),
            "fooled": fooled,
            "objective": torch.where(nearer, objective, state["objective"]),
            "number": state["number"] + 1,
        }

    def _nearest(self, model: Model, batch: Batch, at: Tensor) -> tuple[Tensor, Tensor]:
        """Of the planes of all other classes, that which is nearest to ``at``: its gap and gradient."""
        labels = batch.goal.labels
        assert labels is not None and batch.clean is not None
        others = torch.arange(batch.clean.shape[1] - 1, device=at.device)[:, None]
        goals = [_Gap.between(batch, target) for target in others + (others >= labels)]
        gap = torch.zeros_like(labels, dtype=torch.float64)
        least = torch.full_like(gap, torch.inf)
        grad = torch.zeros_like(at, dtype=compute_dtype(at.dtype))
        for value, slope in _planes(goals, model, at):
            slope = finite(slope)
            distance = value.double().abs() / (_length(slope.double(), _DUAL[self.norm]) + 1e-12)
            nearer = distance < least
            gap, least = torch.where(nearer, value.double(), gap), torch.where(nearer, distance, least)
            grad = torch.where(column(nearer, at), slope.to(grad.dtype), grad)
        return gap, grad


@dataclass
class _Gap(Objective):
    """What is to become 0: the logit of the class ``targets`` minus that of the label."""

    targets: Tensor | None = None

    @classmethod
    def between(cls, batch: Batch, targets: Tensor) -> _Gap:
        goal = cls(batch.goal.labels, targets=targets)
        goal.learn(batch.goal)
        return goal

    def rows(self, index: Tensor) -> _Gap:
        assert self.targets is not None
        return replace(super().rows(index), targets=self.targets[index])  # type: ignore[return-value]

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self.targets is not None and self.labels is not None
        return self.targets, self.labels

    def cotangent(self, logits: Tensor) -> Tensor:
        made = torch.zeros_like(logits)
        for sign, of in zip((1.0, -1.0), self._ends, strict=True):
            made.scatter_(1, of[:, None], sign)
        return made

    def value(self, logits: Tensor) -> Tensor:
        target, label = (logits.detach().gather(1, of[:, None])[:, 0] for of in self._ends)
        return float16.wide(target) - float16.wide(label)

    def plane(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gap at x and its gradient."""
        logits, grad = self.gradient(model, x)
        return self.value(logits), grad


def _planes(goals: Sequence[_Gap], model: Model, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """That of each goal, by one forward; where the network runs in 16 bits, by one for each, which sees to what they
    lose."""
    leaf, logits = goals[0].traced(model, x)
    if logits.dtype == torch.bfloat16 or float16.is_used(model, leaf, logits):
        for goal in goals:
            yield goal.plane(model, x)
        return
    for goal in goals:
        grad = vjp(logits, leaf, goal.cotangent(logits.detach()), retain_graph=goal is not goals[-1])
        yield goal.value(logits), grad


def _length(way: Tensor, norm: str) -> Tensor:
    """Per sample."""
    return torch.linalg.vector_norm(way.flatten(1), _ORDER[norm], dim=1)


_ORDER = {LINF: math.inf, L2: 2.0, L1: 1.0}
_DUAL = {LINF: L1, L2: L2, L1: LINF}
