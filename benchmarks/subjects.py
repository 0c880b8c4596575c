"""What benchmarks of whole attacks and training steps measure: networks, batches, bare passes, attacks, steps."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import PGD, Execution, attack_cotangent, noise_key, pgd_step, random_start
from atlas_kernels.capture import CaptureFailed
from atlas_train import data, methods, models
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import Batch, Method, State
from atlas_train.step_graph import StepGraph
from harness import Call, seconds
from network_passes import Bare, Pass

EPS = 8 / 255
SHORTEST = 0.02  # seconds of a measurement


@dataclass(frozen=True)
class Setting:
    """A network, what it is given and how it is run.

    attack_precision: of the attack alone. cuda_graphs: of attacks, step_graphs: of training steps. threads: of the CPU.
    """

    network: str = "preact_resnet18"
    width: int | None = None
    batch: int = 64
    image: int = 32
    classes: int = 10
    precision: str = "fp32"
    attack_precision: str = "keep"
    channels_last: bool = True
    cuda_graphs: bool = False
    step_graphs: bool = False
    compile: bool = False
    threads: int = 1
    device: str = "cpu"

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def network_of(s: Setting, use: str = "") -> nn.Module:
    """Untrained, in train mode; the same object for the same setting and use."""
    return _network(replace(s, batch=1, image=1, threads=1, precision="fp32", attack_precision="keep"), use)


@cache
def _network(s: Setting, use: str) -> nn.Module:
    torch.manual_seed(0)
    cifar10, channels = data.get("cifar10"), _channels(s)
    normalize = (cifar10.mean, cifar10.std) if channels == 3 else None
    model = models.build(s.network, num_classes=s.classes, in_channels=channels, width=s.width, normalize=normalize)
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():
            nn.init.kaiming_uniform_(weight)  # SmallCNN's last layer starts from zero, which has no gradient
    model = model.to(s.device).to(memory_format=s.layout)  # type: ignore[call-overload]
    return torch.compile(model, dynamic=False) if s.compile else model  # type: ignore[return-value]


def batch_of(s: Setting) -> Batch:
    """Random images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(s.batch, _channels(s), s.image, s.image, generator=generator).to(s.device)
    y = torch.randint(s.classes, (s.batch,), generator=generator).to(s.device)
    return Batch(x.contiguous(memory_format=s.layout), y, torch.arange(s.batch, device=s.device))


def _channels(s: Setting) -> int:
    return 1 if s.network == "small_cnn" else 3


def _execution(s: Setting) -> Execution:
    return Execution(s.attack_precision, cuda_graphs=s.cuda_graphs)


def bare_passes(s: Setting, passes: Sequence[Pass]) -> Call:
    """Passes of the network and nothing else, on a network of their own: they set its modes."""
    bare = Bare(network_of(s, "bare"), batch_of(s).x, s.precision == "bf16")
    return lambda: bare.run(passes)


def attack(s: Setting, steps: int) -> Call:
    """PGD in eval mode, as a user runs it."""
    model, batch = network_of(s), batch_of(s)
    pgd, execution = PGD(EPS, steps=steps), _execution(s)

    def run() -> Tensor:
        with execution, s.autocast():
            return pgd(model, batch.x, batch.y)

    return run


def attack_operators(s: Setting, steps: int) -> Call:
    """The operators of that attack, without the network."""
    batch, key = batch_of(s), noise_key(s.device)
    logits = torch.randn(s.batch, s.classes, device=s.device)
    logits = logits.bfloat16() if s.precision == "bf16" else logits
    size = PGD(EPS, steps=steps).effective_step_size

    def run() -> None:
        adv = random_start(batch.x, EPS, key=key)
        for _ in range(steps):
            attack_cotangent(logits, batch.y)
            adv = pgd_step(adv, batch.x, batch.x, EPS, size)

    return run


class Update:
    """A method's ``Descent``, and a published loop's optimiser: SGD as the trainer has it, its rate zero so that every
    step costs what the first one does."""

    def __init__(self, model: nn.Module) -> None:
        self._sgd = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, weight_decay=5e-4)
        self._device = next(model.parameters()).device.type

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        with torch.autocast(self._device, enabled=False):
            loss.backward()

    def step(self) -> None:
        self._sgd.step()
        self.zero_grad()
        torch.clear_autocast_cache()

    def zero_grad(self) -> None:
        self._sgd.zero_grad(set_to_none=True)


def training_step(s: Setting, method: str, **hyper: Any) -> Call:
    """One batch of a training method, as the trainer runs it."""
    model, batch, key = network_of(s), batch_of(s), noise_key(s.device)
    made, state = methods.build(method, EPS, hyper), State(size=len(batch.y))
    if s.step_graphs:
        return _in_graphs(s, made, model, batch, key, state)
    update, execution = Update(model), _execution(s)

    def run() -> None:
        with execution, s.autocast():
            made.step(model, batch, key, state, update)

    return run


def _in_graphs(s: Setting, made: Method, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Call:
    sgd = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    graph, execution = StepGraph(made, sgd, _no_graph), Execution(s.attack_precision)

    def run() -> None:
        with execution, s.autocast():
            graph(model, batch, key, state, OptimizerDescent(sgd, lambda update: 0.0))

    return run


def _no_graph(reason: str) -> None:
    raise CaptureFailed(reason)


def matrix_product(s: Setting) -> tuple[Call, float]:
    """A large square product in the setting's precision, and its floating-point operations."""
    side = 8192 if s.device == "cuda" else 2048
    a = torch.randn(side, side, device=s.device).to(torch.bfloat16 if s.precision == "bf16" else torch.float32)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2.0 * side**3


@dataclass(frozen=True)
class Timed:
    """Seconds of a call, over the rounds."""

    median: float
    low: float
    high: float


def in_turn(
    calls: Mapping[Any, tuple[Call, int]], rounds: int, device: str, shortest: float = 0.02
) -> Iterator[dict[Any, Timed]]:
    """Times every call (with its number of CPU threads) once a round, each round in an order of its own, so that a
    machine that drifts makes spread and no trend; gives what is known after each round. Calls shorter than ``shortest``
    seconds are repeated."""
    before, samples = torch.get_num_threads(), {name: [] for name in calls}  # type: ignore[var-annotated]
    repeats = dict.fromkeys(calls, 1)
    for number in range(-1, rounds):
        order = random.Random(number).sample(list(calls), len(calls))
        for name in sorted(order, key=lambda name: calls[name][1]):
            call, threads = calls[name]
            torch.set_num_threads(threads)
            if number < 0 or repeats[name] > 1:
                call()  # what comes first pays for what another call has left in the caches
            taken = seconds(partial(_repeat, call, repeats[name]), torch.device(device)) / repeats[name]
            if number < 0:
                repeats[name] = max(1, round(SHORTEST / taken))
            else:
                samples[name].append(taken)
        torch.set_num_threads(before)
        if number >= 0:
            yield {name: Timed(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()
