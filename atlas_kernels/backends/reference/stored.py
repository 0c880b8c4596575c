"""FGSM-PGI's stored perturbations in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from ...layout import column, compute_dtype
from .perturb import clip, rows, to_range


def _rows_of(store, index, like):
    """Row ``index`` of the store for each sample, in the compute type, and whether it has that row."""
    there = (index >= 0) & (index < len(store))
    if not len(store):
        return torch.zeros_like(like, dtype=compute_dtype(like.dtype)), there
    return store[torch.where(there, index, 0)].to(compute_dtype(like.dtype)), there


def start(x, stored, index, bounds):
    found, there = _rows_of(stored, index, x)
    return torch.where(column(there, x), to_range(x.to(found.dtype) + found, *bounds), torch.nan)


@torch.no_grad()
def stored_start(x, stored, index, clip_min, min_rows, clip_max, max_rows, out):
    out.copy_(start(x, stored, index, (clip_min, min_rows, clip_max, max_rows)))


@torch.no_grad()
def stored_step(
    x, grad, stored, momentum, index, eps, eps_rows, step_size, step_rows, decay, clip_min, min_rows, clip_max,
    max_rows, out,
):  # fmt: skip
    dtype = compute_dtype(x.dtype)
    d, there = _rows_of(stored, index, x)
    m, _ = _rows_of(momentum, index, x)
    g, centre = grad.to(dtype), x.to(dtype)
    radius, step = rows(eps, eps_rows, x), rows(step_size, step_rows, x)
    low, high = rows(clip_min, min_rows, x, dim=1), rows(clip_max, max_rows, x, dim=1)

    def moved(direction):
        return clip(d + step * torch.sign(direction), radius * -1.0, radius)

    adv = torch.where(column(there, x), clip(centre + moved(g), low, high), torch.nan)
    norm = g.abs().sum(dtype=torch.float64).to(dtype)
    next_m = g / norm + rows(decay, None, x) * m
    next_d = clip(moved(next_m), low - centre, high - centre)
    usable, known = (norm > 0) & norm.isfinite(), index[there]
    for store, made in ((stored, next_d), (momentum, next_m)):
        store[known] = torch.where(usable, made[there].to(store.dtype), store[known])
    out.copy_(adv)
