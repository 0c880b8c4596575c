"""The pairwise losses in plain PyTorch: the definition, one adversary after another."""

from __future__ import annotations

import torch

from ...layout import compute_dtype


@torch.no_grad()
def compactness(h, h_adv, labels, scale, squared, factor, value, total, grad, adv_grad):
    dtype = compute_dtype(h.dtype)
    weights = torch.tensor([1.0 - 1.0 / scale, 1.0], dtype=dtype, device=h.device)
    clean, rows = h.to(dtype), weights.new_zeros(h.shape[0])
    slopes = torch.zeros_like(clean, dtype=torch.float64)  # sums over all adversaries, one after another
    for i, adversary in enumerate(h_adv.to(dtype)):
        weight = weights[(labels == labels[i]).long()].unsqueeze(1)
        difference = adversary - clean
        rows[i] = (weight * (difference.square() if squared else difference.abs())).sum()
        slope = factor * weight * (2.0 * difference if squared else difference.sign())
        if adv_grad is not None:
            adv_grad[i] = slope.sum(0)
        if grad is not None:
            slopes.sub_(slope)
    if grad is not None:
        grad.copy_(slopes)
    if value is not None:
        value.copy_(factor * rows)
    if total is not None:
        total.copy_(factor * rows.sum())
