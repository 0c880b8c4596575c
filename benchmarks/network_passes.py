"""A network's passes and nothing else: constant images, constant cotangents, no loss, no attack step, no update.

A training step is described as a list of passes (``steps.py`` has one for each method), and ``Bare`` runs such a list
in the dtype, layout and modes of the step itself. What a step takes beyond that is not the network's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atlas_kernels.attacks.cast_weights import cast_once
from atlas_kernels.double_backward import FastDoubleBackward
from harness import synchronise


@dataclass(frozen=True)
class Attack:
    """Forwards, each with a backward to the input alone; the weights are frozen, and cast once. rows: of the batch,
    default all."""

    steps: int
    mode: str = "train"
    rows: int | None = None


@dataclass(frozen=True)
class Look:
    """Forwards without gradients, in an attack."""

    count: int
    mode: str
    rows: int | None = None


@dataclass(frozen=True)
class Forward:
    """A forward that is trained on: ``wide`` batches side by side; ``slopes`` gradients at the input, each with a graph
    to the weights; to_input: the backward also goes to the input; kept: an attack takes a gradient of it to the input
    alone, before the next one."""

    wide: int = 1
    mode: str = "train"
    slopes: int = 0
    to_input: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Learn:
    """Forwards, and one backward from all that they gave to the weights."""

    forwards: tuple[Forward, ...] = (Forward(),)


@dataclass(frozen=True)
class FirstLayer:
    """The first layer alone: a forward, and a backward to its weights."""


Pass = Attack | Look | Learn | FirstLayer


@dataclass(eq=False)
class Bare:
    """Runs passes of ``model`` on the images ``x`` [B, ...], under bfloat16 autocast if ``bf16``.

    cache: whether autocast keeps its cast weights, as it does in eager steps. A compiled model is run as compiled, but
    for what needs double backward.
    """

    model: nn.Module
    x: Tensor
    bf16: bool = False
    cache: bool = True
    _constants: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False)

    def run(self, passes: Sequence[Pass]) -> None:
        run = {Attack: self._attack, Look: self._look, Learn: self._learn, FirstLayer: self._first_layer}
        for one in passes:
            run[type(one)](one)  # type: ignore[operator]

    def one_pass(self) -> tuple[float, float]:
        """Seconds of a forward with a graph to the input, and of the backward to it; in eval mode, weights frozen."""
        self.model.eval().requires_grad_(False)
        with self._autocast():
            leaf = self.x.detach().requires_grad_()
            cotangent = self._cotangent(self.model(self.x))
            times = [self._now()]
            z = self.model(leaf)
            times.append(self._now())
            torch.autograd.grad(z, leaf, cotangent)
            times.append(self._now())
        self.model.requires_grad_(True)
        return times[1] - times[0], times[2] - times[1]

    def _attack(self, attack: Attack) -> None:
        with self._attacked(attack.mode):
            for _ in range(attack.steps):
                leaf = self.x[: attack.rows].detach().requires_grad_()
                z = self.model(leaf)
                torch.autograd.grad(z, leaf, self._cotangent(z))

    def _look(self, look: Look) -> None:
        with self._attacked(look.mode), torch.no_grad():
            for _ in range(look.count):
                self.model(self.x[: look.rows])

    @contextmanager
    def _attacked(self, mode: str) -> Iterator[None]:
        """As attacks run the network: frozen, its weights cast once."""
        self.model.train(mode == "train").requires_grad_(False)
        with self._autocast(), cast_once(self.model, self.x.device.type):
            yield
        self.model.requires_grad_(True)

    def _learn(self, learn: Learn) -> None:
        outputs: list[Tensor] = []
        inputs: list[Tensor] = list(self.model.parameters())
        with self._autocast():
            for forward in learn.forwards:
                leaf = self._side_by_side(forward.wide).detach()
                kept = forward.kept and self._eager is self.model
                if forward.kept and not kept:
                    self._attack(Attack(1, forward.mode))  # of compiled code the step keeps none either
                if forward.to_input or forward.slopes or kept:
                    inputs.append(leaf.requires_grad_())
                model = self._eager if forward.slopes else self.model
                with FastDoubleBackward() if forward.slopes else nullcontext():
                    z = model.train(forward.mode == "train")(leaf)
                outputs.append(z)
                if kept:
                    torch.autograd.grad(z, leaf, self._cotangent(z), retain_graph=True)
                for _ in range(forward.slopes):
                    outputs += torch.autograd.grad(z, leaf, self._cotangent(z), create_graph=True)
        torch.autograd.grad(outputs, inputs, [self._cotangent(o) for o in outputs], allow_unused=True)

    def _first_layer(self, _: FirstLayer) -> None:
        layer = first_layer(self._eager)
        with self._autocast():
            h = layer(normalised(self._eager, self.x))
        torch.autograd.grad(h, list(layer.parameters()), self._cotangent(h))

    @property
    def _eager(self) -> nn.Module:
        return getattr(self.model, "_orig_mod", self.model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=self.cache)

    def _side_by_side(self, wide: int) -> Tensor:
        if wide == 1:
            return self.x
        if wide not in self._constants:
            self._constants[wide] = torch.cat([self.x] * wide)
        return self._constants[wide]

    def _cotangent(self, output: Tensor) -> Tensor:
        what = output.shape, output.dtype
        if what not in self._constants:
            self._constants[what] = torch.randn_like(output) / len(output)
        return self._constants[what]

    def _now(self) -> float:
        synchronise(self.x.device)
        return time.perf_counter()


def first_layer(model: nn.Module) -> nn.Module:
    """The convolution that was registered first."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def normalised(model: nn.Module, x: Tensor) -> Tensor:
    """What the first layer of one of the trainer's networks is given for images x."""
    normalize = model.normalize
    return x if normalize is None else normalize(x)  # type: ignore[operator, no-any-return]
