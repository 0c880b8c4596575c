"""The least perturbation that fools a network, per sample, by bisection of the radius of an attack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import column
from ..schema import L1, LINF
from .arguments import require_count
from .attack import Attack
from .execution import attacking
from .objective import Model


class MinimumNormResult(NamedTuple):
    """Adversaries [B, ...] and how far from x they are.

    norm: float64[B], the norm of adv - x, 0 where x itself is misclassified, infinity where no radius up to eps
    sufficed: there adv is x. fooled: bool[B], where it is finite. key: the noise key, which repeats the search.
    """

    adv: Tensor
    norm: Tensor
    fooled: Tensor
    key: Tensor


@dataclass(frozen=True)
class MinimumNorm:
    """Searches by bisection, for each sample, the smallest radius at which an attack fools the model, as MMA training
    does (Ding et al. 2020, arXiv 1812.02637).

    The attack begins at its own eps. Where it succeeds, the norm of what it found is the new upper bound; where it
    fails, the radius is the new lower bound. The next radius is halfway. There the attack starts at the adversary that
    was found, brought into the smaller ball. After ``bisections`` of them the bounds are at most
    ``eps / 2**bisections`` apart, which is the tolerance. (An attack may miss what is closer still, so that the true
    least norm is below.) An adversary is replaced only by a closer one, and each is misclassified in the batch that was
    given.

    Costs ``bisections + 1`` attacks, which a sample leaves as soon as it is fooled, and a forward after each.

    Args:
        attack: ``PGD``, say, with the largest radius as eps, for instance ``PGD(32 / 255, steps=40)``; a step size
            shrinks with the radius. Its ``restarts`` are those at eps.
        bisections: 8 by default, a tolerance of eps / 256.
    """

    attack: Attack
    bisections: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be an attack such as PGD(32 / 255, steps=40), got {self.attack!r:.60}")
        if self.attack.objective == "kl":
            raise ValueError('the attack has objective="kl", which knows no labels: use "ce", "margin" or "dlr"')
        if self.attack.attack_mode == "train":
            raise ValueError('attack_mode="train" lets samples depend on those beside them, which leave: use "eval"')
        if self.attack.count_correct:
            raise ValueError("count_correct counts along one attack: set it to False")
        require_count("bisections", self.bisections, 0)

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MinimumNormResult:
        """Arguments as in ``Attack.run``; with ``targeted`` y holds the classes to reach."""
        whole = self.attack.batch(x, y, key=key, ids=ids, generator=generator)
        x, goal, key, ids = whole.x, whole.goal, whole.key, whole.rows(whole.every_row()).ids
        assert goal.labels is not None and ids is not None
        largest, step = (torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (whole.eps, whole.step_size))
        share = torch.where(largest > 0, step / largest, 0.0).expand(len(x))

        with attacking(model, self.attack.attack_mode, key, device=x.device):
            _, fooled = goal.judge(goal.predict(model, x))
            adv, norm = x.clone(), torch.where(fooled, 0.0, torch.inf).double()
            low, radius, going = torch.zeros_like(norm), largest.expand(len(x)), ~fooled
            for number in range(self.bisections + 1):
                rows = going.nonzero()[:, 0]
                if not len(rows):
                    break
                attack = self._attack(radius[rows], share[rows], first=number == 0)
                noise = torch.stack([key[0] + number, key[1]])
                start = None if number == 0 else replace(whole.rows(rows), eps=radius[rows]).inside(adv[rows])
                tried = attack(model, x[rows], goal.labels[rows], start=start, key=noise, ids=ids[rows])
                found = adv.index_copy(0, rows, tried)
                distance = _norm(found - x, self.attack.norm)
                # By a forward of the whole batch: at the edge of a class, rounding decides.
                closer = going & goal.judge(goal.predict(model, found))[1] & (distance < norm)
                adv, norm = torch.where(column(closer, adv), found, adv), torch.where(closer, distance, norm)
                low = torch.where(going & ~closer, radius, low)
                low = torch.where(low < norm, low, 0.0)  # a smaller radius than one that failed
                radius, going = (low + norm) / 2, going & norm.isfinite()
        return MinimumNormResult(adv, norm, norm.isfinite(), key)

    def _attack(self, radius: Tensor, share: Tensor, first: bool) -> Attack:
        restarts = self.attack.restarts if first else 1
        step = None if self.attack.step_size is None else radius * share
        return replace(self.attack, eps=radius, step_size=step, restarts=restarts, compact=True)


def _norm(delta: Tensor, norm: str) -> Tensor:
    order = torch.inf if norm == LINF else 1 if norm == L1 else 2
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)
