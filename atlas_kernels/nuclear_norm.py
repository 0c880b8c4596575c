"""The nuclear norm of a matrix [batch, classes], with its gradient in the same launch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backends, formulas
from .checks import dense_logits
from .layout import compute_dtype
from .transforms import followed

_nuclear_norm = backends.caller("nuclear_norm")

# Doubled n times by 2 x - x^3, this over 2^n ends at sqrt(2/3), to 1e-8 from n = 12 on.
_START = 0.94544196782
_MOST = 32  # the kernel turns vectors in pairs; for more of them products of matrices are faster


def nuclear_norm(d: Tensor) -> Tensor:
    """``sum_i s_i``, s_i the singular values of ``d`` [B, C]; of logits' differences, the regulariser of NuAT
    (Sriramanan et al. 2021, "Towards efficient and effective adversarial training", NeurIPS).

    The gradient is ``U V^T``, of the singular vectors of the s_i that are not 0. Directions in which the matrix
    is 0 get gradient 0 (other sub-gradients exist there), so a matrix of zeros has gradient 0. Equal singular values
    are like any others. What counts as 0, in the norm and in the gradient, is an s_i of at most ``max(B, C) u s_1``
    (u: 2^-23, and 2^-52 for float64), as in ``torch.linalg.matrix_rank``: rounding a matrix can turn 0 into as much.

    With k = min(B, C) and e = 2^-53, all in float64, whatever the matrix is in:

    - Up to k = 32, one launch of one-sided Jacobi rotations, which never square the matrix: U V^T has an error (largest
      singular value) of at most ``k 2^-36 + 64 k e s_1 / s_r``, s_r the least that counts. The first part is where
      rotations stop, for a float64 matrix ``k max(B, C) 2^-52``; the second is what they round (backward stable, a few
      sweeps of k rotations each), times the condition of U V^T, which is 1 / s_r. s_1 / s_r is below
      ``1 / (max(B, C) u)``, so for float32 it is all far below the last rounding, to float32. The norm has a relative
      error of at most 64 k e.
    - Larger k on the CPU: LAPACK's SVD for float64, and else the eigenvalues of the shorter side's products, which are
      squares: ``64 k e (s_1 / s_r)^2``, 1e-5 where s_r is at the bound for k = 33, and mostly below float32's rounding.
    - Larger k elsewhere: products of matrices alone, as many as the shape says, with the errors of the first line. What
      is between a half and 1.05 of the bound counts in part there.

    Nothing waits for the device, so it can be captured in a CUDA graph (but ``backend("reference")`` cannot).

    Args:
        d: float [B, C], B >= 0, C >= 2; strides other than contiguous are copied first. 16-bit matrices are taken as
            they are, so subtract logits in float32 where the difference is small.

    Returns a 0-dim tensor in float32 (float64 for float64); the gradient comes in the dtype of ``d``. A NaN or an
    infinity in ``d`` makes the norm and the whole gradient NaN. Derivatives of any order; ``create_graph=True``,
    forward mode and torch.func take PyTorch's SVD, which waits for the device, and whose second derivatives are NaN
    where two singular values are equal. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    d = dense_logits("d", d)
    if followed(d):
        return formulas.nuclear_norm(d)
    return _NuclearNorm.apply(d)


class _NuclearNorm(torch.autograd.Function):
    """``forward`` makes value and gradient at once, ``backward`` scales it."""

    @staticmethod
    def forward(ctx, d):  # type: ignore[no-untyped-def]
        value = torch.empty((), dtype=compute_dtype(d.dtype), device=d.device)
        grad = torch.empty_like(d, dtype=value.dtype) if ctx.needs_input_grad[0] else None
        make = by_products if not d.is_cpu else _by_svd if d.dtype == torch.float64 else _by_eigenvalues
        if min(d.shape) <= _MOST or (not torch.compiler.is_compiling() and backends.forced_backend()):
            _nuclear_norm(d, value, grad)
        else:
            made, slope = make(d)
            value.copy_(made)
            if grad is not None:
                grad.copy_(slope)
        ctx.save_for_backward(d, grad)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        d, grad = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            alias = d.view_as(d)  # it may have been computed from others, and the caller's graph counts that path
            (grad,) = torch.autograd.grad(formulas.nuclear_norm(alias), alias, create_graph=True)
        return (cotangent * grad).to(d.dtype)


def _least(d: Tensor) -> float:
    """The share of the largest singular value up to which one counts as 0."""
    return max(d.shape) * torch.finfo(compute_dtype(d.dtype)).eps


def _finite(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(``d`` in float64 over its largest entry, that entry, 0 or, where an entry of ``d`` is none, NaN)."""
    wide = d.double()
    top = wide.abs().amax()
    bad = (wide - wide).sum()
    return torch.where((top > 0) & (bad == 0), wide / top, 0.0), top, bad


def _by_svd(d: Tensor) -> tuple[Tensor, Tensor]:
    a, top, bad = _finite(d)
    left, lengths, right = torch.linalg.svd(a, full_matrices=False)
    counts = lengths > _least(d) * lengths[0]
    return top * (lengths * counts).sum() + bad, (left * counts) @ right + bad


def _by_eigenvalues(d: Tensor) -> tuple[Tensor, Tensor]:
    """Of the products of the shorter side's vectors, in float64."""
    a, top, bad = _finite(d if d.shape[0] >= d.shape[1] else d.t())
    squares, right = torch.linalg.eigh(a.t() @ a)
    lengths = squares.clamp(min=0).sqrt()
    counts = lengths > _least(d) * lengths[-1]
    made = a @ ((right * torch.where(counts, 1 / lengths, 0.0)) @ right.t())
    return top * (lengths * counts).sum() + bad, (made if d.shape[0] >= d.shape[1] else made.t()) + bad


def by_products(d: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and gradient from products of matrices, as many as the shape says: nothing is read back.

    X = U f(S) V^T for odd polynomials f. 2 x - x^3 doubles what is small and keeps what is near 1 there, so a start of
    the right size brings singular values above the bound beyond sqrt(2/3), others not. (5 x^3 - 3 x^5) / 2 then brings
    what is above sqrt(2/3) to 1, and what is below to 0; (3 x - x^3) / 2 settles the rest (Newton-Schulz).
    """
    a, top, bad = _finite(d if d.shape[0] >= d.shape[1] else d.t())
    doublings = math.ceil(math.log2(_START / _least(d)))
    x = a * (_START / (_least(d) * 2**doublings) / _largest(a))
    for _ in range(doublings):
        x = torch.addmm(x, x, x.t() @ x, beta=2, alpha=-1)
    for _ in range(4):
        g = x.t() @ x
        x = x @ torch.addmm(g, g, g, beta=2.5, alpha=-1.5)
    for _ in range(3):
        x = torch.addmm(x, x, x.t() @ x, beta=1.5, alpha=-0.5)
    slope = x if d.shape[0] >= d.shape[1] else x.t()
    return top * (x * a).sum() + bad, slope + bad


def _largest(a: Tensor) -> Tensor:
    """The largest singular value, or up to k^(1/256) times that, of k; 1 for a matrix of zeros. It is the norm of the
    64th power of a^T a, by squaring, that tells."""
    g, log = a.t() @ a, torch.zeros_like(a.sum())
    for i in range(7):
        norm = torch.linalg.matrix_norm(g)
        norm = torch.where(norm > 0, norm, 1.0)
        log = log + norm.log() / 2 ** (i + 1)
        g = g / norm
        g = g @ g
    return log.exp()
