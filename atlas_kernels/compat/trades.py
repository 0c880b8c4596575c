"""Drop-in for ``trades.py`` of yaodongyu/TRADES (Zhang et al. 2019, arXiv 1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import losses
from ..attacks import PGD, Attack, Batch
from ..attacks.arguments import require_count
from ..capture import capturing
from ..checks import flag, require_choice
from ..layout import column
from ..outputs import logits_of

DISTANCES = ("l_inf", "l_2")


def squared_l2_norm(x: Tensor) -> Tensor:
    """The sum of all squares, of the whole batch, [1]."""
    return x.reshape(1, -1).square().sum(1)


def l2_norm(x: Tensor) -> Tensor:
    """The root of ``squared_l2_norm``."""
    return squared_l2_norm(x).sqrt()


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    lean: bool = False,
) -> Tensor:
    """``CE(z(x), y) + beta KL(p(x) || p(x'))``, x' from an attack on that KL in eval mode; the caller takes the step.

    Kept: the model is left in train mode and ``optimizer.zero_grad()`` is called; starts are drawn by ``torch.randn``
    on the CPU; in l_2 the step is 2 epsilon / perturb_steps and a sample without gradient moves at random. Three
    train-mode forwards, of x, x' and x again, as published: BatchNorm's running statistics, which the next attack
    depends on, see x twice, and with dropout the KL sees another mask than the cross-entropy.

    Differs: x is run once per attack, not in every step; a prediction of probability 0 no longer makes the gradient
    NaN; images outside [0, 1], an l_inf radius of 1 or more and any other ``distance`` (for which the published code
    returns a loss on noise alone) raise ValueError.

    lean: x is run once in the loss (3 passes of 2 perturb_steps + 10 fewer). Without dropout it is the same loss with
    the same gradients; only the running statistics differ.
    """
    require_choice("distance", distance, DISTANCES)
    flag("lean", lean)
    noise = noise_near(x_natural)
    if distance == "l_2":
        noise = noise_near(x_natural)  # the published code draws it a second time
    x_adv = kl_adversary(model, x_natural, noise, step_size, epsilon, perturb_steps, distance)
    model.train()
    optimizer.zero_grad()
    logits = logits_of(model(x_natural))
    adv_logits = logits_of(model(x_adv))
    if lean:
        return losses.trades_loss(logits, adv_logits, y, beta=beta)
    return losses.cross_entropy(logits, y) + beta * losses.kl_div(logits_of(model(x_natural)), adv_logits)


def noise_near(x: Tensor) -> Tensor:
    """0.001 of normal noise, drawn on the CPU wherever x is."""
    return 0.001 * torch.randn(x.shape).to(x.device)


def kl_adversary(
    model: nn.Module, x: Tensor, noise: Tensor, step_size: float, epsilon: float, steps: int, distance: str
) -> Tensor:
    """x' in [0, 1] that climbs KL(p(x) || p(x')) from x + noise, in eval mode."""
    if distance == "l_inf":
        adv = linf_adversary(PGD(epsilon, step_size, steps, objective="kl"), model, x, None, noise)
    else:
        require_count("perturb_steps", steps, 0)
        attack = _L2(epsilon, epsilon / max(1, steps) * 2, steps, norm="l2", objective="kl")
        adv = attack.on(model, attack.batch(x, start=noise.to(x.dtype), seeded=False)).adv
    return adv.clamp_(0.0, 1.0)


def linf_adversary(attack: PGD, model: nn.Module, x: Tensor, y: Tensor | None, noise: Tensor) -> Tensor:
    """The attack from x + noise, without touching the global random state."""
    key = torch.zeros(2, dtype=torch.int64, device=x.device)  # in eval mode nothing is drawn from it
    return attack(model, x, y, start=(x + noise).to(x.dtype), key=key)


@dataclass(frozen=True)
class _L2(Attack):
    """The published steps in l2, from x + the start that is given. They carry x' - x, which is not rounded as x' is."""

    def start(self, batch: Batch, draw: int) -> Tensor:
        return batch.x + batch.start(draw)

    def step(
        self, batch: Batch, adv: Tensor, grad: Tensor, carried: Tensor | None, left: float
    ) -> tuple[Tensor, Tensor]:
        x, delta = batch.x, batch.start(0) if carried is None else carried
        norms = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)  # no square underflows
        direction = (grad / column(norms, grad)).to(x.dtype)
        still = norms == 0
        if capturing(x.is_cuda):
            direction = torch.where(column(still, grad), -torch.randn_like(direction), direction)
        else:
            direction[still] = -torch.randn_like(direction[still])
        delta = (delta + batch.step_size * direction + x).clamp(0, 1) - x
        delta = delta.renorm(2, 0, float(batch.eps))
        return x + delta, delta
