"""APGD: projected gradient descent that finds its own step sizes (Croce & Hein 2020, arXiv 2003.01690), and its form
for l1 (Croce & Hein 2021, arXiv 2103.01208), both as in AutoAttack."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import flag, number_in
from ..layout import column, compute_dtype
from ..perturb import apgd_step, project
from ..schema import L1, LINF
from . import row_noise
from .arguments import require_choice, require_count
from .batch import Batch
from .objective import Model
from .search import Search, State, finite

#: By objective, how many classes it needs.
_CLASSES = {"ce": 2, "dlr": 3, "ce_targeted": 2, "dlr_targeted": 4}
_MOMENTUM = 0.75
# In l1. A step moves a share of the entries: at first _FIRST_SHARE, later as many as the best point has moved, over
# _SPARSER. Where these have become fewer than _FEWER times those at the last look, the step has its first size again;
# else it is divided by _SHORTER, but never by more than _SHORTEST in all.
_FIRST_SHARE, _SPARSER, _FEWER, _SHORTER, _SHORTEST = 0.2, 1.5, 0.95, 1.5, 10.0


@dataclass(frozen=True)
class APGD(Search):
    """Steps along the gradient with momentum. Where a sample's objective no longer rises, its step is halved and the
    sample goes back to its best point.

    The constants are the published ones: first step 2 eps, momentum 0.75; the first look at the objective after 22 % of
    the steps, the next ones each 3 % sooner, down to 6 %. In l1 a step moves few entries and has no momentum; it begins
    with eps, there is a look every 4 % of the steps, and where the perturbation has become sparser the sample goes back
    to its best point and to the first step. A round takes steps + 1 forwards and backwards.

    Arguments and calls as in ``Search``, and:

    Args:
        objective: what is climbed: "ce" or "dlr"; or "ce_targeted" or "dlr_targeted", towards one other class after the
            other, in the order of the clean logits. There too an image is fooled when its class is not the label.
        target_classes: how many classes a targeted attack tries, of the C - 1 there are; each has ``restarts`` rounds.
        rho: a step is halved where the objective rose in no more than this share of the steps since the last look.
        eot_iter: forwards and backwards for each gradient, which is their sum, for randomised networks; the last one
            also judges.
        large_radii: in l1 alone: 3/10 of the steps with 3 eps, then as many with 2 eps, then the rest with eps, each
            from the best point before, as AutoAttack does in l1. A round takes steps + 3 forwards and backwards.
    """

    _: KW_ONLY
    objective: str = "ce"
    target_classes: int = 9
    rho: float = 0.75
    eot_iter: int = 1
    large_radii: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("objective", self.objective, tuple(_CLASSES))
        require_count("target_classes", self.target_classes, 1)
        require_count("eot_iter", self.eot_iter, 1)
        number_in("rho", self.rho, 0.0, 1.0)
        if flag("large_radii", self.large_radii) and self.norm != L1:
            raise ValueError(f'large_radii=True is for norm="l1", got norm="{self.norm}"')
        if self.large_radii and self.steps < 2:
            raise ValueError(f"large_radii=True needs at least 2 steps, got steps={self.steps}")

    @property
    def targeted(self) -> bool:
        return self.objective.endswith("targeted")

    @property
    def length(self) -> int:
        return len(self._plan)

    @property
    def passes(self) -> int:
        return 2 * self.eot_iter

    @property
    def _plan(self) -> tuple[_Point, ...]:
        return _plan(self.steps, self.norm, self.rho, self.large_radii)

    def rounds(self, classes: int) -> int:
        needed = _CLASSES[self.objective]
        if classes < needed:
            raise ValueError(f'objective="{self.objective}" needs {needed} classes, the model has {classes}: use "ce"')
        return self.restarts * (min(self.target_classes, classes - 1) if self.targeted else 1)

    def begin(self, model: Model, batch: Batch, draw: Tensor) -> State:
        point = self._start(batch, draw)
        zeros = torch.zeros(len(point), dtype=compute_dtype(point.dtype), device=point.device)
        state = {
            "number": zeros.long(), "adv": point, "fooled": zeros.bool(), "objective": zeros, "point": point,
            "before": point, "best": point, "best_grad": torch.zeros_like(point, dtype=zeros.dtype), "value": zeros,
            "size": zeros + batch.eps * (1 if self.norm == L1 else 2),
        }  # fmt: skip
        if self.norm == L1:
            state |= {"moved": zeros, "share": zeros}
        else:
            state |= {"looked": zeros, "rises": zeros, "halved": zeros.bool()}
        if self.targeted:
            state["target"] = self.target(batch, draw)
        return state

    def _start(self, batch: Batch, draw: Tensor) -> Tensor:
        """A random point at the distance eps, but for the range; in l1 Gaussian noise, projected."""
        x = batch.x
        if self.norm == LINF:
            noise = 2 * row_noise.uniform(batch, draw, 0, x.shape[1:]) - 1
        else:
            noise = row_noise.normal(batch, draw, 0, x.shape[1:])
        radius = batch.eps * self._plan[0].radius
        if self.norm != L1:
            length = torch.linalg.vector_norm(noise.flatten(1), math.inf if self.norm == LINF else 2, dim=1)
            noise = noise / column(length.clamp_min(torch.finfo(noise.dtype).tiny), x) * column(radius, x)
        return _inside(x + noise, batch, radius)

    def advance(self, model: Model, batch: Batch, state: State) -> State:
        x, point = batch.x, state["point"]
        now = _Point(*_table(self._plan, x.device)[state["number"]].unbind(1))
        opens = now.opens > 0
        value, fooled, grad = self._judge(model, batch, state)
        fooled &= now.counts > 0
        better = opens | (value > state["objective"])
        best = torch.where(column(better, x), point, state["best"])
        best_grad = torch.where(column(better, x), grad, state["best_grad"])
        found = state | {
            "number": state["number"] + 1,
            "adv": torch.where(column(fooled, x), point, best),
            "fooled": fooled,
            "objective": torch.where(better, value, state["objective"]),
            "best": best,
            "best_grad": best_grad,
        }
        radius: float | Tensor = batch.eps * now.radius.to(value.dtype) if self.large_radii else batch.eps
        back = self._sparser(found, batch, now, radius) if self.norm == L1 else self._slower(found, now, value)
        point = torch.where(column(back, x), best, point)
        grad = torch.where(column(back, x), best_grad, grad)
        momentum = torch.where(opens, 1.0, _MOMENTUM).to(value.dtype)
        following = apgd_step(
            point, state["before"], grad, x, radius, found["size"], momentum, norm=self.norm, clip_min=batch.clip_min,
            clip_max=batch.clip_max, largest=self._entries(found),
        )  # fmt: skip
        if self.large_radii:  # the next radius begins at the best point of this one
            inward = _inside(best, batch, batch.eps * now.next_radius.to(value.dtype))
            following = torch.where(column(now.next_radius > 0, x), inward, following)
        return found | {"point": following, "before": point}

    def _judge(self, model: Model, batch: Batch, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Of the present point: objective, whether it fools, gradient."""
        goal = replace(batch.goal, kind=self.objective, targets=state.get("target"))
        logits, grad = goal.gradient(model, state["point"], sized=self.eot_iter > 1)
        for _ in range(1, self.eot_iter):
            logits, more = goal.gradient(model, state["point"])
            grad = grad + more
        batch.goal.learn(goal)
        return *goal.judge(logits), finite(grad)

    def _slower(self, found: State, now: _Point, value: Tensor) -> Tensor:
        """In l_inf and l2: halves the step where the objective rose too rarely since the last look, or where the last
        look did not halve it and the best one is the same. There the sample goes back to its best point."""
        opens, looks = now.opens > 0, now.few >= 0
        # As published, the first step counts as a rise where the objective is positive, whatever it was at the start.
        rises = torch.where(opens, 0.0, found["rises"] + (value > found["value"]))
        stuck = ~found["halved"] & (found["looked"] >= found["objective"])
        back = looks & ((rises <= now.few) | stuck)
        found |= {
            "value": torch.where(opens, 0.0, value),
            "rises": torch.where(looks, 0.0, rises),
            "halved": torch.where(looks, back, opens | found["halved"]),
            "looked": torch.where(opens | looks, found["objective"], found["looked"]),
            "size": torch.where(back, found["size"] / 2, found["size"]),
        }
        return back

    def _sparser(self, found: State, batch: Batch, now: _Point, radius: float | Tensor) -> Tensor:
        """In l1: how many entries move from now on, and how far. Where the best point has become sparser since the last
        look, the sample goes back to it and the step to its first size; else the step becomes shorter."""
        opens, looks = now.opens > 0, now.few >= 0
        first = torch.zeros_like(found["size"]) + radius
        # The projection often takes off what a step has added; what is left there is rounding, and no entry that moved.
        rounding = 4 * torch.finfo(first.dtype).eps * (batch.x.abs() + column(first, batch.x))
        moved = ((found["best"] - batch.x).abs() > rounding).flatten(1).sum(1).to(first.dtype)
        entries = batch.x[0].numel()
        share = moved / entries / _SPARSER
        if not self.large_radii:
            moved = torch.where(opens, float(entries), moved)
            share = torch.where(opens, _FIRST_SHARE, share)
        back = looks & (moved / found["moved"] < _FEWER)
        shorter = torch.maximum(found["size"] / _SHORTER, first / _SHORTEST)
        found |= {
            "moved": torch.where(opens | looks, moved, found["moved"]),
            "share": torch.where(opens | looks, share, found["share"]),
            "size": torch.where(opens | back, first, torch.where(looks, shorter, found["size"])),
        }
        return back

    def _entries(self, state: State) -> Tensor | None:
        """In l1: how many entries of each sample the step moves."""
        if self.norm != L1:
            return None
        entries = state["adv"][0].numel()
        return entries - ((1 - state["share"]) * entries).clamp(0, entries - 1).long()


