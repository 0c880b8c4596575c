"""LIET: one-step training from the noise of the label, part of it made random, with the start in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from atlas_kernels import consistency_loss, label_noise_start, pgd_step
from atlas_kernels.attacks import attacking
from atlas_kernels.attacks.float16 import pull_back
from atlas_kernels.outputs import logits_of

from ..data import Batch, UpTo
from ..noise import uniform
from ..options import option
from .base import Method, Metrics, State
from .kept import Given, KeptForward
from .terms import NO_BALL, accuracy, classes_of, uncompiled, wide

#: Draws of the random labels, of which the start has none: for the label noise, the attack and the loss.
_OF_NOISE, _OF_ATTACK, _OF_LOSS = 1, 2, 3
_SMALL = 8 / 255  # up to this radius the published settings are others than above it


@dataclass(frozen=True)
class LIET(KeptForward):
    """Label information elimination (LIET, ICCV 2025; the authors' code, and FastAT Benchmark's, arXiv 2604.22853):

        L = CE(z(x'), t) + w JS(p(x0), p(x')),   w = weight (epoch + 1) / epochs, gradient to both p

    JS is the Jensen-Shannon divergence of a sample, p = softmax(z). x' is a step along sign(grad CE(z(x0), t)) from x0,
    projected on the ball for eps up to 8/255 and clipped to the image range. The forward at x0 serves attack and loss:
    7 passes.

        x0 = clip(x +- n),  n: of a share r of the pixels uniform noise, else the noise of the label, N_y
        N_c = eps sign(grad CE(z(g), t)) at a gray image g of 0.5, in eval mode, for each class; see ``every``

    r and the sign are drawn once a batch, on the device, r between ``share_low`` and ``share_high``. t has 1 - s for
    the label and spreads s over the other classes by random numbers, drawn anew for the loss, the attack and the noise
    of the labels, which is kept in ``state.memory``, [classes, C, H, W].

    Published: weight 100, s 0.6 (CIFAR-100: 200 and 0.8), r in [0.1, 0.5], uniform noise of eps; above 8/255 weight 20,
    s 0.4, r in [0, 1], noise of 2 eps, no projection. They are the defaults.
    """

    name: ClassVar[str] = "liet"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10": {"every": UpTo(_SMALL, 20, 10)},
        "cifar100": {"weight": UpTo(_SMALL, 200.0, 20.0), "smoothing": UpTo(_SMALL, 0.8, 0.4)},
    }

    weight: float | None = option(
        None, "weight of JS in the last epoch, to which it grows evenly; default: 100, above eps = 8/255 20", low=0
    )
    smoothing: float | None = option(
        None,
        "label smoothing of liet, used instead of label_smoothing: s is spread over the wrong classes by random "
        "numbers; 0: label_smoothing is used, as in other methods. Default: 0.6, above eps = 8/255 0.4",
        low=0,
        below=1,
    )
    share_low: float | None = option(
        None, "smallest share of the pixels with uniform noise; default: 0.1, above eps = 8/255 0", low=0, high=1
    )
    share_high: float | None = option(
        None, "largest share of the pixels with uniform noise; default: 0.5, above eps = 8/255 1", low=0, high=1
    )
    noise_magnitude: float | None = option(
        None, "radius of the uniform noise, in eps; default: 1, above eps = 8/255 2", low=0
    )
    step_size: float | None = option(None, "step of the attack; default: eps", above=0)
    project: Literal["small", "yes", "no"] = option(
        "small", "whether x' is projected on the ball of x; small: for eps up to 8/255, as published"
    )
    every: int = option(
        20,
        "the noise of the labels is computed anew in the first batch of an epoch, and then every so many. For CIFAR-10 "
        "at 8/255 FastAT Benchmark's file has 20, the authors' 10",
        low=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._share_low > self._share_high:
            raise ValueError(
                f"liet: share_low is {self._share_low:g} and share_high {self._share_high:g}: give a low one that is "
                "not above the high one"
            )

    def without_effect(self) -> dict[str, str]:
        own = {"label_smoothing": f"liet has a smoothing of its own, {self._smoothing:g}"} if self._smoothing else {}
        return super().without_effect() | own

    @property
    def one_label(self) -> str:
        return "liet, which starts from the noise of an image's label"

    def _by_radius(self, small: float, large: float) -> float:
        return small if self.eps <= _SMALL * (1 + 1e-6) else large

    @property
    def _weight(self) -> float:
        return self._by_radius(100.0, 20.0) if self.weight is None else self.weight

    @property
    def _smoothing(self) -> float:
        return self._by_radius(0.6, 0.4) if self.smoothing is None else self.smoothing

    @property
    def _share_low(self) -> float:
        return self._by_radius(0.1, 0.0) if self.share_low is None else self.share_low

    @property
    def _share_high(self) -> float:
        return self._by_radius(0.5, 1.0) if self.share_high is None else self.share_high

    @property
    def _noise_magnitude(self) -> float:
        return self._by_radius(1.0, 2.0) if self.noise_magnitude is None else self.noise_magnitude

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    @property
    def _ball(self) -> float:
        projects = self._by_radius(1, 0) if self.project == "small" else self.project == "yes"
        return self.eps if projects else NO_BALL

    def scaled(self, share: float) -> Method:
        """The settings stay those of the whole radius."""
        fixed = self.in_use() | {"project": "no" if self._ball == NO_BALL else "yes", "step_size": self.step_size}
        return Method.scaled(replace(self, **fixed), share)

    def changing(self, state: State) -> tuple[float, ...]:
        return (self._weight * (state.epoch + 1) / state.epochs,)

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        noise = memory.get("label_noise")
        if noise is None:
            return
        if not (noise.is_floating_point() and noise.shape[1:] == tuple(shape[1:])):
            raise ValueError(
                f"memory label_noise is {noise.dtype} {list(noise.shape)}, expected floats of an image "
                f"{list(shape[1:])} for each class"
            )
        if not bool((noise.abs() <= self.eps * (1 + 1e-3)).all()):  # 16 bits round
            raise ValueError("memory label_noise must be perturbations within eps")

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        noise, agreed = state.memory.get("label_noise"), batch.deal.agreed  # a sign can be another on another GPU
        batches = max(state.total_steps // state.epochs, 1)
        if noise is None:
            made = self._label_noise(model, batch, key, classes_of(model, batch, key))
            state.memory["label_noise"] = agreed(made)
        elif state.step % batches % self.every == 0:
            noise.copy_(agreed(self._label_noise(model, batch, key, len(noise))))

    def _label_noise(self, model: nn.Module, batch: Batch, key: Tensor, classes: int) -> Tensor:
        """As many gray images at once as a batch has images."""
        model, noise = uncompiled(model), []  # compiled code would be made for these batches too
        for labels in torch.arange(classes, device=batch.x.device).split(len(batch.x)):
            gray = torch.full_like(batch.x[: len(labels)], 0.5)
            with attacking(model, "eval", key):
                logits = logits_of(model(gray.requires_grad_()))
                if (known := logits.shape[1]) != classes:
                    raise ValueError(f"liet: memory label_noise is of {classes} classes, the network of {known}")
                cotangent = self._cotangent(wide(logits.detach()), labels, key, labels, _OF_NOISE)
                noise.append(self.eps * pull_back(model, logits, gray, cotangent).sign())
        return torch.cat(noise)

    def start(self, batch: Batch, key: Tensor, state: State) -> tuple[Tensor, Any]:
        start = label_noise_start(
            batch.x, batch.y, self.remembered(state, "label_noise"), self._noise_magnitude * self.eps,
            share=(self._share_low, self._share_high), key=key, ids=batch.ids,
        )  # fmt: skip
        return start, None

    def cotangent(self, logits: Tensor, batch: Batch, key: Tensor) -> Tensor:
        return self._cotangent(logits, batch.y, key, batch.ids, _OF_ATTACK)

    def adversary(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Tensor:
        return pgd_step(start, grad, batch.x, self._ball, self._step_size)

    def combine(self, start_logits: Tensor, adv_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        targets = self._targets(wide(adv_logits.detach()), batch.y, given.key, batch.ids, _OF_LOSS)
        loss = consistency_loss(adv_logits, start_logits, targets, distance="js", weight=given.numbers[0])
        return loss, {"adv": accuracy(adv_logits, batch)}

    def _cotangent(self, logits: Tensor, y: Tensor, key: Tensor, ids: Tensor, draw: int) -> Tensor:
        """d CE / d logits [B, C], of the sum over the batch."""
        return logits.softmax(1) - self._targets(logits, y, key, ids, draw)

    def _targets(self, logits: Tensor, y: Tensor, key: Tensor, ids: Tensor, draw: int) -> Tensor:
        """1 - s for the label, and s spread over the other classes by numbers uniform in (0, 1)."""
        if not self._smoothing:
            rest = self.label_smoothing / logits.shape[1]
            return torch.full_like(logits, rest).scatter(1, y[:, None], 1 - self.label_smoothing + rest)
        numbers = uniform(logits, key, ids, draw) + (1 + 2.0**-24)
        spread = numbers.scatter(1, y[:, None], 0.0)
        spread = spread * (self._smoothing / spread.sum(1, keepdim=True))
        return spread.scatter(1, y[:, None], 1 - self._smoothing)
