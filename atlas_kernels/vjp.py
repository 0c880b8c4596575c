"""Gradients along a given cotangent: the backward begins in the last layer, not in a loss."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def vjp(z: Tensor, x: Tensor, cotangent: Tensor, **how: Any) -> Tensor:
    """d(z . cotangent)/dx by ``torch.autograd.grad``, whose options ``how`` are."""
    if z.is_cuda:
        _begin(z.device)
    return torch.autograd.grad(z, x, cotangent.to(z.dtype), **how)[0]


@cache
def _begin(device: torch.device) -> None:
    """Gives autograd's thread of the device, which all calls share, its CUDA context.

    A thread has one from its first kernel on. A loss has such kernels; along a cotangent the first is often a product
    of the last layer, and cuBLAS, which takes the context as it finds it, warns where there is none.
    """
    with torch.enable_grad(), torch.inference_mode(False):
        one = torch.ones((), device=device, requires_grad=True)
        torch.autograd.grad(2 * one, one)
