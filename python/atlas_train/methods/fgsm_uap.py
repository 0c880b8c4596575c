"""FGSM-UAP: one-step training from a perturbation that all images, or all of a class, have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atlas_kernels import consistency_loss, pgd_step, project
from atlas_kernels.checks import class_indices

from ..data import Batch
from ..noise import uniform
from ..options import option
from .base import Metrics, State
from .kept import Given, KeptForward
from .terms import accuracy, classes_of

_FIRST = 1  # draw of the first perturbation


@dataclass(frozen=True)
class FGSMUAP(KeptForward):
    """FGSM-UAP, and with ``per_class`` FGSM-CUAP, as FastAT Benchmark's code (arXiv 2604.22853) has them:

        L = CE(z(x'), y) + weight mean((z(x0) - z(x'))^2), mean over batch and classes, gradient to both
        x0 = x + u,  x' = x0 + eps sign(g),  both projected on the eps-ball and the image range,  g = grad CE(z(x0), y)

    u, of l_inf radius 1.25 eps, is one for all images, or one for each class, and steps along the images' gradients:

        m <- mean over the batch (class) of g / ||g||_1 + momentum_decay m,   u <- clamp(u + radius sign(m), +-radius)

    ||g||_1 is that of the whole batch. u begins as +-radius at random; a class that the batch has no image of keeps its
    u and m, and all keep theirs where a gradient is zero or not finite. Both are in ``state.memory``, [1 or classes, C,
    H, W]. The forward at x0 serves attack and loss: 7 passes. Published with label smoothing 0.4. In the
    published code the second backward adds the squared difference's gradient by x0 to g, in place, before m is updated;
    here it does not.
    """

    name: ClassVar[str] = "fgsm_uap"
    lengths: ClassVar[tuple[str, ...]] = ("step_size", "radius")

    per_class: bool = option(False, "one perturbation for each class (CUAP)")
    weight: float = option(10.0, "weight of the squared difference of logits", low=0)
    radius: float | None = option(None, "of the common perturbation, and its step; default: 1.25 eps", above=0)
    momentum_decay: float = option(0.3, "share of m that is left from the batch before", low=0)
    step_size: float | None = option(None, "step of the attack; default: eps", above=0)

    @property
    def one_label(self) -> str:
        return "fgsm_uap with per_class, which starts from the perturbation of a class" if self.per_class else ""

    @property
    def _radius(self) -> float:
        return 1.25 * self.eps if self.radius is None else self.radius

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        for name, most in (("perturbation", self._radius * (1 + 1e-3)), ("momentum", torch.inf)):  # 16 bits round
            kept = memory.get(name)
            if kept is None and memory:
                raise ValueError(f"memory has no {name}, which a step leaves with what it keeps")
            if kept is None:
                continue
            fits = kept.is_floating_point() and kept.shape[1:] == tuple(shape[1:]) and len(kept)
            if not (fits and (self.per_class or len(kept) == 1)):
                raise ValueError(
                    f"memory {name} is {kept.dtype} {list(kept.shape)}, expected floats of an image {list(shape[1:])} "
                    + ("for each class" if self.per_class else "alone")
                )
            if not bool((kept.isfinite() & (kept.abs() <= most)).all()):
                raise ValueError(f"memory {name} must hold finite numbers, a perturbation none beyond its radius")

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        if "perturbation" in state.memory:
            return
        count = classes_of(model, batch, key) if self.per_class else 1
        momentum = torch.zeros((count, *batch.x.shape[1:]), dtype=batch.x.dtype, device=batch.x.device)
        numbers = uniform(momentum, key, torch.arange(count, device=key.device), _FIRST)
        state.memory["perturbation"] = torch.full_like(momentum, self._radius).copysign(numbers)
        state.memory["momentum"] = momentum

    def start(self, batch: Batch, key: Tensor, state: State) -> tuple[Tensor, Any]:
        common = self.remembered(state, "perturbation")
        if self.per_class:
            common = common[class_indices("labels", batch.y, batch.x, len(common), of="the perturbations have")]
        return project(batch.x + common, batch.x, self.eps), None

    def adversary(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Tensor:
        all_rows = batch.deal.gathered(grad), batch.deal.gathered(batch.y)
        self._keep(*all_rows, *(self.remembered(state, name) for name in ("perturbation", "momentum")))
        return pgd_step(start, grad, batch.x, self.eps, self._step_size)

    @torch.no_grad()
    def _keep(self, grad: Tensor, y: Tensor, common: Tensor, momentum: Tensor) -> None:
        norm = grad.abs().sum()
        moves = (norm > 0) & norm.isfinite()
        if self.per_class:
            # One product adds up all classes in a fixed order, which index_add does not.
            members = y == torch.arange(len(common), device=y.device)[:, None]
            counts = members.sum(1).view(-1, 1, 1, 1)
            with torch.autocast(grad.device.type, enabled=False):
                mean = (members.to(grad.dtype) @ grad.flatten(1)).view_as(common) / counts
            moves = moves & (counts > 0)
        else:
            mean = grad.mean(0, keepdim=True)
        momentum.copy_(torch.where(moves, mean / norm + self.momentum_decay * momentum, momentum))
        moved = (common + self._radius * momentum.sign()).clamp(-self._radius, self._radius)
        common.copy_(torch.where(moves, moved, common))

    def combine(self, start_logits: Tensor, adv_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        weight, smoothing = self.weight / adv_logits.shape[1], self.label_smoothing
        loss = batch.over_labels(
            lambda y: consistency_loss(adv_logits, start_logits, y, weight=weight, label_smoothing=smoothing)
        )
        return loss, {"adv": accuracy(adv_logits, batch)}
