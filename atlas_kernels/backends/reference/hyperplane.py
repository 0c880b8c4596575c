"""FAB's step towards a hyperplane in plain PyTorch: the definition. The searches are exact, by sorting, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...layout import column, compute_dtype
from ...schema import L1, L2, LINF, NORMS
from .perturb import clip, rows
from .perturb_norms import flat

FAR = 2.0**60  # a pixel goes no further: in an infinite range, products with its room stay numbers
SHORT = 1e-8  # the least length of a way, so that two ways of length 0 have a ratio


def way(point: Tensor, normal: Tensor, gap: Tensor, norm: str, low: Tensor, high: Tensor) -> Tensor:
    """The shortest way from ``point`` to the plane ``gap + normal (z - point) = 0`` inside the range: the projection,
    minus the point. Where the range does not reach the plane: all the way to its corner nearest to the plane. Where
    normal or gap are not finite: none. gap: fp64 [B].

    Every pixel moves towards the plane. In l_inf by lambda, in l2 by lambda times its normal, or as far as it has room;
    in l1 the pixels of the largest normals move as far as they can, and those that tie for the last place by equal
    parts of that. What the ways gain, ``normal * way``, is a piecewise linear function of lambda (in l1 a step function
    of the normal), whose pieces are in order once the points are sorted at which a pixel is used up.
    """
    m, target = flat(normal.double().abs()), gap.double().abs().view(-1, 1)
    usable = target.isfinite() & m.sum(1, keepdim=True).isfinite()
    target, m = torch.where(usable, target, 0.0), torch.where(usable, m, 0.0)
    up = (normal > 0) == column(gap < 0, normal)
    space = torch.where(up, high - point, point - low)
    space = torch.where(space > 0, torch.where(space < FAR, space, FAR), 0.0)
    room = flat(space.double())
    if norm == L1:
        ordered, order = m.sort(1, descending=True)
        gained = (ordered * room.gather(1, order)).cumsum(1)
        last = torch.where(gained >= target, ordered, 0.0).amax(1, keepdim=True)
        above, tied = ((m * room * those).sum(1, keepdim=True) for those in (m > last, m == last))
        part = torch.where(tied > 0, (target - above) / torch.where(tied > 0, tied, 1.0), 0.0)
        far = torch.where(m > last, 1.0, torch.where(m == last, part, 0.0)).to(point.dtype).view_as(point) * space
    else:
        unit = m if norm == L2 else torch.ones_like(m)
        end = torch.where(m > 0, room / unit, math.inf)  # where a pixel is used up
        end, order = end.sort(1)
        weight, spent = (m * unit).gather(1, order), (m * room).gather(1, order)
        free = weight.flip(1).cumsum(1).flip(1)  # from a pixel on, none is used up
        spent = torch.where(end < math.inf, spent, 0.0).cumsum(1)
        before = torch.cat([torch.zeros_like(spent[:, :1]), spent[:, :-1]], 1)
        reached = (before + torch.where(end < math.inf, end, 0.0) * free >= target) & (free > 0)
        first = reached.to(torch.int8).argmax(1, keepdim=True)
        root = (target - before.gather(1, first)) / free.gather(1, first)
        root = torch.where(reached.any(1, keepdim=True), root, math.inf)
        far = (root * unit).to(point.dtype).view_as(point)
        far = torch.where(far < space, far, space)
    far = torch.where(m.view_as(point) > 0, far, 0.0)
    return torch.where(up, far, -far)


def length(way: Tensor, norm: str) -> Tensor:
    """Of the way of each sample, fp64 [B]."""
    d = flat(way.double().abs())
    return d.amax(1) if norm == LINF else d.square().sum(1).sqrt() if norm == L2 else d.sum(1)


@torch.no_grad()
def hyperplane_step(
    adv, grad, x, gap, norm, alpha_max, overshoot, clip_min, clip_min_rows, clip_max, clip_max_rows, out
):
    if not adv.numel():
        return
    dtype, norm = compute_dtype(adv.dtype), NORMS[norm]
    point, clean, normal = adv.to(dtype), x.to(dtype), grad.to(dtype)
    low, high = rows(clip_min, clip_min_rows, adv, dim=1), rows(clip_max, clip_max_rows, adv, dim=1)
    gap = gap.double()
    from_x = gap + flat(normal.double() * (clean.double() - point.double())).sum(1)
    ways = way(point, normal, gap, norm, low, high), way(clean, normal, from_x, norm, low, high)
    here, there = (length(d, norm).clamp_min(SHORT) for d in ways)
    alpha = column((here / (here + there)).clamp_max(alpha_max).to(dtype), adv)
    moved, back = (p + d * overshoot for p, d in zip((point, clean), ways, strict=True))
    out.copy_(clip(moved * (1 - alpha) + back * alpha, low, high))
