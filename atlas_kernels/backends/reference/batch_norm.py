"""The second derivative of BatchNorm in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from ...formulas import batch_norm_double_backward as formula
from ...layout import compute_dtype


@torch.no_grad()
def batch_norm_double_backward(
    x, cotangent, x_cotangent, mean, invstd, weight, weight_cotangent, bias_cotangent, training, cotangent_grad, x_grad,
    weight_grad,
):  # fmt: skip
    wide = compute_dtype(x.dtype)
    images = (t.to(wide) for t in (x, cotangent, x_cotangent))
    made = formula(*images, mean, invstd, weight, weight_cotangent, bias_cotangent, training)
    for out, t in zip((cotangent_grad, x_grad, weight_grad), made, strict=True):
        if out is not None:
            out.copy_(t)
