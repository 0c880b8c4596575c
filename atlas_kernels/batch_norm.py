"""BatchNorm whose gradient can be differentiated again at the cost of a backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from . import backends, formulas
from .checks import FLOATS, flag, kind_of, number_in, require_float_images, require_strided
from .layout import compute_dtype, dense, require_memory
from .transforms import followed, is_wrapped

_double_backward = backends.caller("batch_norm_double_backward")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` with a fused second derivative: for losses that a gradient is part of.

    Arguments, output, gradients and running statistics are PyTorch's, to the bit. Where a gradient was taken with
    ``create_graph=True``, its own backward reads the input and the two cotangents twice, where PyTorch makes some
    thirty passes; it differs from that by rounding. ``FastDoubleBackward`` brings it to networks as they are.

    Differentiable any number of times, and right each time: third derivatives of PyTorch take the statistics of the
    batch for constants. PyTorch's function runs where nothing is differentiated, in ``torch.compile`` and
    ``torch.jit``, in forward mode and under torch.func, and on other devices than CPU and CUDA. Raises ``TypeError``
    and ``ValueError`` that name the argument.
    """
    _require(input, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both, or None for both")
    if not flag("training", training) and running_mean is None:
        raise ValueError("running_mean must be given where training is False: there are no other statistics")
    numbers = number_in("momentum", momentum, 0.0, 1.0), number_in("eps", eps, 0.0)
    return differentiable(input, running_mean, running_var, weight, bias, training, *numbers)


def _require(x: Tensor, per_channel: dict[str, Tensor | None]) -> None:
    require_float_images("input", x)
    require_memory("input", x)
    if x.ndim < 2:
        raise ValueError(f"input has shape {list(x.shape)}, expected [batch, channels, ...]")
    given = {name: t for name, t in per_channel.items() if t is not None}
    for name, t in given.items():
        if not isinstance(t, Tensor) or t.dtype not in (x.dtype, compute_dtype(x.dtype)):
            raise TypeError(f"{name} must be a tensor of {compute_dtype(x.dtype)}, got {kind_of(t)}")
        require_strided(name, t)
        require_memory(name, t)
        if t.shape != x.shape[1:2] or t.device != x.device:
            got = f"{list(t.shape)} on {t.device}"
            raise ValueError(f"{name} is {got}, expected [{x.shape[1]}] on {x.device}, one number per channel")
    if len({t.dtype for t in given.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"{' and '.join(given)} must be of one dtype, got {got}")


def differentiable(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``batch_norm``, which refuses in PyTorch's words what PyTorch refuses."""
    plain = not is_differentiated(x, weight, bias)
    if not plain:  # but refused
        statistics = [t for t in (running_mean, running_var) if t is not None]
        plain = training and (x.numel() == x.shape[1] or eps <= 0) or any(t.requires_grad for t in statistics)
    if plain:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)


def is_differentiated(x: Any, *parameters: Tensor | None) -> bool:
    """Whether gradients are recorded of this call, of a layer on plain tensors, and by nobody but autograd."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not torch.is_grad_enabled():
        return False
    given = [x, *(t for t in parameters if t is not None)]
    if any(type(t) not in (Tensor, Parameter) or t.layout != torch.strided or t.dtype not in FLOATS for t in given):
        return False
    usual = x.device.type in ("cpu", "cuda") and x.ndim >= 2 and x.numel() > 0
    return usual and any(t.requires_grad for t in given) and not followed(*given)


class Layer(torch.autograd.Function):
    """Of images, weight and bias (or their gradients); what it computes in is the type of its result."""

    @staticmethod
    def wanted(ctx: Any) -> list[bool]:
        """Which of the first three gradients this backward needs. ``needs_input_grad`` says which there may be: those
        of the weights, too, where that of the images alone was asked for."""
        after = iter(ctx.next_functions)  # of the tensors among the inputs
        reached = [next(after)[0] if there else None for there in ctx.there]
        return [node is not None and _is_reached(node) for node in reached]


def _is_reached(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True


class _BatchNorm(Layer):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps):  # type: ignore[no-untyped-def]
        out, mean, invstd, reserve, kind = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, weight, running_mean, running_var, mean, invstd, reserve)
        ctx.there = True, weight is not None, bias is not None
        # The backend that is asked for here: backwards on a GPU run in threads of their own.
        ctx.rest = training, eps, backends.forced_backend(), kind
        return out

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        grads = _FirstBackward.apply(cotangent, *ctx.saved_tensors, *ctx.rest, Layer.wanted(ctx))
        return *grads, *[None] * 5


class _FirstBackward(Layer):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, cotangent, x, weight, running_mean, running_var, mean, invstd, reserve, training, eps, forced, kind, needed
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cotangent, x, weight, *((mean, invstd) if training else (running_mean, running_var)))
        ctx.there = True, True, weight is not None
        ctx.rest = training, eps, forced
        return torch.ops.aten._batch_norm_impl_index_backward(
            kind, x, cotangent, weight, running_mean, running_var, mean, invstd, training, eps, needed, reserve
        )

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        given = [t for t in cotangents if t is not None]
        if not given:
            return (None,) * 13
        cotangent, x, weight, *statistics = ctx.saved_tensors
        again = _formula if torch.is_grad_enabled() or any(map(is_wrapped, (cotangent, *given))) else _kernel
        grads = again(x, cotangent, weight, statistics, cotangents, Layer.wanted(ctx), *ctx.rest)
        return *grads, *[None] * 10


def _kernel(x, cotangent, weight, statistics, cotangents, needed, training, eps, forced):  # type: ignore[no-untyped-def]
    """The derivatives by cotangent, x and weight, where they are needed."""
    shape, wide = x.shape, compute_dtype(x.dtype)
    x = dense(x if x.ndim > 2 else x.unsqueeze(2))

    def like(t):  # type: ignore[no-untyped-def]
        if t is None:
            return torch.zeros_like(x)
        t = t.view(x.shape).to(x.dtype)
        return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)

    def numbers(t):  # type: ignore[no-untyped-def]
        return None if t is None else t.to(wide).contiguous()

    mean, spread, weights, *of_parameters = map(numbers, (*statistics, weight, *cotangents[1:]))
    by_cotangent = torch.empty_like(x) if needed[0] else None
    by_x = torch.empty_like(x) if needed[1] and (training or cotangents[1] is not None) else None
    by_weight = torch.empty_like(mean) if needed[2] and weight is not None else None
    with backends.backend(forced) if forced else nullcontext():
        _double_backward(
            x, like(cotangent), like(cotangents[0]), mean, spread if training else (spread + eps).rsqrt(), weights,
            *of_parameters, training, by_cotangent, by_x, by_weight,
        )  # fmt: skip
    images = (None if t is None else t.view(shape) for t in (by_cotangent, by_x))
    return *images, None if by_weight is None else by_weight.to(weight.dtype)


def _formula(x, cotangent, weight, statistics, cotangents, needed, training, eps, _):  # type: ignore[no-untyped-def]
    """The same from differentiable operations, the statistics of the batch included."""
    dtype = compute_dtype(x.dtype)

    def wide(t):  # type: ignore[no-untyped-def]
        return None if t is None else t.to(dtype)

    mean, var = map(wide, statistics)
    if training:
        var, mean = torch.var_mean(wide(x), [0, *range(2, x.ndim)], correction=0)
    v = torch.zeros_like(x) if cotangents[0] is None else cotangents[0]
    invstd, (weights, a, b) = (var + eps).rsqrt(), map(wide, (weight, *cotangents[1:]))
    made = formulas.batch_norm_double_backward(wide(x), wide(cotangent), wide(v), mean, invstd, weights, a, b, training)
    sources = cotangent, x, weight
    return [t.to(s.dtype) if n and s is not None else None for t, s, n in zip(made, sources, needed, strict=True)]
