"""The second derivative of BatchNorm in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from ... import formulas
from ...layout import compute_dtype


@torch.no_grad()
def batch_norm_double_backward(
    x, cotangent, x_cotangent, mean, invstd, weight, weight_cotangent, bias_cotangent, training, cotangent_grad, x_grad,
    weight_grad,
):  # fmt: skip
    x, cotangent, x_cotangent = (t.to(compute_dtype(t.dtype)) for t in (x, cotangent, x_cotangent))
    made = formulas.batch_norm_double_backward(
        x, cotangent, x_cotangent, mean, invstd, weight, weight_cotangent, bias_cotangent, training
    )
    for out, t in zip((cotangent_grad, x_grad, weight_grad), made, strict=True):
        if out is not None:
            out.copy_(t)
