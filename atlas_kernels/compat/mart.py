"""Drop-in for ``mart.py`` of YisenWang/MART (Wang et al. 2020, the loss; not Intel's toolkit of that name)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import losses
from ..attacks import PGD
from ..checks import require_choice
from ..outputs import logits_of
from .trades import linf_adversary, noise_near


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
) -> Tensor:
    """``-log q_y - log(1.0001 - max_{k != y} q_k + 1e-12) + beta KL(p || q + 1e-12) (1.0000001 - p_y)``, p = p(x),
    q = p(x'), x' from PGD on cross-entropy in eval mode; the caller takes the step.

    Kept: the model is left in train mode and ``optimizer.zero_grad()`` is called; the start is drawn by ``torch.randn``
    on the CPU; train-mode forwards of x, then x'; the gradient flows through 1 - p_y too.

    Differs: of equally likely wrong classes the first counts (there it is left open); images outside [0, 1], a radius
    of 1 or more and any other ``distance`` (for which the published code returns a loss on noise alone) raise
    ValueError.
    """
    require_choice("distance", distance, ("l_inf",))
    x_adv = linf_adversary(PGD(epsilon, step_size, perturb_steps), model, x_natural, y, noise_near(x_natural))
    model.train()
    x_adv = x_adv.clamp_(0.0, 1.0)  # the start, if there are no steps
    optimizer.zero_grad()
    logits = logits_of(model(x_natural))
    adv_logits = logits_of(model(x_adv))
    return losses.mart_loss(logits, adv_logits, y, beta=float(beta))
