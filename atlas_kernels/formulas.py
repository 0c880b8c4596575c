"""The losses per sample as plain PyTorch, differentiable any number of times and in any way: what second derivatives,
forward mode and the transforms of torch.func are taken of.

Arguments as the operators of the stems ``losses`` and ``pairwise`` have them; sources in ``losses.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import compute_dtype

KL, CE, LOGIT, NONE = range(4)  # the terms of atlas_loss, as in csrc/api.h


def _wide(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits.dtype))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    z = _wide(logits)
    loss = F.cross_entropy(z, labels, reduction="none")
    if not label_smoothing:
        return loss
    return _times(1 - label_smoothing, loss) - (label_smoothing / z.shape[1] * z.log_softmax(1)).sum(1)


def soft_cross_entropy(logits: Tensor, distributions: Tensor, label_smoothing: float = 0.0) -> Tensor:
    z, t = _wide(logits), (1 - label_smoothing) * distributions + label_smoothing / logits.shape[1]
    return -(t * torch.where(t == 0, 0.0, z.log_softmax(1))).sum(1)


def kl_div(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = _wide(p_logits).log_softmax(1), _wide(q_logits).log_softmax(1)
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(1)


def trades_loss(logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    return cross_entropy(logits, labels) + _times(beta, kl_div(logits, adv_logits))


def mart_loss(logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    p, q = _wide(logits).softmax(1), _wide(adv_logits).softmax(1)
    other = _but(q, labels).max(1).values
    bce = cross_entropy(adv_logits, labels) - (1.0001 - other + 1e-12).log()
    kl = (p * torch.where(p == 0, 0.0, _wide(logits).log_softmax(1) - (q + 1e-12).log())).sum(1)
    return bce + beta * kl * (1.0000001 - _of(p, labels))


def entropy(logits: Tensor) -> Tensor:
    log_p = _wide(logits).log_softmax(1)
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(1)


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    z = _wide(logits)
    return _but(z, labels).max(1).values - _of(z, labels)


def dlr_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    z = _wide(logits) / 2  # halves stay finite
    top = z.sort(dim=1, descending=True, stable=True).values
    if targets is None:
        return margin_loss(z, labels) / (top[:, 0] - top[:, 2] + 0.5e-12)
    return (_of(z, targets) - _of(z, labels)) / ((top[:, :1] / 2 - top[:, 2:4] / 2).sum(1) + 0.5e-12)


def logit_pairing(logits: Tensor, adv_logits: Tensor) -> Tensor:
    half = _wide(logits) / 2 - _wide(adv_logits) / 2  # whose gradient stays finite
    return 4 * (half * half).sum(1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = _wide(p_logits).log_softmax(1), _wide(q_logits).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    # What is 0 gets another number before anything infinite is differentiated.
    log_p, log_q = torch.where(p == 0, -torch.inf, log_p), torch.where(q == 0, -torch.inf, log_q)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_p, of_q = (torch.where(r == 0, 0.0, log_r - log_m) for r, log_r in ((p, log_p), (q, log_q)))
    return 0.5 * (p * of_p + q * of_q).sum(1)


def consistency_loss(
    logits: Tensor, other_logits: Tensor, labels: Tensor | None, distributions: Tensor | None, distance: int,
    distance_weight: float, weight_tensor: Tensor | None, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, [CE, distance] without gradient)."""
    if distributions is not None:
        ce = soft_cross_entropy(logits, distributions, label_smoothing)
    else:
        assert labels is not None
        ce = cross_entropy(logits, labels, label_smoothing)
    apart = _DISTANCES[distance](other_logits, logits)
    terms = torch.stack([ce, apart]).detach()
    if weight_tensor is None:
        return ce + _times(distance_weight, apart), terms
    out = (weight_tensor == 0) & apart.isinf()  # which must not be infinite anywhere on its way
    blank = (torch.where(out[:, None], 0.0, t) for t in (other_logits, logits))
    return ce + weight_tensor * _DISTANCES[distance](*blank), terms


def atlas_loss(
    logits: Tensor, labels: Tensor, local: int, local_weight: float, global_term: int, global_weight: float
) -> tuple[Tensor, Tensor]:
    """(loss, [CE, LOCAL, GLOBAL] without gradient)."""
    first = int(global_term != NONE)
    parts = logits.split(len(labels)) if len(labels) else [logits] * (first + 1)
    adv, neighbours = parts[first], parts[first + 1 :]
    ce = loss = cross_entropy(adv, labels)
    near = far = torch.zeros_like(ce)
    centre = adv.detach() if local == KL else adv
    if neighbours:
        near = torch.stack([_term(local, centre, z, z, labels) / len(neighbours) for z in neighbours]).sum(0)
        loss = loss + _times(local_weight, near)
    if first:
        far = _term(global_term, parts[0], adv, parts[0], labels)
        loss = loss + _times(global_weight, far)
    return loss, torch.stack([ce, near, far]).detach()


