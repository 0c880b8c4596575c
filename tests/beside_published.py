"""Our methods beside the published algorithms: the same weights, batch and starting noise, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import noise_key, random_start
from atlas_train.methods import Batch, Method, Metrics, State

EPS = 0.1
CLASSES = 5


class Net(nn.Module):
    """Two convolutions with BatchNorm and ReLU; ``features`` and ``head`` apart, the first layer a bare convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 9, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x))).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass
class Case:
    """What both sides start from."""

    model: Net
    batch: Batch
    key: Tensor

    def start(self, radius: float = EPS) -> Tensor:
        """The uniform start of PGD, clipped to [0, 1]."""
        return random_start(self.batch.x, radius, key=self.key, ids=self.batch.ids)


def case(size: int = 8, seed: int = 0) -> Case:
    """A network whose running statistics differ from its batch statistics, and images some of which are at 0 and 1."""
    torch.manual_seed(seed)
    model = Net().double()
    for bn in (model.bn1, model.bn2):
        nn.init.uniform_(bn.weight, 0.5, 2.0)
        nn.init.normal_(bn.bias, std=0.3)
        bn.running_mean.normal_(std=0.2)
        bn.running_var.uniform_(0.5, 2.0)
    x = (torch.rand(size, 3, 6, 6, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return Case(model, Batch(x, torch.randint(CLASSES, (size,)), torch.randperm(100)[:size]), noise_key())


@dataclass
class Steps:
    """Stands in for the engine (as ``Descent``) or for an optimiser: plain SGD that keeps what it was given."""

    model: nn.Module
    lr: float = 0.05
    grads: list[list[Tensor]] = field(default_factory=list)

    def backward(self, loss: Tensor, metrics: Metrics | None = None) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        self.grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()])
        for p, grad in zip(self.model.parameters(), self.grads[-1], strict=True):
            p -= self.lr * grad
        self.zero_grad()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)


@dataclass
class Outcome:
    """What a training step came to; ``images``: every batch that a train-mode forward with gradients to weights saw."""

    loss: Tensor
    grads: list[list[Tensor]]
    model: nn.Module
    images: list[Tensor]


def ours(method: Method, case: Case, state: State | None = None) -> Outcome:
    """One step of the method on a copy of the case."""
    model = copy.deepcopy(case.model).train()
    steps, images = Steps(model), []
    model.register_forward_pre_hook(lambda module, args: _note(images, module, args[0]))
    loss, _ = method.step(model, case.batch, case.key, state or State(), steps)
    return Outcome(loss, steps.grads, model, images)


def theirs(algorithm: Callable[..., Any], case: Case, start: Tensor | None, **how: Any) -> Outcome:
    """One step of a published algorithm, ``algorithm(model, x, y, start, optimizer, **how)`` -> (x', loss)."""
    model = copy.deepcopy(case.model).train()
    steps, images = Steps(model), []
    model.register_forward_pre_hook(lambda module, args: _note(images, module, args[0]))
    _, loss = algorithm(model, case.batch.x, case.batch.y, start, steps, **how)
    return Outcome(loss, steps.grads, model, images)


def _note(images: list[Tensor], model: nn.Module, x: Tensor) -> None:
    trainable = next(model.parameters()).requires_grad and torch.is_grad_enabled()
    if model.training and trainable and not x.requires_grad:
        images.append(x.detach().clone())


def assert_same(mine: Outcome, published: Outcome, *, statistics: bool, tolerance: float = 1e-9) -> None:
    """Loss, every gradient of every update and the weights; with ``statistics`` the buffers of BatchNorm too."""
    close(mine.loss, published.loss, "loss", tolerance)
    assert len(mine.grads) == len(published.grads) >= 1
    names = [name for name, _ in mine.model.named_parameters()]
    for number, (a, b) in enumerate(zip(mine.grads, published.grads, strict=True)):
        assert any(t.abs().max() > 0 for t in b)
        for name, left, right in zip(names, a, b, strict=True):
            close(left, right, f"gradient {number} of {name}", tolerance)
    for (name, left), right in zip(mine.model.named_buffers(), published.model.buffers(), strict=True):
        if statistics:
            close(left, right, name, tolerance)


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Relative to the largest entry; gradients that are zero but for rounding count as zero."""
    error, size = float((a - b).abs().max()), float(b.abs().max())
    assert error <= tolerance * max(size, 1e-4), f"{what}: off by {error:.3g} of {size:.3g}"
