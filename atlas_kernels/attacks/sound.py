"""What makes an adversary count: how far it is, computed in double precision, and the point next to it that is in the
ball for certain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import column
from ..schema import L1, LINF
from .batch import Batch

#: How far inside the ball a point must be, as a share of eps, for no sum of squares in double precision, however it is
#: added up, to say that it is outside.
_MARGIN = 2.0**-36


def distances(points: Tensor, x: Tensor, norm: str) -> Tensor:
    """The norms of ``points - x`` per sample, float64[B]."""
    made = torch.empty(len(x), dtype=torch.float64, device=x.device)
    order = {LINF: torch.inf, L1: 1.0}.get(norm, 2.0)
    for rows in torch.arange(len(x), device=x.device).split(1024):  # doubles take room
        made[rows] = torch.linalg.vector_norm((points[rows].double() - x[rows].double()).flatten(1), order, dim=1)
    return made


def within(batch: Batch, points: Tensor) -> Tensor:
    """``points`` brought into range and ball, so that their distances, too, are not above eps.

    A projection is as good as its dtype: x + eps is rounded, and so may lie beyond the ball by half a unit in the last
    place of the pixel. Here each pixel that must move is rounded towards x.
    """
    x, points = batch.x, batch.inside(points)
    away = points.double() - x.double()
    eps = torch.as_tensor(batch.eps, dtype=away.dtype, device=away.device)
    if batch.norm == LINF:
        limit = column(eps, x) if eps.ndim else eps
        away = away.clamp(-limit, limit)
    else:
        length = distances(points, x, batch.norm)
        most = eps * (1 - _MARGIN)
        share = torch.where(length > most, most / length, 1.0)
        away = away * column(share, x)
    kept = (x.double() + away).to(x.dtype)
    return torch.where((kept.double() - x.double()).abs() > away.abs(), torch.nextafter(kept, x), kept)