def _probability_distance(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    difference = _wide(p_logits).softmax(1) - _wide(q_logits).softmax(1)
    return (difference * difference).sum(1)


_DISTANCES = (logit_pairing, _probability_distance, jensen_shannon, kl_div)  # numbered as in csrc/api.h


def loss_and_terms(made: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What a formula of this file made, with its terms, where it has some."""
    return made if isinstance(made, tuple) else (made, None)


def compactness(h: Tensor, h_adv: Tensor, labels: Tensor, scale: float, squared: bool, factor: float) -> Tensor:
    clean, rows = _wide(h), []
    for adversary, label in zip(_wide(h_adv), labels, strict=True):
        difference = adversary - clean
        distance = (difference * difference if squared else difference.abs()).sum(1)
        rows.append(torch.where(labels == label, distance, (1.0 - 1.0 / scale) * distance).sum())
    return factor * (torch.stack(rows) if rows else clean.sum(1))


def nuclear_norm(d: Tensor) -> Tensor:
    """Of the singular values that are not roundings of 0 (see ``nuclear_norm.py``)."""
    d = _wide(d)
    if not d.numel():
        return d.sum()
    bad = (d.detach() - d.detach()).sum()  # NaN, where an entry is not finite: there PyTorch's SVD would raise
    lengths = torch.linalg.svdvals(torch.where(bad == 0, d, 0.0))
    least = max(d.shape) * torch.finfo(d.dtype).eps * lengths[:1].detach()
    return torch.where(lengths > least, lengths, 0.0).sum() + (bad * d).sum()


def batch_norm_double_backward(
    x: Tensor,
    g: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    weight_cotangent: Tensor | None,
    bias_cotangent: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives by g, x and weight of ``<v, w r (g - avg(g) - xhat avg(g xhat))>`` (in training; ``<v, w r g>``
    where mean and invstd are constants) plus ``<weight_cotangent, sum(g xhat)> + <bias_cotangent, sum(g)>``, the
    first gradients of BatchNorm. xhat = r (x - mean), r = invstd; sums and averages are over each channel."""
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    r = invstd.view(shape)
    xhat, s = (x - mean.view(shape)) * r, r if weight is None else r * weight.view(shape)

    def average(u: Tensor) -> Tensor:
        return u.mean(dims, keepdim=True)

    def rest(u: Tensor) -> Tensor:
        """What the first backward leaves of u in training: nothing along 1 and xhat."""
        return u - average(u) - xhat * average(u * xhat) if training else u

    left = rest(v)
    by_g, by_weight = s * left, (left * g).sum(dims) * invstd
    if training:
        along = average(g * xhat) * left + average(v * xhat) * rest(g)
        by_x = -s * r * (xhat * average(left * g) + along)
    else:
        by_x = torch.zeros_like(x)
    if weight_cotangent is not None:
        by_g, by_x = by_g + weight_cotangent.view(shape) * xhat, by_x + weight_cotangent.view(shape) * r * rest(g)
    if bias_cotangent is not None:
        by_g = by_g + bias_cotangent.view(shape)
    return by_g, by_x, by_weight


def gairat_weights(kappa: Tensor, steps: int, lam: float) -> Tensor:
    half = steps // 2
    log_weights = F.logsigmoid(2 * lam + 10 / half * (half - kappa.double()))
    return len(kappa) * log_weights.softmax(0)  # relative to the largest, so that not all can underflow


def _times(weight: float, term: Tensor) -> Tensor:
    """``weight * term``; of weight 0 it is left out, though it may be infinite, but for a NaN."""
    return weight * term if weight else torch.where(term.isnan(), term, 0.0).detach()


def _term(kind: int, a: Tensor, b: Tensor, judged: Tensor, labels: Tensor) -> Tensor:
    if kind == KL:
        return kl_div(a, b)
    return cross_entropy(judged, labels) if kind == CE else logit_pairing(a, b)


def _of(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])[:, 0]


def _but(values: Tensor, labels: Tensor) -> Tensor:
    return values.scatter(1, labels[:, None], -torch.inf)
