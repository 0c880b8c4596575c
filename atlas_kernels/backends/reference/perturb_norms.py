"""The l2 and l1 perturbation operators in plain PyTorch: the definition. Lengths are taken in fp64 and rounded once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...layout import compute_dtype, plane_shape
from ...noise import STREAM_START
from ...schema import L2, LINF, NORMS
from .perturb import clip, rows
from .philox import uniform, words

_PerSample = tuple[float, Tensor | None]
_Bounds = tuple[float, Tensor | None, float, Tensor | None]


def flat(t: Tensor) -> Tensor:
    """One row per sample."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def per_sample_sum(t: Tensor) -> Tensor:
    """Sum over everything but the batch, in fp64, ready to broadcast against ``t``."""
    return flat(t.double()).sum(1).view(-1, *[1] * (t.ndim - 1))


def _length(d: Tensor, norm: str) -> Tensor:
    return per_sample_sum(d.double().square()).sqrt() if norm == L2 else per_sample_sum(d.abs())


def moved(adv: Tensor, grad: Tensor, step: Tensor, norm: str) -> Tensor:
    """``adv + step * grad / ||grad||``; a sample whose gradient is zero or not finite stays."""
    length = _length(grad, norm)
    moves = (length > 0) & (length < math.inf)
    grad, length = torch.where(moves, grad, 0.0), torch.where(moves, length, 1.0)
    # A power of two first, so that neither the length nor its inverse leaves the range of fp32.
    power = torch.ldexp(torch.ones_like(length), 1 - torch.frexp(length).exponent.clamp(-125, 127))
    factor = (step.double() / (length * power)).to(adv.dtype)
    return torch.where(moves, adv + grad * power.to(adv.dtype) * factor, adv)


def projected(v: Tensor, x: Tensor, eps: Tensor, norm: str, low: Tensor, high: Tensor) -> Tensor:
    """``v`` in the eps-ball of x and in [low, high]: for l_inf and l2 in the ball, then in the range; for l1 the
    nearest point of both. A sample at no finite distance from x is only clipped to the range."""
    if norm == LINF:
        return clip(clip(v, x - eps, x + eps), low, high)
    d = v - x
    room = clip(torch.where(d > 0, high - x, x - low), torch.zeros_like(d), math.inf)
    with torch.no_grad():
        kept = _length(d, norm) if norm == L2 else per_sample_sum(clip(d.abs(), 0.0, room))
        outside = (kept > eps) & (_length(d, norm) < math.inf)
    d = torch.where(outside, d, 1.0)
    if norm == L2:
        shrunk = d * (eps.double() / _length(d, norm)).to(d.dtype)
    else:
        shrunk = d.sign() * clip(d.abs() - _threshold(d.abs(), room, eps).to(d.dtype), torch.zeros_like(d), room)
    return clip(torch.where(outside, x + shrunk, v), low, high)


def _threshold(m: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """lambda in fp64, such that the pixels' ``clip(m - lambda, 0, room)`` add up to eps. That sum falls linearly from
    knot to knot: at m - room a pixel starts to lose, at m it has lost all."""
    m, room = m.double(), room.double()
    with torch.no_grad():
        knots, order = torch.cat([flat((m - room).clamp_min(0)), flat(m)], 1).sort(1)
        losing = torch.where(order < order.shape[1] // 2, 1.0, -1.0).to(m).cumsum(1)
        total = flat(torch.minimum(m, room)).sum(1, keepdim=True)
        after = total - (losing[:, :-1] * knots.diff(dim=1)).cumsum(1)
        piece = (after > (eps.view(-1, 1) if eps.ndim else eps)).sum(1, keepdim=True)
        piece = piece.clamp_max(knots.shape[1] - 2)
        middle = (knots.gather(1, piece) + knots.gather(1, piece + 1)).view(-1, *[1] * (m.ndim - 1)) / 2
        full = m - room >= middle
        some = (m > middle) & ~full
    kept = torch.where(some, m, 0.0) + torch.where(full, room, 0.0)
    return (per_sample_sum(kept) - eps.double()) / per_sample_sum(some).clamp_min(1)


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
    return z[..., : shape[2]].reshape(x.shape), share.view(-1, *[1] * (x.ndim - 1))


def _positive_uniform(word: Tensor) -> Tensor:
    return ((word >> 8) + 1).double() * 2.0**-24


def _limits(clip_min: float, min_rows: Tensor | None, clip_max: float, max_rows: Tensor | None, like: Tensor):
    return rows(clip_min, min_rows, like, dim=1), rows(clip_max, max_rows, like, dim=1)


def start(x: Tensor, norm: str, eps: _PerSample, bounds: _Bounds, key: Tensor, ids: Tensor | None, draw: int) -> Tensor:
    """A uniform point of the ball, clipped to the range; eps and bounds are the operators' pairs. In the compute type,
    as what ``step`` and ``inside`` make, and like that differentiable in images, radii and steps."""
    radius, dtype = rows(*eps, x), compute_dtype(x.dtype)
    z, share = direction(x, norm, key, ids, draw)
    return clip(moved(x.to(dtype), z.to(dtype), (radius.double() * share).to(dtype), norm), *_limits(*bounds, x))


def step(
    adv: Tensor, grad: Tensor, x: Tensor, norm: str, eps: _PerSample, step_size: _PerSample, bounds: _Bounds,
    descend: bool, active: Tensor | None,
) -> Tensor:  # fmt: skip
    """One step of the samples that are active, projected."""
    dtype, size = compute_dtype(adv.dtype), rows(*step_size, adv)
    found = inside(moved(adv.to(dtype), grad.to(dtype), -size if descend else size, norm), x, norm, eps, bounds)
    return found if active is None else torch.where(active.view(-1, *[1] * (adv.ndim - 1)), found, adv.to(dtype))


def inside(v: Tensor, x: Tensor, norm: str, eps: _PerSample, bounds: _Bounds) -> Tensor:
    """``v`` in the ball and in the range."""
    dtype = compute_dtype(v.dtype)
    return projected(v.to(dtype), x.to(dtype), rows(*eps, v), norm, *_limits(*bounds, v))


@torch.no_grad()
def random_start_norm(x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    out.copy_(start(x, NORMS[norm], (eps, eps_rows), (clip_min, min_rows, clip_max, max_rows), key, ids, draw))


@torch.no_grad()
def pgd_step_norm(
    adv, grad, x, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    found = step(adv, grad, x, NORMS[norm], (eps, eps_rows), (step_size, step_rows), bounds, descend, active)
    out.copy_(found)
    if cast is not None:
        cast.copy_(found)


@torch.no_grad()
def project(v, x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, out):
    out.copy_(inside(v, x, NORMS[norm], (eps, eps_rows), (clip_min, min_rows, clip_max, max_rows)))
