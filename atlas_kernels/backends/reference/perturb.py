"""The l_inf perturbation operators in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import column, compute_dtype, plane_shape
from ...schema import STREAM_LABEL_NOISE, STREAM_NEIGHBOUR, STREAM_START
from .philox import below, noise, short_uniform, words


def clip(v: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    """Two selects, as in every backend: a NaN value passes, and a NaN bound does not clip."""
    v = torch.where(v < lo, lo, v)
    return torch.where(v > hi, hi, v)


def rows(value: float, per_row: Tensor | None, like: Tensor, dim: int = 0) -> Tensor:
    """The scalar, or the per-row values along ``dim``, ready to broadcast against ``like``."""
    dtype = compute_dtype(like.dtype)
    if per_row is None:
        return torch.full((), value, dtype=dtype, device=like.device)
    shape = [1] * like.ndim
    shape[dim] = -1
    return per_row.to(dtype).view(shape)


def to_range(v: Tensor, clip_min: float, min_rows: Tensor | None, clip_max: float, max_rows: Tensor | None) -> Tensor:
    return clip(v, rows(clip_min, min_rows, v, dim=1), rows(clip_max, max_rows, v, dim=1))


def step(adv, grad, x, eps, eps_rows, step_size, step_rows, bounds, descend, active):
    dtype = compute_dtype(adv.dtype)
    radius, step = rows(eps, eps_rows, adv), rows(step_size, step_rows, adv)
    start, centre, direction = adv.to(dtype), x.to(dtype), torch.sign(grad).to(dtype)
    moved = start + (-step if descend else step) * direction
    moved = to_range(clip(moved, centre - radius, centre + radius), *bounds)
    return moved if active is None else torch.where(column(active, adv), moved, start)


def carried(stepped, start, old, share):
    """APGD's momentum: ``share`` of the way of the step, and the rest of that of the iteration before."""
    return start + (stepped - start) * share + (start - old) * (1 - share)


def apgd(
    adv, old, grad, x, eps, eps_rows, step_size, step_rows, momentum, momentum_rows, bounds, descend, active
):  # fmt: skip
    dtype = compute_dtype(adv.dtype)
    start, centre, radius = adv.to(dtype), x.to(dtype), rows(eps, eps_rows, adv)
    moved = step(adv, grad, x, eps, eps_rows, step_size, step_rows, bounds, descend, None)
    moved = carried(moved, start, old.to(dtype), rows(momentum, momentum_rows, adv))
    moved = to_range(clip(moved, centre - radius, centre + radius), *bounds)
    return moved if active is None else torch.where(column(active, adv), moved, start)


def neighbours(adv, radius, radius_rows, count, x, eps, eps_rows, bounds, key, ids, draw, stream=STREAM_NEIGHBOUR):
    dtype = compute_dtype(adv.dtype)
    found = []
    for k in range(count):
        u = noise(plane_shape(adv.shape), key, ids, draw, stream, k, dtype).view(adv.shape)
        z = adv.to(dtype) + rows(radius, radius_rows, adv) * u
        if x is not None:
            ball = rows(eps, eps_rows, adv)
            z = clip(z, x.to(dtype) - ball, x.to(dtype) + ball)
        found.append(to_range(z, *bounds))
    return found


def label_start(x, labels, label_noise, eps, eps_rows, share_low, share_high, bounds, key, ids, draw):
    dtype, stream = compute_dtype(x.dtype), STREAM_LABEL_NOISE
    share, turned = words((1, 1, 1), key, torch.zeros_like(key[:1]), draw, stream, 1).flatten()[:2]
    share = share_low + below(share, share_high - share_low + 1)
    known = (labels >= 0) & (labels < len(label_noise))
    sign = torch.where(turned >= 2**31, -1.0, 1.0).to(dtype)
    sign = column(torch.where(known, sign, torch.nan), x)
    batch, channels, pixels = plane_shape(x.shape)
    word = words((batch, channels, pixels), key, ids, draw, stream, 0)[..., :pixels].reshape(x.shape)
    of_label = label_noise[torch.where(known, labels, 0)].to(dtype)
    uniform = rows(eps, eps_rows, x) * short_uniform(word, dtype)
    return to_range(x.to(dtype) + sign * torch.where(word >> 20 < share, uniform, of_label), *bounds)


@torch.no_grad()
def random_start(x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    bounds = clip_min, min_rows, clip_max, max_rows
    (start,) = neighbours(x, eps, eps_rows, 1, None, 0.0, None, bounds, key, ids, draw, STREAM_START)
    out.copy_(start)


@torch.no_grad()
def label_noise_start(
    x, labels, label_noise, eps, eps_rows, share_low, share_high, clip_min, min_rows, clip_max, max_rows, key, ids,
    draw, out,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    if len(x):
        out.copy_(label_start(x, labels, label_noise, eps, eps_rows, share_low, share_high, bounds, key, ids, draw))


@torch.no_grad()
def pgd_step(
    adv, grad, x, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    moved = step(adv, grad, x, eps, eps_rows, step_size, step_rows, bounds, descend, active)
    out.copy_(moved)
    if cast is not None:
        cast.copy_(moved)


@torch.no_grad()
def apgd_step(
    adv, old, grad, x, eps, eps_rows, step_size, step_rows, momentum, momentum_rows, clip_min, min_rows, clip_max,
    max_rows, descend, active, out, cast,
):  # fmt: skip
    bounds, numbers = (clip_min, min_rows, clip_max, max_rows), (eps, eps_rows, step_size, step_rows)
    moved = apgd(adv, old, grad, x, *numbers, momentum, momentum_rows, bounds, descend, active)
    out.copy_(moved)
    if cast is not None:
        cast.copy_(moved)


@torch.no_grad()
def sample_neighbours(
    adv, radius, radius_rows, count, x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out
):
    bounds = clip_min, min_rows, clip_max, max_rows
    found = neighbours(adv, radius, radius_rows, count, x, eps, eps_rows, bounds, key, ids, draw)
    if found:
        out.copy_(torch.cat(found))


@torch.no_grad()
def pgd_step_neighbours(
    adv, grad, x, eps, eps_rows, step_size, step_rows, radius, radius_rows, count, project, include_x, clip_min,
    min_rows, clip_max, max_rows, descend, active, key, ids, draw, out,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    moved = step(adv, grad, x, eps, eps_rows, step_size, step_rows, bounds, descend, active)
    ball = x if project else None
    found = neighbours(moved, radius, radius_rows, count, ball, eps, eps_rows, bounds, key, ids, draw)
    out.copy_(torch.cat([*([x.to(moved.dtype)] if include_x else []), moved, *found]))
