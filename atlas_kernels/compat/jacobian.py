"""Drop-in for ``jacobian.JacobianReg`` of facebookresearch/jacobian_regularizer (Hoffman, Roberts & Yaida 2019, arXiv
1908.02729)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import whole
from ..layout import compute_dtype
from ..outputs import logits_of
from ..vjp import vjp


class JacobianReg(nn.Module):
    """Half the squared Frobenius norm of dy/dx, averaged over the batch: ``C / (2 n B) sum ||d(v . y)/dx||^2``.

    n: random unit vectors v per sample; -1 takes the C basis vectors, which is exact. ``forward(x, y)``: x requires
    grad and y [B, C] was computed from it by eager modules (compiled ones have no double backward; fused attention has
    none either, and raises RuntimeError); the result can be differentiated.

    Kept: NaN for an empty batch; v is drawn by ``torch.randn`` on the CPU, a vector of all samples at a time; no draw
    for one output. Differs: the sum of squares is taken at once, without the norm's square root, and in float32 at
    least.
    """

    def __init__(self, n: int = 1) -> None:
        super().__init__()
        if n == 0:
            raise ValueError("n must be the number of projections, or -1 for all of them, got 0")
        n = whole("n", n, -1)
        self.n = n

    def forward(self, x: Tensor, y: Any) -> Tensor:
        if not x.requires_grad:
            raise ValueError("x does not require grad: call x.requires_grad_() before the model computes y from it")
        y = logits_of(y)
        _require_second_derivative(y)
        B, C = y.shape
        count = C if self.n == -1 else self.n
        total = torch.zeros((), device=y.device)
        for k in range(count):
            Jv = vjp(y, x, self._vector(y, k), create_graph=True, allow_unused=True)
            if Jv is None:
                raise ValueError("y does not depend on x: compute y from this x, outside torch.no_grad()")
            total = total + Jv.to(compute_dtype(Jv.dtype)).square().sum()
        return (C / (2 * count * B) if B else math.nan) * total

    def _vector(self, y: Tensor, k: int) -> Tensor:
        """The k-th v, a unit vector per sample."""
        B, C = y.shape
        if self.n == -1:
            v = torch.zeros_like(y)
            v[:, k] = 1
            return v
        if C == 1:
            return torch.ones_like(y)
        v = torch.randn(B, C)
        return (v / v.norm(dim=1, keepdim=True)).to(y)


def _require_second_derivative(y: Tensor) -> None:
    """Raises RuntimeError where y hangs on an attention kernel that cannot be differentiated twice."""
    left, seen = [y.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("ScaledDotProduct"):
            raise RuntimeError(
                "y was computed by a fused attention kernel, which has no second derivative: compute it inside "
                "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`"
            )
        left += [before for before, _ in node.next_functions]
