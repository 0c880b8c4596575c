"""What torch.func (grad, vjp, jvp, vmap, hessian, ..) and forward-mode differentiation do to a call.

They look into a call, and a kernel cannot be looked into: a result of it would count as a constant. So the public
functions run their plain formulas there, which PyTorch can follow. What a kernel would still get is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

_active = torch._C._are_functorch_transforms_active


def followed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of these carries a tangent (forward mode)."""
    return _active() or (forward_ad._current_level >= 0 and any(map(has_tangent, tensors)))


def has_tangent(t: Any) -> bool:
    """Whether ``t`` is a tensor that is differentiated in forward mode."""
    if forward_ad._current_level < 0 or not isinstance(t, Tensor):
        return False
    return forward_ad.unpack_dual(t).tangent is not None


def is_wrapped(t: Tensor) -> bool:
    """Whether a transform of torch.func, or autograd's ``is_grads_batched``, has ``t``: its values cannot be read."""
    return bool(_functorch.is_functorch_wrapped_tensor(t) or _functorch.is_legacy_batchedtensor(t))


def refuse_derivatives(name: str, arguments: Mapping[str, Any], *, tangents_only: bool = False) -> None:
    """Raise if one of these is to be differentiated, as the transform at work sees them: the derivative would be 0."""
    for argument, t in arguments.items():
        wanted = isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() and not tangents_only
        if wanted or has_tangent(t):
            raise NotImplementedError(
                f"{name} has no derivative, and {argument} is being differentiated: pass {argument}.detach(), or call "
                "a function of atlas_kernels that has a derivative"
            )


def kernel_under_transforms(name: str, operator: Callable[..., None], differentiable: Mapping[int, str]) -> Any:
    """What the operator does while a transform is at work: its usual work, on arguments that are constants of the
    transform; others are refused. ``differentiable``: number and name of the arguments that have a derivative."""

    def run(*args: Any) -> None:
        level = _functorch.maybe_current_level()
        refuse_derivatives(name, {argument: args[i] for i, argument in differentiable.items()})
        inner = []
        for t in args:
            if isinstance(t, Tensor) and _functorch.maybe_get_level(t) == level:
                if not _functorch.is_gradtrackingtensor(t):
                    raise NotImplementedError(
                        f"{name} cannot be mapped by torch.vmap: it takes whole batches, so call it on the whole batch"
                    )
                t = _functorch._unwrap_for_grad(t, level)
            inner.append(t)
        with temporarily_pop_interpreter_stack():
            operator(*inner)

    return run
