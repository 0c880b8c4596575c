"""Weights made ready once for all passes of an attack: BatchNorm folded into them, and in the 16 bits of autocast.

Autocast keeps 16-bit copies of trainable weights only, so the frozen weights of an attack would be cast in every pass.
Parameters stay in place and are not written to: a layer's ``forward`` is exchanged, for the time of an attack. Whenever
a call is not the one prepared for (other weights, weights that need a gradient, another autocast, a trace of
torch.compile), the layer and its BatchNorm compute as they are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

from .folding import foldable, hooks, is_plain_layer, is_plain_norm, unhook
from .held import at_the_end


class Prepared:
    """A convolution or linear layer, the BatchNorm to fold into it if there is one, and the weights to run it with."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.layer: Any = layer
        self.norm: Any = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @torch.no_grad()
    def prepare(self, fold: bool) -> bool:
        """Makes the weights from those of now; False if they are what the layer runs with anyway."""
        weight, bias = self.layer.weight, self.layer.bias
        self._device = weight.device.type
        self._autocast = _autocast_dtype(self._device)
        dtype = weight.dtype if weight.dtype == torch.float64 else self._autocast or weight.dtype
        self._folds = fold and self.norm is not None and not self.norm.training
        if not self._folds and dtype == weight.dtype:
            return False
        owners = [self.layer._parameters] + ([self.norm._parameters, self.norm._buffers] if self._folds else [])
        self._sources = [(owner, name, t, _version(t)) for owner in owners for name, t in owner.items()]
        if self._folds:
            weight, bias = _folded(weight, bias, self.norm)
        # New memory in every attack, which in a CUDA graph is the graph's own; of the layout that the weights have.
        self.weight = torch.empty_like(self.layer.weight, dtype=dtype).copy_(weight)
        self.bias = None if bias is None else torch.empty_like(bias, dtype=dtype).copy_(bias)
        return True

    def install(self) -> None:
        vars(self.layer)["forward"] = self._run
        if self._folds:
            vars(self.norm)["forward"] = self._normalise

    def remove(self) -> None:
        vars(self.layer).pop("forward", None)
        if self._folds:
            vars(self.norm).pop("forward", None)

    def _run(self, input: Tensor) -> Tensor:
        layer, ready = self.layer, self._is_ready(input)
        if not ready:
            out = type(layer).forward(layer, input)
        elif type(layer) is nn.Linear:
            assert self.weight is not None
            out = F.linear(input, self.weight, self.bias)
        else:
            out = layer._conv_forward(input, self.weight, self.bias)
        return Awaiting(out, self, ready) if self._folds and not torch.compiler.is_compiling() else out

    def _normalise(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return type(self.norm).forward(self.norm, input)
        if not isinstance(input, Awaiting) or input.source is not self:
            raise _unforeseen(f"the BatchNorm after {self.name!r} reads something else")
        return input.value if input.folded else type(self.norm).forward(self.norm, input.value)

    def _is_ready(self, input: Tensor) -> bool:
        """Whether this call is the one prepared for."""
        if torch.compiler.is_compiling() or _autocast_dtype(self._device) != self._autocast:
            return False
        if self._folds and (self.norm.training or input.dim() != self.layer._parameters["weight"].dim()):
            return False
        return all(
            owner.get(name) is t and _version(t) == version and not (t is not None and t.requires_grad)
            for owner, name, t, version in self._sources
        )


class Awaiting(Tensor):
    """The output of a layer on its way to its BatchNorm.

    In a folded network it is not what it is elsewhere, so all that can be done with it is to ask for its shape.
    """

    value: Tensor
    source: Prepared
    folded: bool

    @staticmethod
    def __new__(cls, value: Tensor, source: Prepared, folded: bool) -> Awaiting:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device,
            requires_grad=value.requires_grad,
        )  # fmt: skip
        made.value, made.source, made.folded = value, source, folded
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "size", "dim", "stride", "numel", "is_contiguous", "__len__"):
            cls.__torch_dispatch__(func, types, args, kwargs)  # also hooks on the tensor, which would never fire
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        self = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Awaiting))
        raise _unforeseen(f"{func.__name__} reads the output of {self.source.name!r}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Awaiting({list(self.shape)})"


class Preparations:
    """What is known of each network attacked so far: its layers, and which of them fold."""

    def __init__(self) -> None:
        self._networks: weakref.WeakKeyDictionary[nn.Module, _Network] = weakref.WeakKeyDictionary()

    @contextmanager
    def around(self, model: Callable[[Tensor], Tensor], device: torch.device, fold: bool) -> Iterator[None]:
        """An attack on ``model``, its weights frozen, its modes and autocast set."""
        network = None
        if not isinstance(model, nn.Module):
            if fold:
                _warn_nothing_folds(model, "its modules cannot be found")
        elif fold or _autocast_dtype(device.type) is not None:
            network = self._networks.get(model)
            if network is None or not (network.busy or network.state == _state(model)):
                network = self._networks[model] = _Network(model)
        if isinstance(model, nn.Module) and network is not None and not network.busy:
            with network.prepared(model, fold):
                yield
        else:  # nothing to prepare, or an attack within an attack
            yield


class _Network:
    """The layers of a network as it is built now; parts of it are kept, but not itself, whose cache this is in."""

    def __init__(self, model: nn.Module) -> None:
        self.state, self.busy = _state(model), False
        self._compiled = any(map(_is_compiled, model.modules()))
        parts = [] if self._compiled else list(model.named_modules())[1:]
        self._layers = {m: Prepared(name, m) for name, m in parts if is_plain_layer(m) and not m._forward_pre_hooks}
        self._foldable = [layer for layer in self._layers if not hooks(layer)]
        self._norms = [module for _, module in parts if is_plain_norm(module)]
        self._seen = False

    @contextmanager
    def prepared(self, model: nn.Module, fold: bool) -> Iterator[None]:
        """Inside, its layers run with prepared weights; if what folds is not known yet, from the first forward on."""
        if fold and not self._seen and not (self._foldable and self._norms):
            self._learn(model, {})
        ready: list[Prepared] = []

        def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            unhook(model, before_first)
            self._learn(model, foldable(model, self._foldable, self._norms, args, kwargs))
            self._install(ready, fold)

        with at_the_end(partial(unhook, model, before_first), partial(self._remove, ready)):
            self.busy = True
            if fold and not self._seen and not all(norm.training for norm in self._norms):
                model.register_forward_pre_hook(before_first, prepend=True, with_kwargs=True)
            else:
                self._install(ready, fold)
            yield

    def _learn(self, model: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> None:
        self._seen = True
        for layer, norm in pairs.items():
            self._layers[layer].norm = norm
        if self._compiled:
            _warn_nothing_folds(model, "it is compiled, scripted or DataParallel; torch.compile fuses BatchNorm itself")
        elif not pairs:
            _warn_nothing_folds(
                model,
                "in its forward no BatchNorm1d/2d/3d with running statistics is alone in reading the output of a "
                "Conv1d/2d/3d or Linear, each run once and without hooks",
            )

    def _install(self, ready: list[Prepared], fold: bool) -> None:
        ready += [layer for layer in self._layers.values() if layer.prepare(fold)]
        for layer in ready:
            layer.install()

    def _remove(self, ready: list[Prepared]) -> None:
        for layer in ready:
            layer.remove()
        self.busy = False


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What must be the same for the layers to be the same: each module, and whatever of its is run."""
    return [(weakref.ref(m), type(m), hooks(m), "forward" in vars(m), _is_compiled(m)) for m in model.modules()]


def _is_compiled(module: nn.Module) -> bool:
    """Whether what runs is not, or not only, the Python of the module itself."""
    if isinstance(module, nn.DataParallel | torch.jit.ScriptModule):
        return True
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """In float32 at least, whatever the weights are kept in."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    return fuse_conv_bn_weights(weight.to(dtype), None if bias is None else bias.to(dtype), *tensors)


def _unforeseen(what: str) -> RuntimeError:
    return RuntimeError(
        f"fold_batchnorm=True: {what}, other than in the forward in which it was seen to be read by its BatchNorm "
        "alone; a network that does not always run the same way is attacked with Execution(fold_batchnorm=False)"
    )


def _warn_nothing_folds(model: object, reason: str) -> None:
    warnings.warn(f"fold_batchnorm=True: nothing folds in {type(model).__name__}: {reason}", stacklevel=3)
