"""The losses and their logit gradients in plain PyTorch, closed forms: the definition.

fp32 inside for 16-bit logits, fp64 for fp64. Softmax is taken relative to the largest logit's class (the first of equal
ones), whose probability is 1 / (1 + others): so log p and 1 - p keep their precision where p comes close to 1. A class
of probability 0 contributes 0. A NaN or +inf among the logits makes its row NaN and no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import formulas
from ...formulas import CE, KL, NONE
from ...layout import compute_dtype


class Softmax:
    """p, log p and 1 - p of each row."""

    def __init__(self, logits: Tensor) -> None:
        z = logits.to(compute_dtype(logits.dtype))
        top = z.argmax(1, keepdim=True)  # NaN counts as the largest
        z = z - z.gather(1, top)
        zero = z.gather(1, top)  # or NaN
        others = z.exp().scatter(1, top, zero).sum(1, keepdim=True)
        self.log_p = z - torch.log1p(others)
        self.p = z.exp() / (1 + others)
        self.rest = (1 - self.p).scatter(1, top, others / (1 + others))

    def minus(self, hot: Tensor) -> Tensor:
        """p - hot, where ``hot`` (bool) marks one class of each row."""
        return torch.where(hot, -self.rest, self.p)


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Where each row's class is."""
    return torch.arange(like.shape[1], device=like.device) == index[:, None]


def take(values: Tensor, index: Tensor) -> Tensor:
    """The value of each row's class; NaN where there is no such class (which the public functions refuse)."""
    there = index.clamp(0, values.shape[1] - 1)
    return torch.where(there == index, values.gather(1, there[:, None])[:, 0], torch.nan)


