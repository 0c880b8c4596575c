"""ATLAS's LOCAL terms of second order: what the gradients of the logits at the adversary say of the ball around it.

``x`` [B, ...] are the adversaries, a leaf that the logits [B, C] were computed from; every term is float32 [B] (float64
for float64 logits) with a graph to the parameters. ``ATLAS`` says what they are and what speaks for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options import Norm
from .double_backward import pulled_back
from .terms import wide


def margin_penalty(logits: Tensor, x: Tensor, labels: Tensor, radius: float, norm: Norm = "linf") -> Tensor:
    """``r ||grad (z_y - z_j)||_1``, j the wrong class of the largest logit: what the ball of radius r can take off the
    margin, to first order."""
    return radius * _slope(logits, x, labels, _rivals(logits, labels, 1)[:, 0], norm)


def radius_penalty(logits: Tensor, x: Tensor, labels: Tensor, r0: float, rivals: int, norm: Norm = "linf") -> Tensor:
    """``softplus(1 - rho / r0)``, rho = first_order_radius."""
    return F.softplus(1 - first_order_radius(logits, x, labels, rivals, norm) / r0)


def first_order_radius(logits: Tensor, x: Tensor, labels: Tensor, rivals: int, norm: Norm = "linf") -> Tensor:
    """``min_j (z_y - z_j) / ||grad (z_y - z_j)||_1`` over the ``rivals`` wrong classes of the largest logits; 0 where x
    is misclassified. The minimum has the gradient of the class that attains it, so the search for that needs none."""
    classes = _rivals(logits, labels, rivals)
    nearest = classes[:, 0]
    if classes.shape[1] > 1:
        distances = [_distance(logits, x, labels, j, norm, create_graph=False) for j in classes.unbind(1)]
        nearest = classes.gather(1, torch.stack(distances).argmin(0)[:, None])[:, 0]
    return _distance(logits, x, labels, nearest, norm)


def _distance(
    logits: Tensor, x: Tensor, labels: Tensor, other: Tensor, norm: Norm, *, create_graph: bool = True
) -> Tensor:
    own, rival = (wide(logits).gather(1, c[:, None])[:, 0] for c in (labels, other))
    slope = _slope(logits, x, labels, other, norm, create_graph=create_graph)
    return (own - rival).clamp_min(0) / slope.clamp_min(1e-12)  # a dead network has slope 0


def _slope(
    logits: Tensor, x: Tensor, labels: Tensor, other: Tensor, norm: Norm, *, create_graph: bool = True
) -> Tensor:
    """``||grad (z_y - z_other)||`` in the dual of the norm: l1 for l_inf, l2 for itself, l_inf for l1."""
    v = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0).scatter_(1, other[:, None], -1.0)
    grad = pulled_back(logits, x, v, create_graph=create_graph)
    return grad.abs().sum(1) if norm == "linf" else torch.linalg.vector_norm(grad, 2 if norm == "l2" else torch.inf, 1)


def _rivals(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The wrong classes of the largest logits, largest first: int64 [B, count], or all of them if there are fewer."""
    wrong = logits.detach().scatter(1, labels[:, None], -torch.inf)
    return wrong.topk(min(count, logits.shape[1] - 1), dim=1).indices
