"""The losses per sample as plain PyTorch, differentiable any number of times: what a second derivative is taken of.

Arguments as the operators of the stem ``losses`` have them; sources in ``losses.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import compute_dtype

KL, CE, LOGIT, NONE = range(4)  # the terms of atlas_loss, as in csrc/api.h


def _wide(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits.dtype))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(_wide(logits), labels, reduction="none", label_smoothing=label_smoothing)


def kl_div(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = _wide(p_logits).log_softmax(1), _wide(q_logits).log_softmax(1)
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(1)


def trades_loss(logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    return cross_entropy(logits, labels) + beta * kl_div(logits, adv_logits)


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
    z = _wide(logits)
    top = z.sort(dim=1, descending=True, stable=True).values
    if targets is None:
        return margin_loss(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)
    return (_of(z, targets) - _of(z, labels)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def logit_pairing(logits: Tensor, adv_logits: Tensor) -> Tensor:
    return (_wide(logits) - _wide(adv_logits)).square().sum(1)


def atlas_loss(
    logits: Tensor, labels: Tensor, local: int, local_weight: float, global_term: int, global_weight: float
) -> Tensor:
    first = int(global_term != NONE)
    parts = logits.split(len(labels)) if len(labels) else [logits] * (first + 1)
    adv, neighbours = parts[first], parts[first + 1 :]
    loss = cross_entropy(adv, labels)
    centre = adv.detach() if local == KL else adv
    for z in neighbours:
        loss = loss + local_weight / len(neighbours) * _term(local, centre, z, z, labels)
    return loss + global_weight * _term(global_term, parts[0], adv, parts[0], labels) if first else loss


def gairat_weights(kappa: Tensor, steps: int, lam: float) -> Tensor:
    half = steps // 2
    log_weights = F.logsigmoid(2 * lam + 10 / half * (half - kappa.double()))
    return len(kappa) * log_weights.softmax(0)  # relative to the largest, so that not all can underflow


def _term(kind: int, a: Tensor, b: Tensor, judged: Tensor, labels: Tensor) -> Tensor:
    if kind == KL:
        return kl_div(a, b)
    return cross_entropy(judged, labels) if kind == CE else logit_pairing(a, b)


def _of(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])[:, 0]


def _but(values: Tensor, labels: Tensor) -> Tensor:
    return values.scatter(1, labels[:, None], -torch.inf)
