"""What the attacks share: from torchattacks' settings to an ``Attack`` along the gradient of cross-entropy or a KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .... import attacks
from ....attacks.arguments import require_radius
from ....attacks.held import modes_of
from ....checks import per_sample, require_float_images, require_images
from ....layout import column
from ..attack import Attack, next_key


class GradientAttack(Attack):
    """Calling gives detached adversaries, like the images.

    images: float [B, ...] in [0, 1], or normalised ones after ``set_normalization_used``; moved to ``device``. labels:
    class indices [B]; in targeted modes what they say goes through the mode's choice of targets first. eps and alpha
    are numbers, or tensors [B] or [B, 1, 1, 1], one value per sample.
    """

    eps: float | Tensor
    _needs_labels = True

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, model)
        self.supported_mode = ["default", "targeted"]
        self._normalized: Normalized | None = None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """The adversaries of images in [0, 1], in the mode that the model is in."""
        return self._perturbed(images, labels)

    def _perturbed(self, images: Tensor, labels: Tensor | None) -> Tensor:
        attack = self._attack()
        require_float_images("inputs", images)
        x = images.detach().to(self.device)
        if self._normalization_applied is False:
            x = _without_rounding(x)
        require_images(x)
        for name, value in (("eps", attack.eps), ("alpha", attack.step_size)):
            if isinstance(value, Tensor):
                per_sample(name, value, x)
        if isinstance(labels, Tensor):
            labels = labels.detach().to(x.device)
        if self.targeted:
            labels = self.get_target_label(x, labels)
        if labels is None and self._needs_labels:
            raise ValueError(f"labels is missing: {self.attack} needs the class of every image")
        labels = labels if self._needs_labels else None
        if not self._is_overridden():
            return attack(self._network(x), x, labels, start=self._start(x, attack.eps), key=next_key(x.device))
        # What is overridden may draw random numbers of its own: in torchattacks' order, and from the global state.
        reference = self._judge(x, "keep") if attack.objective == "kl" else None
        start = self._start(x, attack.eps)
        batch = attack.batch(x, labels, reference_logits=reference, start=start, seeded=False)
        return attack.on(self._through(), batch).adv

    def _attack(self) -> attacks.Attack:
        """The attack with the settings as they are now; checks them."""
        raise NotImplementedError

    def _made(
        self, step_size: float | Tensor, steps: int, kind: type[attacks.Attack] = attacks.PGD, **options: Any
    ) -> attacks.Attack:
        eps, alpha = radius("eps", self.eps), radius("alpha", step_size)
        mode = "keep" if any(modes_of(self.model.modules()).values()) else "eval"
        return kind(eps, alpha, steps, random_start=False, targeted=self.targeted, attack_mode=mode, **options)

    def _start(self, x: Tensor, eps: float | Tensor) -> Tensor | None:
        """The first iterate; None for x itself."""
        return None

    def _network(self, x: Tensor) -> nn.Module:
        """From images like ``x`` to logits, where nothing is overridden."""
        if self._normalization_applied is not False:
            return self.model
        values = self._mean_std(x)
        if self._normalized is None or not self._normalized.holds(self.model, *values):
            self._normalized = Normalized(self.model, *values)
        return self._normalized


class Normalized(nn.Module):
    """A model behind the normalisation of its inputs; kept from call to call, for what ``Execution`` keeps of it."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.training = False
        with torch.inference_mode(False):
            self.register_buffer("mean", mean.clone())
            self.register_buffer("std", std.clone())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits

    def holds(self, model: nn.Module, *values: Tensor) -> bool:
        """Whether it is that of ``model``, and now that of ``values`` (mean, std)."""
        mine = [self.mean, self.std]
        if self.model is not model or [*map(_kind, mine)] != [*map(_kind, values)]:
            return False
        torch._foreach_copy_(mine, values)
        return True


def uniform(noise: Tensor, eps: float | Tensor) -> Tensor:
    """Uniform in [-eps, eps], in noise's memory."""
    if isinstance(eps, Tensor):
        return noise.uniform_(-1, 1).mul_(column(eps, noise))
    return noise.uniform_(-eps, eps)


def around(x: Tensor, noise: Tensor) -> Tensor:
    """x + noise in the image range, in noise's memory."""
    return noise.add_(x).clamp_(0, 1)


def radius(name: str, value: float | Tensor) -> float | Tensor:
    """A number, or a tensor [B]; torchattacks takes what broadcasts, so there one value per sample is [B, 1, 1, 1]."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            value = float(value)
        elif value.ndim in (2, 3) or value.numel() != len(value):
            raise TypeError(
                f"{name} has shape {list(value.shape)}: it must be one number, or one value per sample, [B] or "
                "[B, 1, 1, 1]; radii per channel or pixel are not offered here"
            )
        else:
            value = value.detach().flatten()
    require_radius(name, value)
    return value


def _without_rounding(x: Tensor) -> Tensor:
    """What normalising and back has rounded to just outside [0, 1] is brought in."""
    inside = x.clamp(0, 1)
    return torch.where((x - inside).abs() <= max(1e-5, 4 * torch.finfo(x.dtype).eps), inside, x)


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device
