"""Weights cast once for all passes of an attack, to the 16 bits of autocast.

Autocast keeps 16-bit copies of trainable weights only, so the frozen weights of an attack would be cast in every pass.
Parameters stay in place and are not written to: a layer's ``forward`` is exchanged, for the time of an attack. Whenever
a call is not the one prepared for (other weights, weights that need a gradient, another autocast, a copy of the layer),
the layer computes as it is.

``torch.compile`` traces the exchanged forward into its code for attacks. What that reads lies where it lay in the last
attack, so nothing is compiled again. Such code sees weights that are written to within an attack only in the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import at_the_end

#: Whose plain forward is known: exact types, since a subclass may do more.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NEVER = "no dtype of autocast"


@contextmanager
def cast_once(model: Callable[[Tensor], Any], device_type: str) -> Iterator[None]:
    """Inside, the layers of ``model``, whose weights are frozen, run with weights that are cast already.

    A function's layers are unknown, those of scripts and of networks that are compiled in part are no Python, and an
    attack within an attack finds the layers cast: these run as they are.
    """
    cast: list[_Cast] = []
    with at_the_end(partial(_remove, cast)):
        if isinstance(model, nn.Module) and _autocast_dtype(device_type) is not None:
            modules = list(model.modules())
            whole = modules[1:] if "_orig_mod" in model._modules else modules
            if not any(map(is_compiled, whole)):
                kept = {} if whole is modules else _KEPT.setdefault(model, {})
                cast += [_cast(module, dtype, kept) for module in whole if (dtype := _other_dtype(module)) is not None]
                _fill(cast)
        for layer in cast:
            vars(layer.layer)["forward"] = layer.forward
        yield


def _remove(cast: list[_Cast]) -> None:
    for layer in cast:
        vars(layer.layer).pop("forward", None)


class _Cast:
    """A convolution or linear layer, and the weights to run it with."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer, self._device, self.forward = layer, layer.weight.device.type, partial(_run, self)
        self._autocast: torch.dtype | str = dtype
        self.sources: dict[str, Tensor | None] = dict(layer._parameters)
        self.versions: dict[str, int | None] = {}
        self._kinds = self._kinds_now()
        # New memory, in a CUDA graph the graph's own (that of compiled networks is kept); in the layout of the weights.
        weight, bias = layer.weight, layer.bias
        self.weight = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self.bias = None if bias is None else torch.empty_like(bias, dtype=dtype, requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cast:
        """That of a copied network, whose weights go ways of their own."""
        made = copy(self)
        made.layer, made._autocast, made.forward = deepcopy(self.layer, memo), _NEVER, partial(_run, made)
        return made

    def _kinds_now(self) -> list[Any]:
        return [(name, t if t is None else (t.shape, t.stride(), t.device)) for name, t in self.sources.items()]

    def fits(self) -> bool:
        """Takes the weights that the layer has now, and says whether they are of the same kind."""
        self.sources = dict(self.layer._parameters)
        return self._kinds_now() == self._kinds

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What is cast, and what it is cast to."""
        pairs = ((self.layer.weight, self.weight), (self.layer.bias, self.bias))
        return [(t, low) for t, low in pairs if low is not None]

    def is_as_prepared(self) -> bool:
        """Whether this call is the one prepared for."""
        own, traced = self.layer._parameters, torch.compiler.is_compiling()
        return _autocast_dtype(self._device) == self._autocast and all(
            own.get(name) is t
            and not (t is not None and t.requires_grad)
            and (traced or _version(t) == self.versions[name])
            for name, t in self.sources.items()
        )


def _run(cast: _Cast, input: Tensor) -> Tensor:
    """The layer's ``forward``."""
    layer = cast.layer
    out: Tensor
    if not cast.is_as_prepared():
        out = type(layer).forward(layer, input)
    elif type(layer) is nn.Linear:
        out = F.linear(input, cast.weight, cast.bias)
    else:
        out = layer._conv_forward(input, cast.weight, cast.bias)
    return out


_Kept = dict[tuple[nn.Module, torch.dtype], _Cast]
#: By compiled network, what its layers are run with. CUDA graphs of attacks write there, so it lasts as long as these.
_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _cast(layer: nn.Module, dtype: torch.dtype, kept: _Kept) -> _Cast:
    """That of the layer, from ``kept`` where it is there."""
    found = kept.get((layer, dtype))
    if found is None or not found.fits():
        found = kept[layer, dtype] = _Cast(layer, dtype)
    return found


@torch.no_grad()
def _fill(cast: list[_Cast]) -> None:
    """Casts the weights as they are now, those on a GPU together."""
    pairs = [pair for layer in cast for pair in layer.pairs()]
    if pairs:
        torch._foreach_copy_([low for _, low in pairs], [t for t, _ in pairs])
    for layer in cast:
        layer.versions = {name: _version(t) for name, t in layer.sources.items()}


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


def is_compiled(module: nn.Module) -> bool:
    """Whether what runs is not, or not only, the Python of the module itself."""
    if isinstance(module, nn.DataParallel | torch.jit.ScriptModule):
        return True
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version
