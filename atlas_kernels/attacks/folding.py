"""Which BatchNorms can be folded into the layer before them: found by watching one forward, whatever Python it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .held import at_the_end, generators, put_back

#: Whose plain forward is known: exact types, since a subclass may do more.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def hooks(module: nn.Module) -> int:
    """How many hooks a module has that run in a pass."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return sum(map(len, kinds))


def unhook(module: nn.Module, *ours: Callable[..., Any]) -> None:
    """Removes these forward hooks if they are there, which after a Ctrl-C nobody's handle may know."""
    for kept, extra in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number in [number for number, hook in kept.items() if hook in ours]:
            del kept[number]
            extra.pop(number, None)


def is_plain_layer(module: nn.Module) -> bool:
    """A convolution or linear layer that computes what its type says, from its own parameters."""
    # Weight norm and pruning make the weight an attribute; parametrizations change the type, sharding the weight's.
    if type(module) not in LAYERS or "forward" in vars(module):
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point() and not _has_inference_tensors(module)


def is_plain_norm(module: nn.Module) -> bool:
    """A BatchNorm without hooks that in eval mode computes what its type says, from running statistics."""
    if type(module) not in NORMS or "forward" in vars(module) or hooks(module):
        return False
    return module.running_mean is not None and module.running_var is not None and not _has_inference_tensors(module)


def _has_inference_tensors(module: nn.Module) -> bool:
    """Whose writes leave no mark."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.is_inference() for tensor in tensors)


def foldable(
    model: nn.Module,
    layers: Iterable[nn.Module],
    norms: Iterable[nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[nn.Module, nn.Module]:
    """Layer -> the BatchNorm that alone reads its output, as seen in one forward in which each runs once.

    Costs that forward, in modes and precision as found. Buffers and random state do not move; hooks fire.
    """
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    observer = _Observer()
    unhooked = (
        partial(unhook, m, observer.after_layer, observer.before_norm, observer.after_norm) for m in model.modules()
    )
    with put_back(model, copy_buffers=True, seeds=dict.fromkeys(generators(devices))), at_the_end(*unhooked):
        for layer in layers:
            layer.register_forward_hook(observer.after_layer)
        for norm in norms:
            norm.register_forward_pre_hook(observer.before_norm, with_kwargs=True)
            norm.register_forward_hook(observer.after_norm)
        with observer:
            model(*args, **kwargs)
    return observer.pairs()


class _Observer(TorchDispatchMode):
    """Notes which calls read the output of each layer."""

    supports_higher_order_operators = True  # they are run like any other operator

    def __init__(self) -> None:
        super().__init__()
        self._runs: Counter[nn.Module] = Counter()
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # tensors are kept, so that no id is given twice
        self._norms: dict[nn.Module, nn.Module] = {}
        self._read_elsewhere: set[nn.Module] = set()
        self._in_norm: Any = None

    def after_layer(self, layer: Any, _: Any, output: Tensor) -> None:
        self._runs[layer] += 1
        self._outputs[id(output)] = output, layer
        if output.dim() != layer.weight.dim():  # the channels are not where BatchNorm has them
            self._read_elsewhere.add(layer)

    def before_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._runs[norm] += 1
        self._in_norm = args[0] if args else kwargs["input"]
        _, layer = self._outputs.get(id(self._in_norm), (None, None))
        if layer in self._norms:
            self._read_elsewhere.add(layer)
        elif layer is not None:
            self._norms[layer] = norm

    def after_norm(self, *_: Any) -> None:
        self._in_norm = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if leaf is not self._in_norm and id(leaf) in self._outputs:
                self._read_elsewhere.add(self._outputs[id(leaf)][1])
        return func(*args, **(kwargs or {}))

    def pairs(self) -> dict[nn.Module, nn.Module]:
        once = {module for module, runs in self._runs.items() if runs == 1} - self._read_elsewhere
        return {layer: norm for layer, norm in self._norms.items() if layer in once and norm in once}
