"""Adversarial weight perturbation (AWP; Wu, Xia & Wang 2020, arXiv 2004.05884): an attack on weights, not on images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..layout import compute_dtype


@torch.no_grad()
def weight_directions(weights: Iterable[tuple[str, Tensor]], gradients: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Per weight, its gradient scaled to the weight's own norm, ``||w|| g / ||g||``: gamma of it is the perturbation.

    weights: ``model.named_parameters()``; those with one dimension, or without "weight" in their name, are left out, as
    in the published code. gradients: of the loss to climb, in the same order. The published code takes the same
    direction from one step of a copy of the network, whose learning rate cancels.
    """
    chosen = [(n, w, g) for (n, w), g in zip(weights, gradients, strict=True) if w.ndim > 1 and "weight" in n]
    found = [(name, weight, g) for name, weight, g in chosen if g is not None]
    if not found:
        return {}
    _, *both = zip(*found, strict=True)
    own, grads = ([t.to(compute_dtype(t.dtype)) for t in tensors] for tensors in both)  # 1e-20 is 0 in float16
    norms = zip(torch._foreach_norm(own), torch._foreach_norm(grads), strict=True)
    scales = [weight / (gradient + 1e-20) for weight, gradient in norms]
    directions = zip(found, torch._foreach_mul(grads, scales), strict=True)
    return {name: direction.to(weight.dtype) for (name, weight, _), direction in directions}
