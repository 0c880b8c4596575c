"""Weights cast once for all passes of an attack, to the 16 bits of autocast.

Autocast keeps 16-bit copies of trainable weights only, so the frozen weights of an attack would be cast in every pass.
Parameters stay in place and are not written to: a layer's ``forward`` is exchanged, for the time of an attack. Whenever
a call is not the one prepared for (other weights, weights that need a gradient, another autocast, a trace of
torch.compile), the layer computes as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import at_the_end

#: Whose plain forward is known: exact types, since a subclass may do more.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@contextmanager
def cast_once(model: Callable[[Tensor], Any], device_type: str) -> Iterator[None]:
    """Inside, the layers of ``model``, whose weights are frozen, run with weights that are cast already.

    A function's layers are unknown, compiled code would be compiled anew, and an attack within an attack finds the
    layers cast: these run as they are.
    """
    cast: list[_Cast] = []
    with at_the_end(partial(_remove, cast)):
        if isinstance(model, nn.Module) and _autocast_dtype(device_type) is not None:
            modules = list(model.modules())
            if not any(map(_is_compiled, modules)):
                cast += [_Cast(module, dtype) for module in modules if (dtype := _other_dtype(module)) is not None]
        for layer in cast:
            vars(layer.layer)["forward"] = layer.run
        yield


def _remove(cast: list[_Cast]) -> None:
    for layer in cast:
        vars(layer.layer).pop("forward", None)


class _Cast:
    """A convolution or linear layer, and the weights to run it with."""

    @torch.no_grad()
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer, weight, bias = layer, layer.weight, layer.bias
        self._device, self._autocast = weight.device.type, _autocast_dtype(weight.device.type)
        self._sources = [(name, t, _version(t)) for name, t in layer._parameters.items()]
        # New memory in every attack, which in a CUDA graph is the graph's own; of the layout that the weights have.
        self._weight = torch.empty_like(weight, dtype=dtype).copy_(weight)
        self._bias = None if bias is None else torch.empty_like(bias, dtype=dtype).copy_(bias)

    def run(self, input: Tensor) -> Tensor:
        """The layer's ``forward``."""
        layer = self.layer
        out: Tensor
        if not self._is_as_prepared():
            out = type(layer).forward(layer, input)
        elif type(layer) is nn.Linear:
            out = F.linear(input, self._weight, self._bias)
        else:
            out = layer._conv_forward(input, self._weight, self._bias)
        return out

    def _is_as_prepared(self) -> bool:
        """Whether this call is the one prepared for."""
        if torch.compiler.is_compiling() or _autocast_dtype(self._device) != self._autocast:
            return False
        own = self.layer._parameters
        return all(
            own.get(name) is t and _version(t) == version and not (t is not None and t.requires_grad)
            for name, t, version in self._sources
        )


def _other_dtype(module: nn.Module) -> torch.dtype | None:
    """What autocast would cast the weights of a layer to, that computes what its type says from its own parameters;
    None where it would not, or where the layer is another."""
    # Weight norm and pruning make the weight an attribute; parametrizations change the type, sharding the weight's.
    if type(module) not in LAYERS or "forward" in vars(module) or module._forward_pre_hooks:
        return None
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dtype == torch.float64:
        return None
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(t is not None and t.is_inference() for t in tensors):  # whose writes leave no mark
        return None
    dtype = _autocast_dtype(weight.device.type)
    return None if dtype == weight.dtype else dtype


def _is_compiled(module: nn.Module) -> bool:
    """Whether what runs is not, or not only, the Python of the module itself."""
    if isinstance(module, nn.DataParallel | torch.jit.ScriptModule):
        return True
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version
