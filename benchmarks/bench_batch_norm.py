"""The second derivative of BatchNorm in training, against PyTorch's, as methods with a gradient in the loss take it.

Bytes by the model: x and the two cotangents read twice, since the sums over a channel come before the results; the
gradients by x and by the cotangent written. PyTorch's is no composition that could be compiled: ``torch.compile`` has
no double backward.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import atlas_kernels as ak
from harness import Call, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(64, 64, 32, 32), (64, 512, 4, 4)]
LAYOUTS = {"channels_last": torch.channels_last, "planes": torch.contiguous_format}


def double_backward(function, x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor, v: Tensor) -> Call:  # type: ignore[no-untyped-def]
    out = function(x, None, None, weight, bias, True)
    (grad,) = torch.autograd.grad(out, x, cotangent, create_graph=True)
    return lambda: torch.autograd.grad(grad, (cotangent, x, weight), v, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_batch_norm(size, layout, dtype, report):
    x, cotangent, v = (torch.randn(size, device=DEVICE, dtype=dtype).to(memory_format=LAYOUTS[layout]) for _ in "123")
    weight, bias = (torch.rand(size[1], device=DEVICE, requires_grad=True) for _ in "12")
    inputs = x.requires_grad_(), weight, bias, cotangent.requires_grad_(), v
    calls = {"ours": double_backward(ak.batch_norm, *inputs), "plain": double_backward(F.batch_norm, *inputs)}
    exact = double_backward(F.batch_norm, *(t.detach().double().requires_grad_() for t in inputs))()
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(calls["ours"](), exact, strict=True)]
    rounding = torch.finfo(dtype).eps
    per_channel = x.numel() / size[1]  # random terms, whose sum is about the root of their number
    checked = max(errors[:2]) <= 8 * rounding and errors[2] <= per_channel**0.5 * rounding
    traversals = 2 * 3 + 2
    row = measure(f"batch_norm {layout} {str(dtype)[6:]}", size, traversals * x.nbytes, calls, checked, DEVICE)
    report(row, calls["ours"])
