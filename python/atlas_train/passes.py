"""What a training step costs in passes of the network: the unit in which the literature compares methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .evaluate import eval_mode


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
