"""The nuclear norm in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from ...layout import compute_dtype


@torch.no_grad()
def nuclear_norm(d, value, grad):
    scale, counted, longest = d.double(), 0.0, max(d.shape)
    if not bool(scale.isfinite().all()):
        counted = torch.nan
    elif scale.any():
        # Near 1, for squares that stay finite in whatever computes them.
        _, exponent = torch.frexp(scale.abs().max())
        left, lengths, right = torch.linalg.svd(torch.ldexp(scale, -exponent), full_matrices=False)
        counts = lengths > longest * torch.finfo(compute_dtype(d.dtype)).eps * lengths[0]
        value.copy_(torch.ldexp(lengths[counts].sum(), exponent))
        if grad is not None:
            grad.copy_((left * counts) @ right)
        return
    value.fill_(counted)
    if grad is not None:
        grad.fill_(counted)
