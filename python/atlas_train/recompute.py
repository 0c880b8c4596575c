"""Activations that the backward computes again, block by block (checkpointing; Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from atlas_kernels.attacks.held import put_back
from atlas_kernels.double_backward import FastDoubleBackward

#: What is computed again as one: a module, and the name of its method.
Block = tuple[nn.Module, str]


def blocks(model: nn.Module) -> list[Block]:
    """The methods that the network names in ``stages``; without those, every child of an nn.Sequential or nn.ModuleList
    that has parameters and layers of its own, the innermost such.

    A layer alone is no block: it keeps no more than its input. Raises ValueError where nothing is found.
    """
    if stages := getattr(model, "stages", ()):
        return [(model, name) for name in stages]
    rows = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    parts = [child for row in rows for child in row if any(child.children()) and any(True for _ in child.parameters())]
    inner = [child for child in parts if not any(other is not child and other in parts for other in child.modules())]
    if not inner:
        raise ValueError(
            f"checkpoint_activations: {type(model).__name__} has no blocks; put modules of several layers each into an "
            "nn.Sequential or nn.ModuleList, or name methods of the network, each several layers, in an attribute "
            '"stages"; or set checkpoint_activations=False'
        )
    return [(module, "forward") for module in dict.fromkeys(inner)]


class Recomputed:
    """Inside this context training forwards of the network keep the input of each block alone.

    Gradients are those without, dropout and double backward included, and running statistics move once. A forward that
    is to train is one that records a graph to a weight: attacks freeze the weights, so they keep everything and take no
    pass more. Leave the context after the backward at the earliest: what a forward sees of it, its backward needs too.

    Raises ValueError for a network without ``blocks``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = blocks(model)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [vars(module).get(name) for module, name in self._blocks]
        for module, name in self._blocks:
            vars(module)[name] = partial(self._run, module, getattr(module, name))

    def __exit__(self, *_: object) -> None:
        for (module, name), before in zip(self._blocks, self._before, strict=True):
            del vars(module)[name]
            if before is not None:
                vars(module)[name] = before

    def _run(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights)):
            return call(*args, **kwargs)
        return checkpoint(
            call, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsBefore(module)), **kwargs
        )


_ATTENTION = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


class _AsBefore:
    """For a block's second run: modes, attention kernels and derivatives of its first one, and copies of its buffers.
    Entered once per backward."""

    def __init__(self, block: nn.Module) -> None:
        self._kernels = [kernel for kernel, enabled in _ATTENTION.items() if enabled()]
        self._derivatives = FastDoubleBackward() if FastDoubleBackward.is_entered() else nullcontext()
        self._block, self._modes = block, {module: module.training for module in block.modules()}

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(sdpa_kernel(self._kernels))
        self._stack.enter_context(self._derivatives)
        self._stack.enter_context(put_back(self._block, self._modes, copy_buffers=True))

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
