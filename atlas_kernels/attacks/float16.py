"""Gradients of networks that run in float16, which ends at 6e-8 and at 65,504.

The cotangent of a confident prediction is smaller than that: cast as it is, it is 0, the image does not move, and the
network looks robust. So it is brought to size before it is cast, by a power of two, which rounds nothing, and where its
size matters the gradient is brought back in float32. Each sample has a power of its own; where a module is in train
mode, so that the samples may depend on each other, all have one.

A sample is lost in the network all the same where its gradient is 0, or not finite: it is computed again in float32, in
train mode with the whole batch. The host has to look for that. A CUDA graph of ``Execution`` has it looked at after the
replay (``graphs.py``); in a graph that others record nobody can, so a network that is known to run in float16 runs in
float32 there.

Whether float16 is in the network at all is found once per attack: by its tensors, autocast, and the whole autograd
graph of its logits. Where a node of that is closed, as the one of ``torch.compile``, a forward of two samples is
watched, once per network and compiled code. Not seen are kernels in float16 that are not torch's and take and return
other types; and in a graph that others record, a closed node of a network that was not attacked before.

bfloat16 has the range of float32, but for the smallest denormal numbers, for which a constant makes up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..batch_norm import Layer
from ..capture import capturing
from ..layout import column, compute_dtype
from ..outputs import Model
from ..vjp import vjp
from .held import generators, modes_of, modules_of, put_back

#: Networks that ran in float16 by themselves when last attacked; and of networks, whether their closed nodes hold it.
_seen: WeakSet[Any] = WeakSet()
_closed: WeakKeyDictionary[Any, WeakKeyDictionary[type, bool]] = WeakKeyDictionary()
_CLOSED = ("DifferentiableGraph", "CppNode")  # of TorchScript, and of C++
#: From the smallest number of float32 to a normal one of bfloat16.
LIFT = 2.0**24
_EXPONENT, _LEAST, _MOST = 0x7F800000, 0x00800000, 0x7F000000  # bits of float32: its exponent, 2^-126 and 2^127


def is_asked_for(model: Model, x: Tensor) -> bool:
    """Whether ``model`` will run in float16, as far as can be told before: also that it did when last attacked."""
    known = (model, *modules_of(model)) if _lasts(model) else modules_of(model)
    return _is_given(model, x) or any(part in _seen for part in known)


def is_used(model: Model, x: Tensor, z: Tensor) -> bool:
    """Whether ``model``, which made z of x, ran in float16 anywhere; without a graph of z, as far as can be told."""
    if _is_given(model, x) or z.dtype == torch.float16:
        return True
    if z.grad_fn is None:
        return is_asked_for(model, x)
    found, closed = is_in_graph(z)
    found = found or (bool(closed) and _is_closed_in(model, x, closed))
    if _lasts(model):
        (_seen.add if found else _seen.discard)(model)
    return found


def is_in_graph(z: Tensor) -> tuple[bool, set[type]]:
    """Whether an operation in the graph of z has a result of float16; and the kinds of nodes that do not show theirs,
    as far as they were reached."""
    left: list[Any] = [z.grad_fn] if z.grad_fn is not None else []
    reached = set(left)
    closed: set[type] = set()
    while left:
        node = left.pop()
        if any([result.dtype == torch.float16 for result in getattr(node, "_input_metadata", ())]):
            return True, closed
        if _is_closed(node):
            closed.add(type(node))
        for before, _ in node.next_functions:
            if before is not None and before not in reached:
                reached.add(before)
                left.append(before)
    return False, closed


def _is_closed(node: Any) -> bool:
    if isinstance(node, BackwardCFunction):
        return not issubclass(node._forward_cls, Layer)  # type: ignore[attr-defined]
    return any([name in node.name() for name in _CLOSED])


def are_coupled(model: Model) -> bool:
    """Whether a row of the logits may depend on other rows of the batch; of a bare function nobody knows."""
    if not isinstance(model, nn.Module):
        return True
    training = any(modes_of(model.modules()).values())
    return training or any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())


def pull_back(model: Model, z: Tensor, x: Tensor, cotangent: Tensor, *, coupled: bool = False, **how: Any) -> Tensor:
    """d(z . cotangent)/dx, z = model(x); where that runs in float16, of a cotangent in float32, and in float32.

    coupled: a row of z [B, C] depends on other rows of x too, as under BatchNorm in train mode. how: options of
    ``torch.autograd.grad``.
    """
    if is_used(model, x, z):
        grad, unit, _ = pulled_back(z, x, cotangent, coupled, **how)
        return grad * unit
    return vjp(z, x, cotangent, **how)


def unit_of(cotangent: Tensor, *, coupled: bool = False) -> Tensor:
    """Powers of two, [B, 1] or if coupled [1, 1], over which the rows of ``cotangent`` are of size 1 to 2."""
    return _power_of_two(_largest(cotangent, coupled))


@contextmanager
def in_float32(model: Model, x: Tensor) -> Iterator[Model]:
    """Inside, the function yielded is ``model`` in float32, with float32 copies of the weights where need be.

    Its own casts to float16, also of an autocast inside it, are casts to float32; compiled code runs uncompiled.
    """
    low: dict[str, Tensor] = {}
    if isinstance(model, nn.Module):
        named = chain(model.named_parameters(), model.named_buffers())
        low = {name: t.float() for name, t in named if t.dtype in (torch.float16, torch.bfloat16)}

    def network(images: Tensor) -> Tensor:
        images = images.to(compute_dtype(images.dtype))
        if isinstance(model, nn.Module) and low:
            made: Tensor = functional_call(model, low, (images,))
            return made
        return model(images)

    with torch.autocast(x.device.type, enabled=False), _not_compiled(), _InFloat32():
        yield network


@contextmanager
def leaving_state(model: Model, x: Tensor, coupled: bool) -> Iterator[None]:
    """What a second forward would move, it leaves: the random state and the buffers of modules in train mode."""
    seeds = dict.fromkeys(generators([x.device.index] if x.is_cuda else []))
    with put_back(model, copy_buffers=True, seeds=seeds) if coupled else nullcontext():
        yield


def pulled_back(z: Tensor, x: Tensor, cotangent: Tensor, coupled: bool, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient over ``unit``, the unit, and bool [B]: whether a row is lost, 0 for a cotangent that is not, or not
    finite."""
    largest = _largest(cotangent, coupled)
    unit = _power_of_two(largest)
    grad = vjp(z, x, cotangent / unit, **how)
    kept = torch.linalg.vector_norm(grad.flatten(1), torch.inf, dim=1).float()
    both = torch.stack((kept, largest[:, 0].expand_as(kept)))
    kept, asked = both if capturing(x.is_cuda) else both.cpu()  # few launches, and one wait
    return wide(grad), column(unit, x), ((kept == 0) & (asked != 0)) | ~kept.isfinite()


