"""What a training step costs in passes of the network: the unit in which the literature compares methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .evaluate import eval_mode
from .noise import noise_keys
from .run import Run


class Flops(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products and convolutions, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def count_passes(model: nn.Module, x: Tensor, call: Callable[[], object]) -> float:
    """The floating-point operations of ``call()`` in forwards of ``x``.

    A forward is 1, a backward to the input 1, a backward to the weights 1 (a little less where nobody needs the first
    layer's input gradient); the backward of a backward counts as what it computes.
    """
    with Flops() as forward, eval_mode(model), torch.no_grad():
        model(x)
    with Flops() as counted:
        call()
    return counted.total / forward.total


def passes_per_step(run: Run) -> float:
    """What a training step (a batch) of the run costs as it stands, in forwards of the network on that batch.

    The step is made on copies of the network and of the method's memory and updates nothing: the run goes on as if it
    had not been looked at.
    """
    network = copy.deepcopy(run.model).train()
    memory = {name: value.clone() for name, value in run.memory.items()}
    last = replace(run.state, step=max(run.step - 1, 0), epoch=max(run.epoch - 1, 0), memory=memory)
    batch = next(iter(run.batches))
    key = noise_keys(run.config.seed, last.step, 1)[0].to(run.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        step = _NoUpdates(network)
        with run.recomputed(network):
            return count_passes(network, batch.x, lambda: run.method.train_step(network, batch, key, last, step))


class _NoUpdates:
    """A ``Descent`` that takes gradients and leaves the weights where they are."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        loss.backward()

    def step(self) -> None:
        self._model.zero_grad(set_to_none=True)
