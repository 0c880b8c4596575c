"""The attack that fast_adversarial and robust_overfitting share: restarts on cross-entropy, in the mode as found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attacks.arguments import require_count
from ..attacks.execution import attacking
from ..attacks.float16 import are_coupled
from ..attacks.objective import Model, Objective
from ..layout import column
from ..outputs import predicted

Rows = Tensor | slice
#: (iterates, their gradients, which rows of the batch they are) -> the next iterates.
Step = Callable[[Tensor, Tensor, Rows], Tensor]


def strongest_delta(
    model: nn.Module, forward: Model, x: Tensor, y: Tensor, goal: Objective, start: Callable[[], Tensor], step: Step,
    attack_iters: int, restarts: int, *, freeze: bool,
) -> Tensor:  # fmt: skip
    """The perturbation of the largest loss per sample; of equal ones the later restart's, and 0 where all are NaN.

    model: its mode is kept and its BatchNorm moves. forward: what is attacked, the model with what precedes it. start:
    draws a first iterate. freeze: a sample stays where it is while it is misclassified, and an attack ends when all
    are; if the samples do not depend on each other either, such ones are left out of all further forwards.
    """
    require_count("attack_iters", attack_iters, 0)
    require_count("restarts", restarts, 0)
    coupled = are_coupled(model)
    climb = _climb_until_misclassified if freeze else _climb
    delta, best = torch.zeros_like(x), torch.zeros((), device=x.device)
    with attacking(model, "keep", None, update_buffers=True):
        for _ in range(restarts):
            adv = climb(forward, start(), y, goal, step, attack_iters, coupled)
            if restarts == 1 and not coupled:
                return adv - x  # nothing hangs on what a judging forward would say
            loss, _ = goal.judge(goal.predict(forward, adv))
            stronger = column(loss >= best, x)
            delta = torch.where(stronger, adv - x, delta)
            best = torch.maximum(loss, best)
    return delta


def _climb(
    forward: Model, adv: Tensor, y: Tensor, goal: Objective, step: Step, attack_iters: int, coupled: bool
) -> Tensor:
    for _ in range(attack_iters):
        _, grad = goal.gradient(forward, adv)
        adv = step(adv, grad, slice(None))
    return adv


def _climb_until_misclassified(
    forward: Model, adv: Tensor, y: Tensor, goal: Objective, step: Step, attack_iters: int, coupled: bool
) -> Tensor:
    rows = torch.arange(len(adv), device=adv.device)
    for _ in range(attack_iters):
        logits, grad = goal.gradient(forward, adv[rows])
        right = (predicted(logits) == y[rows]).nonzero()[:, 0]
        if not len(right):
            break
        moving = rows[right]
        adv[moving] = step(adv[moving], grad[right], moving)
        if not coupled:
            rows, goal = moving, goal.rows(right)
    return adv
