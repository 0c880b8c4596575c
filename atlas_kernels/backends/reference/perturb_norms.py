"""The l2 and l1 perturbation operators in plain PyTorch: the definition. Lengths are taken in fp64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...layout import column, compute_dtype, plane_shape
from ...schema import L1, L2, LINF, NORMS, STREAM_START
from .perturb import carried, clip, rows
from .philox import uniform, words

_PerSample = tuple[float, Tensor | None]
_Bounds = tuple[float, Tensor | None, float, Tensor | None]


def flat(t: Tensor) -> Tensor:
    """One row per sample."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def per_sample_sum(t: Tensor) -> Tensor:
    """Sum over everything but the batch, in fp64, ready to broadcast against ``t``."""
    return column(flat(t.double()).sum(1), t)


def _length(d: Tensor, norm: str) -> Tensor:
    if norm != L2:
        return per_sample_sum(d.abs())
    # The squares of large fp64 numbers leave its range.
    far = column((flat(d.detach()).abs() > 2.0**500).any(1), d)
    scale = torch.ones_like(far, dtype=torch.float64).masked_fill(far, 2.0**-600)
    return per_sample_sum((d.double() * scale).square()).sqrt() / scale


def moved(adv: Tensor, grad: Tensor, step: Tensor, norm: str) -> Tensor:
    """``adv + step * grad / ||grad||``; a sample whose gradient is zero or not finite stays."""
    length = _length(grad, norm)
    moves = (length > 0) & (length < math.inf)
    grad, length = torch.where(moves, grad, 0.0), torch.where(moves, length, 1.0)
    # A power of two first, so that neither the length nor its inverse leaves the range of fp32.
    power = torch.ldexp(torch.ones_like(length), 1 - torch.frexp(length).exponent.clamp(-125, 127))
    factor = (step.double() / (length * power)).to(adv.dtype)
    return torch.where(moves, adv + grad * power.to(adv.dtype) * factor, adv)


def moved_sparsely(adv: Tensor, grad: Tensor, step: Tensor, largest: int, low: Tensor, high: Tensor) -> Tensor:
    """The ``largest`` largest entries of the gradient move by an equal share of the step each, in the direction of
    their sign, or as far as the range lets them; what is left of the step goes to the next largest ones. Ties at the
    threshold share what is left for them."""
    up = (grad > 0) != (step < 0)
    share = (step.double().abs() / largest).to(adv.dtype)
    reach = torch.where(up, high - adv, adv - low)
    reach = torch.where(reach < share, reach, share)
    reach = torch.where((reach > 0) & (grad != 0), reach, 0.0)
    budget = share.double() * largest
    with torch.no_grad():
        length = per_sample_sum(grad.abs())
        moves = (length > 0) & (length < math.inf) & (budget > 0)
        m, order = flat(grad.abs()).sort(1, descending=True)
        reached = flat(reach.double()).gather(1, order).cumsum(1) >= flat(budget.expand(len(adv), *budget.shape[1:]))
        threshold = column(torch.where(reached, m, 0.0).amax(1), adv)
        whole, tied = grad.abs() > threshold, grad.abs() == threshold
    left, tie = (per_sample_sum(torch.where(those, reach, 0.0)) for those in (whole, tied))
    part = ((budget - left) / torch.where(tie > 0, tie, 1.0)).to(adv.dtype)
    way = torch.where(whole, reach, torch.where(tied & (tie > 0), reach * part, 0.0))
    return torch.where(moves, torch.where(up, adv + way, adv - way), adv)


def moved_by_signs(adv: Tensor, grad: Tensor, step: Tensor, largest: Tensor) -> Tensor:
    """The ``largest`` largest entries of the gradient, those that tie with the last of them, and none that is 0, move
    by equal shares of the step in the direction of their signs."""
    m = flat(grad.detach().abs())
    length = per_sample_sum(grad.detach().abs())
    last = (largest.clamp(1, m.shape[1]) - 1).view(-1, 1)
    threshold = column(m.sort(1, descending=True).values.gather(1, last), adv)
    chosen = (grad.abs() >= threshold) & (grad != 0) & (length < math.inf)
    share = (step.double() / per_sample_sum(chosen).clamp_min(1)).to(adv.dtype)
    return torch.where(chosen, adv + grad.sign() * share, adv)


