"""A context in which the gradient of any network can be differentiated again at the cost of a few passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .batch_norm import Layer, differentiable, is_differentiated


class FastDoubleBackward(TorchFunctionMode):
    """Inside this context the layers of ``torch.nn``, and what else calls ``torch.nn.functional``, have cheap second
    derivatives: for forwards whose gradient is differentiated again. Of this thread alone.

    Output, gradients and running statistics are PyTorch's to the bit, second derivatives to rounding:

    - BatchNorm is ``atlas_kernels.batch_norm``.
    - The weights of a convolution get their second derivative from the kernel of the first. PyTorch takes a convolution
      with images in the place of filters there, which takes about as long as all its other passes together.

    What is compiled, scripted, traced or transposed, and SyncBatchNorm that does communicate, stays as it is. Under
    autocast a convolution that is called several times has the gradient of its weight to rounding: autocast casts the
    weight once, this in each call. ``torch.utils.checkpoint`` with ``use_reentrant=False`` calls the network again
    outside of this context and fails: give it ``context_fn=lambda: (FastDoubleBackward(), FastDoubleBackward())``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FASTER.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def is_entered(cls) -> bool:
        """Whether the caller is inside such a context."""
        return any(isinstance(mode, cls) for mode in _get_current_function_mode_stack())


def _convolution(plain: Callable[..., Tensor], sides: int) -> Callable[..., Tensor]:
    """``plain``, which is torch.conv1d, conv2d or conv3d, with the derivatives below."""

    def call(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        given = _autocast(input, weight, bias) if is_differentiated(input, weight, bias) else []
        unlike = len({t.dtype for t in given if t is not None}) != 1  # none at all, or what PyTorch refuses
        if isinstance(padding, str) or unlike or input.ndim != sides + 2:
            return plain(input, weight, bias, stride, padding, dilation, groups)
        # One number may be of NumPy or a tensor, too.
        numbers = [list(n) if isinstance(n, Sequence) else [int(n)] * sides for n in (stride, padding, dilation)]
        return _Convolution.apply(*given, *numbers, False, [0] * sides, groups)

    return call


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The arguments as autocast has them for a convolution."""
    given, kind = [x, *parameters], x.device.type
    if not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in given]


class _Convolution(Layer):
    @staticmethod
    def forward(ctx, x, weight, bias, *numbers):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.there = True, True, bias is not None
        ctx.rest = None if bias is None else list(bias.shape), numbers
        return torch.convolution(x, weight, bias, *numbers)

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        grads = _FirstBackward.apply(cotangent, *ctx.saved_tensors, *ctx.rest, Layer.wanted(ctx))
        return *grads, *[None] * 6


class _FirstBackward(Layer):
    @staticmethod
    def forward(ctx, cotangent, x, weight, bias, numbers, needed):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cotangent, x, weight)
        ctx.there, ctx.numbers = (True, True, True), numbers
        return torch.ops.aten.convolution_backward(cotangent, x, weight, bias, *numbers, needed)

    @staticmethod
    def backward(ctx, of_x, of_weight, of_bias):  # type: ignore[no-untyped-def]
        """The first backward is linear in the cotangent, x and the weight each, and so are these."""
        cotangent, x, weight = ctx.saved_tensors
        needed, by_cotangent, by_x, by_weight = Layer.wanted(ctx), None, None, None

        def first_backward(x, weight, *outputs):  # type: ignore[no-untyped-def]
            return torch.ops.aten.convolution_backward(cotangent, x, weight, None, *ctx.numbers, [*outputs, False])

        if needed[0]:
            parts = [torch.convolution(a, b, None, *ctx.numbers) for a, b in ((of_x, weight), (x, of_weight))
                     if a is not None and b is not None]  # fmt: skip
            if of_bias is not None:
                parts.append(of_bias.view(-1, *[1] * (x.ndim - 2)).expand_as(cotangent))
            by_cotangent = sum(parts) if parts else None
        if needed[1] and of_weight is not None:
            by_x = first_backward(x, of_weight, True, False)[0]
        if needed[2] and of_x is not None:
            by_weight = first_backward(of_x, weight, False, True)[1]
        return by_cotangent, by_x, by_weight, None, None, None


_FASTER: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: differentiable,
    torch.conv1d: _convolution(torch.conv1d, 1),
    torch.conv2d: _convolution(torch.conv2d, 2),
    torch.conv3d: _convolution(torch.conv3d, 3),
}
