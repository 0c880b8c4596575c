"""What methods share that differentiate a gradient at the input once more, by the weights; logits are [B, C].

``torch.compile`` has no double backward, so such terms run the network as it is (``uncompiled``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas_kernels import attack_cotangent, cross_entropy
from atlas_kernels.attacks import float16
from atlas_kernels.double_backward import FastDoubleBackward
from atlas_kernels.layout import column
from atlas_kernels.outputs import logits_of
from atlas_kernels.vjp import vjp

from ..data import Batch
from ..noise import normal
from .terms import uncompiled, wide


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """For forwards whose gradient is differentiated again: attention by its plain kernel, as the fused ones cannot, and
    convolutions and BatchNorm with cheap second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), FastDoubleBackward():
        yield


def loss_gradient(model: nn.Module, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at x, cross-entropy of each sample [B] with the batch's labels and its gradient at x [B, ...], all with a
    graph to the parameters.

    The gradient is that of the sum over the batch: of each sample's own loss, but for what BatchNorm in train mode
    couples.
    """
    leaf = x.detach().requires_grad_()
    with twice_differentiable():
        logits = logits_of(uncompiled(model)(leaf))
    losses = batch.over_labels(lambda y: cross_entropy(logits, y, reduction="none"))
    if not float16.is_used(model, leaf, logits):
        return logits, losses, torch.autograd.grad(losses.sum(), leaf, create_graph=True)[0]
    cotangent = batch.over_labels(lambda y: cross_entropy_cotangent(wide(logits.detach()), y))
    unit = float16.unit_of(cotangent, coupled=float16.are_coupled(model))[:, 0]
    (grad,) = torch.autograd.grad((losses / unit).sum(), leaf, create_graph=True)
    return logits, losses, grad * column(unit, x)


def cross_entropy_cotangent(logits: Tensor, y: Tensor) -> Tensor:
    """The derivative of each sample's cross-entropy by its logits, [B, C]."""
    cotangent = attack_cotangent(logits, y).cotangent
    assert cotangent is not None
    return cotangent


def pulled_back(logits: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = True) -> Tensor:
    """``J^T v`` of each sample, [B, D], J = dz/dx, v [B, C]; with a graph to the parameters unless told otherwise.

    x: a leaf that requires a gradient, from which the logits were computed. Row b is the derivative of the whole
    batch's ``sum_i v_i . z_i``: with BatchNorm in train mode the rows are coupled.
    """
    return wide(vjp(logits, x, v, retain_graph=True, create_graph=create_graph)).flatten(1)


def squared_projections(logits: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """``||J^T v||^2`` of each sample, [B] (Hoffman, Roberts & Yaida 2019); arguments as in ``pulled_back``."""
    return pulled_back(logits, x, v).square().sum(1)


def jacobian_penalty(logits: Tensor, x: Tensor, directions: Tensor) -> Tensor:
    """``C/2 mean_m ||J^T v_m||^2``, v = directions [B, count, C]; ``||J||_F^2 / 2`` on average over unit vectors."""
    each = [squared_projections(logits, x, v) for v in directions.unbind(1)]
    return logits.shape[1] / 2 * torch.stack(each).mean(0)


def unit_vectors(logits: Tensor, key: Tensor, ids: Tensor, count: int) -> Tensor:
    """``count`` random directions in the space of the logits for each sample, [B, count, C] of length 1."""
    like = torch.empty(len(logits), count, logits.shape[1], dtype=wide(logits).dtype, device=logits.device)
    return F.normalize(normal(like, key, ids, 1), dim=2)
