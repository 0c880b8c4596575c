"""What methods share beside the fused losses; logits are [B, C]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atlas_kernels import cross_entropy

from ..data import Batch
from ..noise import normal


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the batch whose largest logit is the label's; a 0-dim float32 tensor, detached."""
    return (logits.detach().argmax(1) == y).float().mean()


def near_start(batch: Batch, key: Tensor) -> Tensor:
    """The start of TRADES and its relatives: x + 0.001 normal noise, not clipped, as in their published code."""
    return batch.x + 0.001 * normal(batch.x, key, batch.ids, 0)


@torch.no_grad()
def update_statistics(model: nn.Module, x: Tensor) -> None:
    """A forward whose only use is to move BatchNorm's running statistics, as some published code does by the way."""
    model(x)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` wraps it: compiled code has no double backward."""
    return getattr(model, "_orig_mod", model)


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sample [B] and its gradient at x [B, ...], both with a graph to the parameters.

    Every gradient is that of the sum over the batch, as published; with BatchNorm in train mode rows are coupled.
    """
    leaf = x.detach().requires_grad_()
    losses = cross_entropy(uncompiled(model)(leaf), y, reduction="none")
    return losses, torch.autograd.grad(losses.sum(), leaf, create_graph=True)[0]


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 if it is that: what a penalty is computed in under autocast."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def pulled_back(logits: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = True) -> Tensor:
    """``J^T v`` of each sample, [B, D], J = dz/dx, v [B, C]; with a graph to the parameters unless told otherwise.

    x: a leaf that requires a gradient, from which the logits were computed. Row b is the derivative of the whole
    batch's ``sum_i v_i . z_i``: with BatchNorm in train mode the rows are coupled.
    """
    (grad,) = torch.autograd.grad(logits, x, v.to(logits.dtype), retain_graph=True, create_graph=create_graph)
    return wide(grad).flatten(1)


def squared_projections(logits: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """``||J^T v||^2`` of each sample, [B] (Hoffman, Roberts & Yaida 2019); arguments as in ``pulled_back``."""
    return pulled_back(logits, x, v).square().sum(1)
