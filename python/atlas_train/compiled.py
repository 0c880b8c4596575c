"""A network that ``torch.compile`` compiles."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .methods import Method

#: Most graphs of one network: there is one for each mode, precision, batch size and kind of gradient. Torch by itself
#: stops at 8, and runs what follows uncompiled.
LIMIT = 64


def compiled_network(model: nn.Module, method: Method) -> nn.Module:
    """``model`` as ``method`` is given it: compiled at its first use for each mode, precision and kind of gradient.

    Each batch size has code of its own, which is the fastest; a method that takes samples out of its batches has code
    for any size from the second one on.
    """
    return cast(nn.Module, torch.compile(model, dynamic=None if method.sizes_vary else False))


def require_compilable(method: Method | type[Method]) -> None:
    """Raises ValueError for a method that compiled code cannot serve."""
    if method.no_compile:
        raise ValueError(f"compile=True cannot be had with {method.no_compile}: set compile=False")


def graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