class _Point(NamedTuple):
    """What is done after the forward and backward at a point of a round: whether the point opens a series of steps of
    one radius; where there is a look, how many rises of the objective are too few, else -1; the radius; where the
    series ends, the next radius, else 0; and whether what fools counts, the radius being eps."""

    opens: Any
    few: Any
    radius: Any
    next_radius: Any
    counts: Any


@lru_cache
def _plan(steps: int, norm: str, rho: float, large_radii: bool) -> tuple[_Point, ...]:
    """The points of a round."""
    third = math.ceil(0.3 * steps)
    series = [(3, third), (2, third), (1, steps - 2 * third)] if large_radii else [(1, steps)]
    plan = []
    for (radius, length), (next_radius, _) in zip(series, [*series[1:], (0, 0)], strict=True):
        looks = _looks(length, norm, rho)
        for number in range(length + 1):
            over = next_radius if number == length else 0
            plan.append(_Point(number == 0, looks.get(number, -1), radius, over, radius == 1))
    return tuple(plan)


def _looks(steps: int, norm: str, rho: float) -> dict[int, int]:
    """After which steps the objective is looked at, and how many rises are too few (in l1: 0)."""
    looks, number = {}, 0
    window, shorter, shortest = (
        max(int(share * steps), 1) for share in ((0.22, 0.03, 0.06) if norm != L1 else (0.04, 0, 0.04))
    )
    while (number := number + window) <= steps:
        looks[number] = math.floor(rho * window) if norm != L1 else 0
        window = max(window - shorter, shortest)
    return looks


@lru_cache
def _table(plan: tuple[_Point, ...], device: torch.device) -> Tensor:
    """The plan with a row for each point."""
    return torch.tensor(plan, dtype=torch.int64, device=device)


def _inside(points: Tensor, batch: Batch, radius: float | Tensor) -> Tensor:
    return project(
        points.to(batch.x.dtype), batch.x, radius, norm=batch.norm, clip_min=batch.clip_min, clip_max=batch.clip_max
    )