def ce_rows(s: Softmax, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    hot = one_hot(labels, s.p)
    loss, grad = -take(s.log_p, labels), s.minus(hot)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * s.log_p.mean(1)
        grad = grad + smoothing * (hot.to(grad.dtype) - 1 / s.p.shape[1])
    return loss, grad


def kl_rows(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) and its gradients to the logits of p and of q."""
    ratio = torch.where(p.p == 0, 0.0, p.log_p - q.log_p)
    loss = (p.p * ratio).sum(1)
    return loss, p.p * (ratio - loss[:, None]), q.p - p.p


def best_other(z: Tensor, labels: Tensor) -> Tensor:
    """The largest logit's class but the label's, the first of equal ones."""
    return z.clamp(min=torch.finfo(z.dtype).min).masked_fill(one_hot(labels, z), -torch.inf).argmax(1)


def margin_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.to(compute_dtype(logits.dtype))
    other = best_other(z, labels)
    loss = take(z, other) - take(z, labels)
    return _spread_nan(z, loss, one_hot(other, z).to(z.dtype) - one_hot(labels, z).to(z.dtype))


def dlr_rows(logits: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    z = logits.to(compute_dtype(logits.dtype))
    order = z.argsort(dim=1, descending=True, stable=True)
    first, low = order[:, 0], order[:, 2:3] if targets is None else order[:, 2:4]
    other = best_other(z, labels) if targets is None else targets
    n, d = take(z, labels) - take(z, other), take(z, first) - z.gather(1, low).mean(1) + 1e-12
    up = one_hot(labels, z).to(z.dtype) - one_hot(other, z).to(z.dtype)
    down = one_hot(first, z).to(z.dtype).scatter_add(1, low, torch.full_like(z.gather(1, low), -1 / low.shape[1]))
    return _spread_nan(z, -n / d, (n / d**2)[:, None] * down - up / d[:, None])


def _spread_nan(z: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    broken = z.isnan().any(1)
    return loss.masked_fill(broken, torch.nan), grad.masked_fill(broken[:, None], torch.nan)


def _write(loss, weights, scale, value, total, *grads):
    """The weighted losses, their scaled sum, and the scaled gradients that somebody wants."""
    factor = torch.full_like(loss, scale)
    if weights is not None:
        loss, factor = loss * weights, factor * weights
    value.copy_(loss)
    if total is not None:
        total.copy_(loss.sum() * scale)
    for out, grad in grads:
        if out is not None:
            out.copy_(grad * factor[:, None])


@torch.no_grad()
def cross_entropy(logits, labels, label_smoothing, weights, scale, value, total, grad):
    loss, d = ce_rows(Softmax(logits), labels, label_smoothing)
    _write(loss, weights, scale, value, total, (grad, d))


@torch.no_grad()
def kl_div(p_logits, q_logits, weights, scale, value, total, p_grad, q_grad):
    loss, dp, dq = kl_rows(Softmax(p_logits), Softmax(q_logits))
    _write(loss, weights, scale, value, total, (p_grad, dp), (q_grad, dq))


@torch.no_grad()
def trades_loss(logits, adv_logits, labels, beta, weights, scale, value, total, grad, adv_grad):
    p, q = Softmax(logits), Softmax(adv_logits)
    ce, d = ce_rows(p, labels)
    kl, dp, dq = kl_rows(p, q)
    _write(ce + beta * kl, weights, scale, value, total, (grad, d + beta * dp), (adv_grad, beta * dq))


@torch.no_grad()
def mart_loss(logits, adv_logits, labels, beta, weights, scale, value, total, grad, adv_grad):
    p, q = Softmax(logits), Softmax(adv_logits)
    other = best_other(q.log_p, labels)
    ce, dq = ce_rows(q, labels)
    room = take(q.rest, other) + (1e-4 + 1e-12)  # 1.0001 - q_m + 1e-12
    dq = dq - q.minus(one_hot(other, q.p)) * (take(q.p, other) / room)[:, None]
    wrong = (take(p.rest, labels) + 1e-7)[:, None]  # 1.0000001 - p_y
    ratio = torch.where(p.p == 0, 0.0, p.log_p - (q.p + 1e-12).log())
    kl = (p.p * ratio).sum(1, keepdim=True)
    r = p.p * q.p / (q.p + 1e-12)
    dq = dq + beta * wrong * (q.p * r.sum(1, keepdim=True) - r)
    dp = beta * (wrong * p.p * (ratio - kl) + kl * take(p.p, labels)[:, None] * p.minus(one_hot(labels, p.p)))
    _write(ce - room.log() + beta * (kl * wrong)[:, 0], weights, scale, value, total, (grad, dp), (adv_grad, dq))


@torch.no_grad()
def entropy(logits, weights, scale, value, total, grad):
    s = Softmax(logits)
    log_p = torch.where(s.p == 0, 0.0, s.log_p)
    loss = -(s.p * log_p).sum(1)
    _write(loss, weights, scale, value, total, (grad, -s.p * (log_p + loss[:, None])))


@torch.no_grad()
def margin_loss(logits, labels, weights, scale, value, total, grad):
    loss, d = margin_rows(logits, labels)
    _write(loss, weights, scale, value, total, (grad, d))


@torch.no_grad()
def dlr_loss(logits, labels, targets, weights, scale, value, total, grad):
    loss, d = dlr_rows(logits, labels, targets)
    _write(loss, weights, scale, value, total, (grad, d))


@torch.no_grad()
def logit_pairing(logits, adv_logits, weights, scale, value, total, grad, adv_grad):
    loss, d = _pairing(logits, adv_logits)
    _write(loss, weights, scale, value, total, (grad, d), (adv_grad, -d))


def _pairing(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    difference = a.to(compute_dtype(a.dtype)) - b.to(compute_dtype(b.dtype))
    return difference.square().sum(1), 2 * difference


@torch.no_grad()
def atlas_loss(
    logits, labels, local, local_weight, global_term, global_weight, weights, scale, value, total, grad, terms
):
    batch, first = len(labels), int(global_term != NONE)
    z = logits.view(logits.shape[0] // batch if batch else first + 1, batch, -1 if batch else logits.shape[1])
    x, adv, neighbours = z[0], z[first], z[first + 1 :]
    d = torch.zeros(z.shape, dtype=value.dtype, device=z.device)
    ce, d[first] = ce_rows(Softmax(adv), labels)
    local_loss, global_loss = torch.zeros_like(ce), torch.zeros_like(ce)

    for k, near in enumerate(neighbours, first + 1):
        if local == KL:
            loss, _, to_near = kl_rows(Softmax(adv), Softmax(near))
        elif local == CE:
            loss, to_near = ce_rows(Softmax(near), labels)
        else:
            loss, to_near = _pairing(near, adv)
            d[first] -= local_weight / len(neighbours) * to_near
        local_loss += loss / len(neighbours)
        d[k] = local_weight / len(neighbours) * to_near

    if global_term == KL:
        global_loss, to_x, to_adv = kl_rows(Softmax(x), Softmax(adv))
    elif global_term == CE:
        global_loss, to_x = ce_rows(Softmax(x), labels)
        to_adv = torch.zeros_like(to_x)
    elif first:
        global_loss, to_x = _pairing(x, adv)
        to_adv = -to_x
    if first:
        d[0] = global_weight * to_x
        d[1] += global_weight * to_adv

    if terms is not None:
        terms.copy_(torch.stack([ce, local_loss, global_loss]))
    loss = ce
    if len(neighbours):
        loss = loss + local_weight * local_loss
    if first:
        loss = loss + global_weight * global_loss
    _write(loss, weights, scale, value, total)
    if grad is not None:
        factor = torch.full_like(ce, scale) if weights is None else weights * scale
        grad.copy_((d * factor[:, None]).view_as(grad))


@torch.no_grad()
def gairat_weights(kappa, steps, lam, out):
    out.copy_(formulas.gairat_weights(kappa, steps, lam))
