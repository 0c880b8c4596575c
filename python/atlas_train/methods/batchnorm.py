"""BatchNorm that normalises one batch with the statistics of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from atlas_kernels.layout import compute_dtype

#: Mean and (biased) variance, per channel, with which each BatchNorm normalises.
Statistics = dict[_BatchNorm, tuple[Tensor, Tensor]]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Statistics]:
    """The batch statistics of the one forward in this context, with their graph, of every BatchNorm in train mode.

    Empty for a network without such layers. Raises ValueError where the network runs one layer twice.
    """
    statistics: Statistics = {}
    layers = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}

    def record(module: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(module, _BatchNorm)
        if module in statistics:
            raise ValueError(
                f"model runs BatchNorm {layers[module]!r} twice in a forward, so it has no one pair of statistics to "
                'hold; give each place a layer of its own, or take bn="eval"'
            )
        x = args[0].to(compute_dtype(args[0].dtype))
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        statistics[module] = mean, var

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def held(statistics: Statistics) -> Iterator[None]:
    """These layers normalise with these statistics, and move no running ones; gradients flow to the statistics."""
    before = {layer: vars(layer).get("forward") for layer in statistics}
    try:
        for layer, (mean, var) in statistics.items():
            vars(layer)["forward"] = partial(_normalise, layer, mean, var)
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def constant(statistics: Statistics) -> Statistics:
    """The same numbers, without their graph."""
    return {layer: (mean.detach(), var.detach()) for layer, (mean, var) in statistics.items()}


def _normalise(layer: _BatchNorm, mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    if not mean.requires_grad:
        return F.batch_norm(x, mean, var, layer.weight, layer.bias, training=False, eps=layer.eps)
    # F.batch_norm has no gradient to its statistics, only to weight and bias. So the statistics stay constant; weight
    # and bias are rewritten to equal values that carry the gradient to the statistics.
    scale, fixed = (var + layer.eps).rsqrt(), mean.detach()
    weight = scale / scale.detach() if layer.weight is None else layer.weight * (scale / scale.detach())
    shift = (fixed - mean) * scale.detach() * weight
    bias = shift if layer.bias is None else layer.bias + shift
    return F.batch_norm(x, fixed, var.detach(), weight, bias, training=False, eps=layer.eps)