def _largest(cotangent: Tensor, coupled: bool) -> Tensor:
    return torch.linalg.vector_norm(cotangent, torch.inf, dim=(0, 1) if coupled else 1, keepdim=True).float()


def _power_of_two(size: Tensor) -> Tensor:
    """The one at or below ``size``, float32."""
    return size.view(torch.int32).bitwise_and(_EXPONENT).clamp_(_LEAST, _MOST).view(torch.float32)


def _by_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def _is_given(model: Model, x: Tensor) -> bool:
    """Whether images, autocast or a tensor of the model's modules are of float16."""
    if x.dtype == torch.float16 or _by_autocast(x):
        return True
    tensors = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in modules_of(model))
    return any(t is not None and t.dtype == torch.float16 for t in tensors)


def _lasts(model: Model) -> bool:
    """Whether something may be noted of it: a bound method is another object at each call."""
    return isinstance(model, nn.Module | FunctionType)


def _is_closed_in(model: Model, x: Tensor, closed: set[type]) -> bool:
    """Whether nodes of these kinds, in the graph of model(x), hold float16. Where it cannot be told, they do: then a
    row without a gradient costs more, and none is lost."""
    known = _closed.setdefault(model, WeakKeyDictionary()) if _lasts(model) else WeakKeyDictionary()
    if any(kind not in known for kind in closed):
        if capturing(x.is_cuda):
            return True
        known.update(dict.fromkeys(closed, _is_watched(model, x.detach()[:2])))
    return any(known[kind] for kind in closed)


def _is_watched(model: Model, x: Tensor) -> bool:
    """Whether an operation of a forward has a result of float16, or the forward fails."""
    try:
        with leaving_state(model, x, True), torch.no_grad(), _not_compiled(), _Watch() as watch:
            model(x)
    except Exception:
        return True
    return watch.found


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiled runs in it, and a wrapper against that takes seconds to import


class _Watch(_Mode):
    """Notes whether an operation has a result of float16."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        self.found |= any(isinstance(t, Tensor) and t.dtype == torch.float16 for t in tree_leaves(made))
        return made


class _InFloat32(_Mode):
    """Operations that are asked for float16, as casts are, give float32."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") == torch.float16:
            kwargs = {**kwargs, "dtype": torch.float32}
        return operation(*args, **kwargs)


def _not_compiled() -> AbstractContextManager[object]:
    """Inside, what ``torch.compile`` has compiled runs uncompiled."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def wide(t: Tensor) -> Tensor:
    return t.detach().to(compute_dtype(t.dtype))
