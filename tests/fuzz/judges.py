"""What a result must be: the bits of the reference, a few units in the last place, or float64's up to rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import atlas_kernels as ak
from operator_cases import same_within_ulps

from .memory import same_memory


def by_reference(call: Any, **changed: Any) -> Any:
    with ak.backend("reference"):
        return call(**changed)


def parts(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    found = result if isinstance(result, (tuple, list)) else [result]
    return [t for t in found if isinstance(t, Tensor)]


def bits(ours: Any, call: Any, **changed: Any) -> str | None:
    """Equal bits on both backends."""
    for a, b in zip(parts(ours), parts(by_reference(call, **changed)), strict=True):
        if not same_memory(a, b):
            return _difference(a, b, "the reference's bits")
    return None


def units(ours: Any, call: Any, *, clean: str, **changed: Any) -> str | None:
    """Equal to four units in the last place of the larger of pixel and way from the clean image."""
    given = {**call.arguments, **changed}
    x = given[clean]
    if call.name == "pgd_step" and given["norm"] == "l1" and max(_size(given["adv"]), _size(given["step_size"])) > 1e6:
        return None  # how a sparse step is shared out is then rounding: shares and ways are of too different size
    x = (x.to_dense() if x.is_sparse else x).resolve_neg()
    for a, b in zip(parts(ours), parts(by_reference(call, **changed)), strict=True):
        way = (a - x).abs()
        if a.dtype == torch.float64 and len(a):  # whose sums are rounded in float64 too
            way = way + way.flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1)) if a.ndim > 1 else way
        # Sums, and the cosines of starts, are rounded in float64: what should be 0 may be 1e-16 of the largest way.
        way = way.clamp(min=1e-9 * _size(way))
        if not same_within_ulps(a, b.to(a.dtype), torch.maximum(x.abs(), way)):
            return _difference(a, b, "4 units in the last place of the reference")
    return None


_FACTORS = ("weights", "weight", "beta", "local_weight", "global_weight")
_SQUARED = ("logit_pairing", "consistency_loss", "atlas_loss", "compactness")  # whose terms are squared differences


def roundings(
    ours: Any, call: Any, *, tensors: tuple[str, ...] = (), wide: dict[str, Any] | None = None, values: int = 1,
    same: bool = False, **changed: Any,
) -> str | None:  # fmt: skip
    """Equal to the reference in float64 on the same numbers, up to the roundings of float32 and of the result's dtype.

    A sum has errors in proportion to its largest terms, so those are what the bound is taken from: the spread of a
    row's logits, the result's own largest entry. tensors: the names of what may be large. values: how many of the
    results come before the gradients. same: the reference gets the type of the call, which its result depends on.
    """
    given = {**call.arguments, **changed}
    factors = [given[n] for n in _FACTORS if given.get(n) is not None]
    size = max([1.0, *(_size(given[name]) for name in tensors)])
    size *= size if call.name in _SQUARED else 1.0
    size *= max([1.0, *(_total(f) for f in factors)])
    if size > 1e30:  # near what float32 holds
        return None
    finite = all(map(_is_finite, [*(given[name] for name in tensors), *factors]))
    if finite and not same:
        doubled = {k: v.double() for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
        truth = by_reference(call, **{**given, **doubled, **(wide or {})})
    else:
        truth = by_reference(call, **given)
    in_double = any(given[name].dtype == torch.float64 for name in tensors)
    for i, (a, b) in enumerate(zip(parts(ours), parts(truth), strict=True)):
        right = _is_near(a, b, size, in_double)
        if i >= values and not finite:  # how much of a row's gradient a NaN takes along depends on what underflows
            right |= a.isnan() | b.isnan()
        if not bool(right.all()):
            return _difference(torch.where(right, b.to(a.dtype), a), b, "float64 up to rounding")
    return None


def _is_near(a: Tensor, b: Tensor, size: float, in_double: bool) -> Tensor:
    """Where ``a`` is ``b`` up to the roundings of sums of terms of this size."""
    if not a.is_floating_point():
        return a == b
    unit = 1e-12 if in_double or a.dtype == torch.float64 else 4e-6
    allowed = unit * (8 * size + _size(b)) + torch.finfo(a.dtype).eps * b.abs() + torch.finfo(a.dtype).tiny
    return ((a.double() - b.double()).abs() <= allowed) | (a == b.to(a.dtype)) | (a.isnan() & b.isnan())


def _is_finite(t: Any) -> bool:
    return bool(t.isfinite().all()) if isinstance(t, Tensor) else math.isfinite(t)


def _total(factor: Any) -> float:
    return float(factor.double().abs().sum()) if isinstance(factor, Tensor) else abs(float(factor))


def _size(t: Any) -> float:
    """The largest finite number."""
    if not isinstance(t, Tensor):
        return abs(float(t))
    finite = t[t.isfinite()]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def _difference(a: Tensor, b: Tensor, wanted: str) -> str:
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    apart = ~((a == b) | (a.isnan() & b.isnan())) if a.shape == b.shape else torch.ones((1,), dtype=torch.bool)
    if a.shape != b.shape or a.dtype != b.dtype and a.dtype.is_floating_point != b.dtype.is_floating_point:
        return f"{a.dtype} {list(a.shape)} is not {wanted}: {b.dtype} {list(b.shape)}"
    worst = torch.where(apart, (a.double() - b.double()).abs().nan_to_num(torch.inf), -1.0).reshape(-1)
    at = int(worst.argmax()) if worst.numel() else 0
    got, want = (t.reshape(-1)[at].item() for t in (a, b))
    return f"{int(apart.sum())} of {apart.numel()} entries are not {wanted}: {got!r} for {want!r} at {at}"