def projected(v: Tensor, x: Tensor, eps: Tensor, norm: str, low: Tensor, high: Tensor) -> Tensor:
    """``v`` in the eps-ball of x and in [low, high]: for l_inf and l2 in the ball, then in the range; for l1 the
    nearest point of both. A sample at no finite distance from x is only clipped to the range."""
    if norm == LINF:
        return clip(clip(v, x - eps, x + eps), low, high)
    d = v - x
    room = clip(torch.where(d > 0, high - x, x - low), torch.zeros_like(d), math.inf)
    with torch.no_grad():
        kept = _length(d, norm) if norm == L2 else per_sample_sum(clip(d.abs(), 0.0, room))
        finite = column(flat(d.isfinite()).all(1), d)
        outside = (kept > eps) & finite
    d = torch.where(outside, d, 1.0)
    if norm == L2:
        shrunk = d * (eps.double() / _length(d, norm)).to(d.dtype)
    else:
        shrunk = d.sign() * clip(_kept(d.abs(), room, eps), torch.zeros_like(d), room)
    return clip(torch.where(outside, x + shrunk, v), low, high)


def _kept(distance: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """``distance - lambda``, such that ``clip(distance - lambda, 0, room)`` adds up to eps. lambda is ``base - mu``,
    base the least distance that is not below it: distances over that are exact however large they are. Where it does
    not show, lambda itself is rounded."""
    m, room = distance.double(), room.double()
    with torch.no_grad():
        least, space = flat(m), flat(room)
        radius = eps.double().view(-1, 1).expand(len(m), 1)
        base = _first(least, lambda b: torch.minimum((least - b).clamp_min(0), space).sum(1, keepdim=True) <= radius)
        over = least - base
        slack = torch.where(over >= 0, (space - over).clamp_min(0), 0.0)
        missing = radius - torch.minimum(over.clamp_min(0), space).sum(1, keepdim=True)
        end = _first(slack, lambda mu: torch.minimum(slack, mu).sum(1, keepdim=True) >= missing)
        full = (over >= 0) & ((space <= over) | (slack < end))
        some = (over >= 0) & ~full
        base, full, some = column(base, m), full.view_as(m), some.view_as(m)
    over = m - base
    kept = torch.where(some, over, 0.0) + torch.where(full, room, 0.0)
    mu = (eps.double() - per_sample_sum(kept)) / per_sample_sum(some).clamp_min(1)
    coarse = (base - mu) * flat(m).shape[1] > 256 * eps
    return torch.where(
        coarse, over.to(distance.dtype) + mu.to(distance.dtype), distance - (base - mu).to(distance.dtype)
    )


def _first(values: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Per row the least value from which on ``holds``, or the largest."""
    values = values.sort(1).values
    low = torch.zeros_like(values[:, :1], dtype=torch.int64)
    high = torch.full_like(low, values.shape[1] - 1)
    for _ in range(values.shape[1].bit_length()):
        middle = (low + high) // 2
        held = holds(values.gather(1, middle))
        low, high = torch.where(held, low, (middle + 1).minimum(high)), torch.where(held, middle, high)
    return values.gather(1, high)


def direction(x: Tensor, norm: str, key: Tensor, ids: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    """(normal (l2) or Laplace (l1) numbers in the shape of ``x``; per sample U^(1 / dimensions)), in fp64."""
    shape = plane_shape(x.shape)
    w = words(shape, key, ids, draw, STREAM_START, 0)
    if norm == L2:  # Box & Muller 1958
        radius = (-2 * _positive_uniform(w[..., 0::2]).log()).sqrt()
        angle = math.pi * uniform(w[..., 1::2], torch.float64)
        z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)
    else:
        z = _positive_uniform(w).log() * torch.where(w % 2 == 1, 1.0, -1.0)
    own = words((shape[0], 1, 1), key, ids, draw, STREAM_START, 1)[:, 0, 0]
    share = ((own.double() + 0.5) * 2.0**-32) ** (1 / max(1, shape[1] * shape[2]))
    return z[..., : shape[2]].reshape(x.shape), column(share, x)


def _positive_uniform(word: Tensor) -> Tensor:
    return ((word >> 8) + 1).double() * 2.0**-24


def _limits(clip_min: float, min_rows: Tensor | None, clip_max: float, max_rows: Tensor | None, like: Tensor):
    return rows(clip_min, min_rows, like, dim=1), rows(clip_max, max_rows, like, dim=1)


def start(x: Tensor, norm: str, eps: _PerSample, bounds: _Bounds, key: Tensor, ids: Tensor | None, draw: int) -> Tensor:
    """A uniform point of the ball, clipped to the range; eps and bounds are the operators' pairs. In the compute type,
    as what ``step`` and ``inside`` make, and like that differentiable in images, radii and steps."""
    radius, dtype = rows(*eps, x), compute_dtype(x.dtype)
    if not x.numel():
        return x.to(dtype)
    z, share = direction(x, norm, key, ids, draw)
    return clip(moved(x.to(dtype), z.to(dtype), (radius.double() * share).to(dtype), norm), *_limits(*bounds, x))


def step(
    adv: Tensor, grad: Tensor, x: Tensor, norm: str, eps: _PerSample, step_size: _PerSample, bounds: _Bounds,
    descend: bool, active: Tensor | None, largest: int = 0,
) -> Tensor:  # fmt: skip
    """One step of the samples that are active, projected."""
    dtype, size = compute_dtype(adv.dtype), rows(*step_size, adv)
    point, grad, size = adv.to(dtype), grad.to(dtype), -size if descend else size
    if not adv.numel():
        return point
    if norm == L1 and largest:
        found = moved_sparsely(point, grad, size, largest, *_limits(*bounds, adv))
    else:
        found = moved(point, grad, size, norm)
    found = inside(found, x, norm, eps, bounds)
    return found if active is None else torch.where(column(active, adv), found, adv.to(dtype))


def apgd(
    adv: Tensor, old: Tensor, grad: Tensor, x: Tensor, norm: str, eps: _PerSample, step_size: _PerSample,
    momentum: _PerSample, bounds: _Bounds, descend: bool, active: Tensor | None, largest: Tensor | None,
) -> Tensor:  # fmt: skip
    """One step of APGD of the samples that are active: l2 with momentum, l1 along the signs of some entries."""
    dtype, size = compute_dtype(adv.dtype), rows(*step_size, adv)
    point, grad, size = adv.to(dtype), grad.to(dtype), -size if descend else size
    if not adv.numel():
        return point
    if norm == L1:
        assert largest is not None
        found = inside(moved_by_signs(point, grad, size, largest), x, norm, eps, bounds)
    else:
        found = inside(moved(point, grad, size, norm), x, norm, eps, bounds)
        found = inside(carried(found, point, old.to(dtype), rows(*momentum, adv)), x, norm, eps, bounds)
    return found if active is None else torch.where(column(active, adv), found, point)


def inside(v: Tensor, x: Tensor, norm: str, eps: _PerSample, bounds: _Bounds) -> Tensor:
    """``v`` in the ball and in the range."""
    dtype = compute_dtype(v.dtype)
    if not v.numel():
        return v.to(dtype)
    return projected(v.to(dtype), x.to(dtype), rows(*eps, v), norm, *_limits(*bounds, v))


@torch.no_grad()
def random_start_norm(x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    out.copy_(start(x, NORMS[norm], (eps, eps_rows), (clip_min, min_rows, clip_max, max_rows), key, ids, draw))


@torch.no_grad()
def pgd_step_norm(
    adv, grad, x, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast, largest,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    found = step(adv, grad, x, NORMS[norm], (eps, eps_rows), (step_size, step_rows), bounds, descend, active, largest)
    out.copy_(found)
    if cast is not None:
        cast.copy_(found)


@torch.no_grad()
def apgd_step_norm(
    adv, old, grad, x, norm, eps, eps_rows, step_size, step_rows, momentum, momentum_rows, clip_min, min_rows, clip_max,
    max_rows, descend, active, out, cast, largest,
):  # fmt: skip
    bounds, numbers = (clip_min, min_rows, clip_max, max_rows), ((eps, eps_rows), (step_size, step_rows))
    found = apgd(adv, old, grad, x, NORMS[norm], *numbers, (momentum, momentum_rows), bounds, descend, active, largest)
    out.copy_(found)
    if cast is not None:
        cast.copy_(found)


@torch.no_grad()
def project(v, x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, out):
    out.copy_(inside(v, x, NORMS[norm], (eps, eps_rows), (clip_min, min_rows, clip_max, max_rows)))
