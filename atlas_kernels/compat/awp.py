"""Drop-ins for ``utils_awp.py`` and ``perturb_input`` of csdongxian/AWP (adversarial weight perturbation; Wu, Xia &
Wang 2020, arXiv 2004.05884). The ``attack_pgd`` of its AT_AWP scripts is in ``robust_overfitting``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from .. import losses
from ..attacks import attacking, float16
from ..attacks.weights import weight_directions
from ..checks import require_choice
from ..outputs import logits_of
from .trades import DISTANCES, kl_adversary, noise_near

EPS = 1e-20


def diff_in_weights(model: nn.Module, proxy: nn.Module) -> dict[str, Tensor]:
    """By name, what separates the proxy's weights from the model's, scaled to the norm of the model's: of those of two
    or more dimensions with "weight" in their name."""
    pairs = zip(model.state_dict().items(), proxy.state_dict().values(), strict=True)
    chosen = [(name, old, new - old) for (name, old), new in pairs if old.ndim > 1 and "weight" in name]
    return weight_directions(((name, old) for name, old, _ in chosen), (difference for *_, difference in chosen))


@torch.no_grad()
def add_into_weights(model: nn.Module, diff: dict[str, Tensor], coeff: float = 1.0) -> None:
    """Adds ``coeff * diff`` to the weights of its names."""
    weights = [(weight, diff[name]) for name, weight in model.named_parameters() if name in diff]
    if weights:
        own, directions = zip(*weights, strict=True)
        torch._foreach_add_(own, directions, alpha=coeff)


class _WeightPerturbation:
    def __init__(self, model: nn.Module, proxy: nn.Module | None, proxy_optim: Optimizer | None, gamma: float) -> None:
        _require_plain(proxy_optim)
        self.model = model
        self.proxy = proxy
        self.proxy_optim = proxy_optim
        self.gamma = gamma

    def perturb(self, diff: dict[str, Tensor]) -> None:
        """Adds gamma times the directions to the weights."""
        add_into_weights(self.model, diff, self.gamma)

    def restore(self, diff: dict[str, Tensor]) -> None:
        """Takes them away again; an update made in between stays."""
        add_into_weights(self.model, diff, -self.gamma)

    def _directions(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """``||w|| g / ||g||`` per weight, g the gradient of the loss in train mode; BatchNorm's statistics rest."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        with attacking(self.model, "train", None):
            for _, weight in named:
                weight.requires_grad_(True)  # here the weights are what is attacked
            value = loss()
            # The length of the gradient cancels, so it need not underflow.
            if float16.is_asked_for(self.model, value) or float16.is_in_graph(value)[0]:
                value = value / value.detach().clamp_min(torch.finfo(torch.float32).tiny)
            gradients = torch.autograd.grad(value, [weight for _, weight in named], allow_unused=True)
        return weight_directions(named, gradients)


class AdvWeightPerturb(_WeightPerturbation):
    """AWP for adversarial training: the direction in the weights that raises ``CE(z(x'), y)``.

    Kept: the calls, and the directions by parameter name, for weights of two or more dimensions with "weight" in their
    name; mode, gradients and BatchNorm statistics of the model do not change.

    Differs: the gradient is taken on the model itself. ``proxy`` is never run and may be None, and so may
    ``proxy_optim``: the learning rate of a plain SGD cancels, anything else there raises ValueError. Weights that are
    frozen, or that the loss does not reach, have no entry.
    """

    def calc_awp(self, inputs_adv: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self._directions(lambda: losses.cross_entropy(logits_of(self.model(inputs_adv)), targets))


class TradesAWP(_WeightPerturbation):
    """AWP for TRADES: the direction that raises ``CE(z(x), y) + beta KL(p(x) || p(x'))``; else as AdvWeightPerturb.

    Differs also: the clean images are run once, not twice; with dropout the KL sees the mask of the cross-entropy.
    """

    def calc_awp(self, inputs_adv: Tensor, inputs_clean: Tensor, targets: Tensor, beta: float) -> dict[str, Tensor]:
        return self._directions(
            lambda: losses.trades_loss(
                logits_of(self.model(inputs_clean)), logits_of(self.model(inputs_adv)), targets, beta=beta
            )
        )


def perturb_input(
    model: nn.Module,
    x_natural: Tensor,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    distance: str = "l_inf",
) -> Tensor:
    """The attack of ``trades_loss`` alone: x', with the model left in eval mode.

    Differs: in l_2 a sample without gradient moves at random, as in TRADES, where the published code makes it NaN; the
    rest as in ``trades_loss``.
    """
    require_choice("distance", distance, DISTANCES)
    noise = noise_near(x_natural)
    model.eval()
    return kl_adversary(model, x_natural, noise, step_size, epsilon, perturb_steps, distance)


def _require_plain(optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        extra = {name: group[name] for name in ("momentum", "weight_decay", "maximize") if group.get(name)}
        if not isinstance(optimizer, SGD) or extra:
            got = f"{type(optimizer).__name__} with {extra}" if extra else type(optimizer).__name__
            raise ValueError(
                f"proxy_optim is {got}: the direction is the gradient's, as plain SGD makes it; pass None, or "
                "torch.optim.SGD without momentum and weight decay"
            )
