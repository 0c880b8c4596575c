"""What a training step costs in passes of the network: the unit in which the literature compares methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .data import Batch
from .descent import OptimizerDescent
from .evaluate import eval_mode
from .noise import noise_keys
from .remembered import set_apart
from .run import Run

_aten = torch.ops.aten


class Products(TorchDispatchMode):
    """Adds up the multiplications of samples with weights: convolutions (of any groups) and linear layers.

    What samples do among themselves, attention, is part of a pass and not counted: it has no weights, and its backward
    to the input is two products for each one of its forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # what inference_mode hands over whole, linear and conv2d, comes back in its parts
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        out = func(*args, **(kwargs or {}))
        if count := _COUNTS.get(func.overloadpacket):
            self.total += count(out, *args)
        return out


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *how: Any) -> int:
    return (x if how[4] else out).numel() * weight[0].numel()  # how[4]: transposed, from the small side to the large


def _convolution_backward(out: object, grad: Tensor, x: Tensor, weight: Tensor, *how: Any) -> int:
    to_input, to_weight, _ = how[-1]
    return (to_input + to_weight) * (x if how[4] else grad).numel() * weight[0].numel()


def _mm(out: Tensor, a: Tensor, b: Tensor) -> int:
    return out.numel() * a.shape[-1]


def _bmm(out: Tensor, a: Tensor, b: Tensor) -> int:
    shared = len(a) == 1 or 0 in (a.stride(0), b.stride(0))  # one factor for all samples: weights
    return _mm(out, a, b) if shared else 0


_COUNTS: dict[Any, Callable[..., int]] = {
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten.mm: _mm,
    _aten.addmm: lambda out, bias, a, b: _mm(out, a, b),
    _aten.bmm: _bmm,
    _aten.baddbmm: lambda out, bias, a, b: _bmm(out, a, b),
}


@contextmanager
def _unfused() -> Iterator[None]:
    """Transformer layers in eval mode run layer by layer, as they do in training, and not as one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def count_passes(model: nn.Module, x: Tensor, call: Callable[[], object]) -> float:
    """The work of ``call()`` in forwards of ``x``; NaN for a network without convolutions and linear layers.

    A forward is 1, a backward to the input 1, a backward to the weights 1 (a little less where nobody needs the first
    layer's input gradient); the backward of a backward counts as what it computes. Layers weigh as many multiplications
    as they make, and part of a batch counts as that part.
    """
    with _unfused():
        with Products() as forward, eval_mode(model), torch.no_grad():
            model(x)
        with Products() as counted:
            call()
    return counted.total / forward.total if forward.total else math.nan


class Copied(NamedTuple):
    """A training step of a run, on copies: calls of no argument, each with its share of the batches."""

    network: nn.Module
    batch: Batch
    steps: list[tuple[float, Callable[[], object]]]


@contextmanager
def step_on_copies(run: Run) -> Iterator[Copied | None]:
    """A training step (a batch) of the run as it stands, on copies of the network and of what the method remembers of
    the batch; None where the network cannot be copied.

    It updates nothing: the run goes on as if it had not been looked at. What a method does now and then,
    ``before_step``, is done before.
    """
    try:
        network = copy.deepcopy(run.model).train()
    except Exception:  # it holds a lock, say
        yield None
        return
    last = replace(run.state, step=max(run.step - 1, 0), epoch=max(run.epoch - 1, 0))
    last, batch = set_apart(run.method, last, Batch(*next(iter(run.batches))))  # of this process alone
    run.batches.close()
    key = noise_keys(run.config.seed, last.step, 1)[0].to(run.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), run.recomputed(network):
        descent = OptimizerDescent(torch.optim.SGD(network.parameters(), 0.0), lambda update: 0.0)
        run.method.before_step(network, batch, key, last)
        parts = run.method.parts(last)
        steps = [(share, partial(method.train_step, network, batch, key, last, descent)) for share, method in parts]
        yield Copied(network, batch, list(steps))


def passes_per_step(run: Run) -> float | None:
    """What a training step of the run costs as it stands, in forwards of the network on its batch.

    None where that cannot be counted (see ``count_passes``), or the network cannot be copied.
    """
    with step_on_copies(run) as made:
        if made is None:
            return None
        passes = sum(share * count_passes(made.network, made.batch.x, step) for share, step in made.steps)
    return None if math.isnan(passes) else passes
