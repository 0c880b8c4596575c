"""Losses over all pairs of clean and adversarial features, in the memory of one batch of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends, formulas
from .checks import FLOATS, flag, kind_of, require_choice, require_like, require_strided
from .layout import compute_dtype, contiguous
from .transforms import followed

_compactness = backends.caller("compactness")

_DISTANCES = ("l1", "squared")
_REDUCTIONS = ("mean", "sum", "none")


def compactness(
    h: Tensor,
    h_adv: Tensor,
    labels: Tensor,
    *,
    scale: float = 0.99,
    distance: str = "l1",
    detach: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Global compactness of ADR (Bui et al., ECCV 2020, arXiv 2007.05123): pulls adversaries to the clean features of
    their class and pushes them slightly from the other classes,

        ``1/B^2 sum_ij w_ij 1/k |h_j - h_adv_i|_1``,  ``w_ij = 1 if y_i == y_j else 1 - 1/scale``

    over all B^2 pairs, i = j included. Neither the B x B x k differences nor the B x B distances are ever in memory. At
    a tie the gradient of ``|.|`` is 0. A batch of one class has weights 1 (the published code divides by zero there);
    an empty batch has no pairs, so its loss is 0. NaN features give a NaN loss.

    Args:
        h, h_adv: clean and adversarial features [B, k] of one layer, k >= 1, one float dtype; computed in float32
            (float64 stays).
        labels: class indices, int64 [B]; any values.
        scale: s of the weights, not 0. The paper's 0.99 weighs pairs of different classes by -0.0101.
        distance: "l1" as published, or "squared", the squared l2 distance.
        detach: no gradient to ``h``, as published: only the adversaries are moved.
        reduction: "mean" is the formula; "sum" is B times that, the sum over adversaries; "none" is float [B], one for
            each adversary (its gradient goes to ``h_adv`` only).

    Returns a float32 (float64) tensor, differentiable any number of times. In forward mode and under the transforms of
    torch.func the plain formula runs, one adversary after another, which may keep all pairs for its derivative. Raises
    ``TypeError`` and ``ValueError`` that name the argument.
    """
    _require_features(h, h_adv, labels)
    scale = _scale(scale)
    require_choice("distance", distance, _DISTANCES)
    require_choice("reduction", reduction, _REDUCTIONS)
    clean = h.detach() if flag("detach", detach) else h
    if reduction == "none" and torch.is_grad_enabled() and clean.requires_grad and not followed():
        raise ValueError("reduction='none' has no gradient for h: use detach=True, or reduction='mean' or 'sum'")
    inputs = contiguous("h", clean), contiguous("h_adv", h_adv), contiguous("labels", labels)
    squared, factor = distance == "squared", _factor(h, reduction)
    if followed(clean, h_adv):
        rows = formulas.compactness(*inputs, scale, squared, factor)
        return rows if reduction == "none" else rows.sum()
    return _Compactness.apply(*inputs, scale, squared, factor, reduction == "none")


def _factor(h: Tensor, reduction: str) -> float:
    """What the sum over all features of all pairs is multiplied by."""
    batch = max(h.shape[0], 1)
    return 1.0 / (batch * h.shape[1]) / (batch if reduction == "mean" else 1)


def _require_features(h: Tensor, h_adv: Tensor, labels: Tensor) -> None:
    for name, t in (("h", h), ("h_adv", h_adv)):
        if not isinstance(t, Tensor) or t.dtype not in FLOATS or t.layout != torch.strided or t.is_nested:
            got = f"{t.dtype} ({'nested' if t.is_nested else t.layout})" if isinstance(t, Tensor) else kind_of(t)
            raise TypeError(f"{name} must be a dense float tensor, got {got}")
    if h.ndim != 2 or h.shape[1] == 0:
        raise ValueError(f"h has shape {list(h.shape)}, expected features [B, k] with k >= 1: call .flatten(1) on maps")
    require_like("h_adv", h_adv, "h", h, dtype=True)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        hint = ": call .long()" if isinstance(labels, Tensor) else ""
        raise TypeError(f"labels must be an int64 tensor of class indices, got {kind_of(labels)}{hint}")
    require_strided("labels", labels)
    if labels.shape != h.shape[:1] or labels.device != h.device:
        raise ValueError(
            f"labels is {list(labels.shape)} on {labels.device}, expected [{h.shape[0]}] on {h.device}, one per sample"
        )


def _scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not (scale and math.isfinite(scale) and math.isfinite(1.0 / scale)):
        raise ValueError(f"scale must be finite and not 0 (other classes weigh 1 - 1/scale), got {scale}")
    return float(scale)


class _Compactness(torch.autograd.Function):
    """The kernel makes value and gradients at once; ``backward`` only scales."""

    @staticmethod
    def forward(ctx, h, h_adv, labels, scale, squared, factor, rows):  # type: ignore[no-untyped-def]
        dtype = compute_dtype(h.dtype)
        loss = torch.empty(h.shape[:1] if rows else (), dtype=dtype, device=h.device)
        grads = [torch.empty_like(h, dtype=dtype) if needed else None for needed in ctx.needs_input_grad[:2]]
        value, total = (loss, None) if rows else (None, loss)
        _compactness(h, h_adv, labels, scale, squared, factor, value, total, *grads)
        ctx.save_for_backward(h, h_adv, labels, *grads)
        ctx.rest = scale, squared, factor
        return loss

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        h, h_adv, labels, *grads = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _slopes(h, h_adv, labels, grads, *ctx.rest)
        over = cotangent.unsqueeze(1) if cotangent.ndim else cotangent
        return *(None if g is None else (over * g).to(h.dtype) for g in grads), *[None] * 5


def _slopes(h, h_adv, labels, grads, scale, squared, factor):  # type: ignore[no-untyped-def]
    """The gradients by h and h_adv again, from differentiable operations."""
    if not squared:  # piecewise constant: all that is missing is the derivative, which is 0
        flat = 0.0 * (h.sign() + h_adv.sign())
        return [None if g is None else g + flat for g in grads]
    classes, index, size = labels.unique(return_inverse=True, return_counts=True)
    other = 1.0 - 1.0 / scale
    weight = (other * labels.shape[0] + size[index].double() / scale).unsqueeze(1)  # sum of w_ij over j

    def slope(own: Tensor, far: Tensor) -> Tensor:
        sums = far.new_zeros((len(classes), far.shape[1])).index_add(0, index, far)
        return 2.0 * factor * (weight * own - other * far.sum(0) - sums[index] / scale)

    # In float64 and about their middle, which drops out: sums of features far from 0 would leave no digits of the way.
    middle = h.detach().double().mean(0)
    clean, adversarial = h.double() - middle, h_adv.double() - middle
    pairs = (clean, adversarial), (adversarial, clean)
    return [None if g is None else slope(*pair).to(g.dtype) for g, pair in zip(grads, pairs, strict=True)]
