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
        self.z, self.top = z, z.gather(1, top)
        self.half_below = self.top / 2 - z / 2  # which stays finite
        z = z - self.top
        zero = z.gather(1, top)  # or NaN
        others = z.exp().scatter(1, top, zero).sum(1, keepdim=True)
        self.others = others
        self.log_sum = torch.log1p(others)
        self.log_p = z - self.log_sum
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
        below = (2 * smoothing / s.p.shape[1] * s.half_below).sum(1)
        loss = times(1 - smoothing, loss) + below + smoothing * s.log_sum[:, 0]
        grad = grad + smoothing * (hot.to(grad.dtype) - 1 / s.p.shape[1])
    return loss, grad


def soft_rows(s: Softmax, t: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """CE of distributions, and its gradient: at the largest logit from what p and t lack of the whole."""
    t = t * (1 - smoothing) + smoothing / t.shape[1]
    total, below = t.sum(1), torch.where(t == 0, 0.0, 2 * t * s.half_below).sum(1)
    first = one_hot(s.half_below.argmin(1), s.p)
    others = t.masked_fill(first, 0.0).sum(1)
    plain, at_first = total[:, None] * s.p - t, others[:, None] - total[:, None] * s.rest
    return below + total * s.log_sum[:, 0], torch.where(first, at_first, plain)


def twins(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """(p - q, log(p / m), log(q / m)) with m = (p + q) / 2. Nothing of it cancels where p is close to q: log p - log q
    is as precise as it is small, since the sums of the powers are compared power by power where they are close."""
    close = (p.top - q.top).abs() <= 1
    apart = torch.where(close, (p.z - q.z) - (p.top - q.top), (p.z - p.top) - (q.z - q.top))
    here, there = p.p * ((1 + p.others) / (1 + q.others)), q.p
    share = torch.where(apart.abs() < 0.5, there * torch.expm1(apart), here - there).sum(1, keepdim=True)
    ratio = apart - torch.where(share.abs() < 0.25, torch.log1p(share), p.log_sum - q.log_sum)
    less = torch.expm1(-ratio.abs())
    larger = -torch.log1p(less / 2)
    smaller = larger - ratio.abs()
    both, more = p.p + q.p, ratio > 0
    difference = torch.where(both == 0, 0.0, both * (-less / (2 + less)) * ratio.sign())
    return difference, torch.where(more, larger, smaller), torch.where(more, smaller, larger)


def probability_rows(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """||p - q||^2 and half of its gradients to the logits of p and of q."""
    d, _, _ = twins(p, q)
    return (d * d).sum(1), _pull(p.p, d), _pull(q.p, -d)


def js_rows(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """Jensen-Shannon and twice its gradients to the logits of p and of q."""
    d, log_p, log_q = twins(p, q)
    both = p.p + q.p
    square = torch.where(both == 0, 0.0, d / both).square()
    # ((1 + u) log(1 + u) + (1 - u) log(1 - u)) / u^2 with u^2 the square, by its series
    series = sum(square**k / ((k + 1) * (2 * k + 1)) for k in range(13))
    apart = (_unless_zero(p.p, log_p) + _unless_zero(q.p, log_q)) / 2
    rows = torch.where(square < 0.0625, both / 4 * square * series, apart)
    return rows.sum(1), _pull(p.p, log_p), _pull(q.p, log_q)


def _pull(p: Tensor, amount: Tensor) -> Tensor:
    """What moves probabilities by amounts, as a gradient to their logits."""
    return _unless_zero(p, amount - _unless_zero(p, amount).sum(1, keepdim=True))


def _unless_zero(p: Tensor, v: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * v)


def kl_rows(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) and its gradients to the logits of p and of q."""
    ratio = torch.where(p.p == 0, 0.0, p.log_p - q.log_p)
    loss = (p.p * ratio).sum(1)
    # Where the loss is infinite, the limit as q goes to 0.
    slope = torch.where(ratio == torch.inf, ratio, ratio - loss[:, None])
    return loss, torch.where(p.p == 0, 0.0, p.p * slope), q.p - p.p


def best_other(z: Tensor, labels: Tensor) -> Tensor:
    """The largest logit's class but the label's, the first of equal ones."""
    return z.clamp(min=torch.finfo(z.dtype).min).masked_fill(one_hot(labels, z), -torch.inf).argmax(1)


def times(weight: Tensor | float, value: Tensor) -> Tensor:
    """``weight * value``, and 0 where the weight is 0, though the value may be infinite; a NaN stays."""
    if isinstance(weight, float):
        return weight * value if weight else value.masked_fill(~value.isnan(), 0.0)
    return torch.where((weight == 0) & ~value.isnan(), 0.0, weight * value)


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
    # In halves, which stay finite.
    n = take(z, labels) / 2 - take(z, other) / 2
    # Differences are exact where logits are close; a mean would be rounded before it is taken away.
    parts = 2 * low.shape[1]
    d = (take(z, first)[:, None] / parts - z.gather(1, low) / parts).sum(1) + 0.5e-12
    ratio = (n / d)[:, None]
    up = one_hot(labels, z).to(z.dtype) - one_hot(other, z).to(z.dtype)
    down = torch.where(one_hot(first, z), ratio, 0.0).scatter_add(1, low, (-ratio / low.shape[1]).expand_as(low))
    return _spread_nan(z, -ratio[:, 0], (down - up) / d[:, None] / 2)


def _spread_nan(z: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    broken = z.isnan().any(1)
    return loss.masked_fill(broken, torch.nan), grad.masked_fill(broken[:, None], torch.nan)


def _write(loss, weights, scale, value, total, *grads):
    """The weighted losses, their scaled sum, and the scaled gradients: where each goes (None: nowhere), and its parts,
    each a weight and what it weighs."""
    factor = torch.full_like(loss, scale)
    if weights is not None:
        loss, factor = times(weights, loss), factor * weights
    value.copy_(loss)
    if total is not None:
        total.copy_((loss * scale).sum() if len(loss) else loss.sum() * scale)
    for out, *parts in grads:
        if out is not None:
            out.copy_(sum(times((factor * weight)[:, None], slope) for weight, slope in parts))


@torch.no_grad()
def cross_entropy(logits, labels, label_smoothing, weights, scale, value, total, grad):
    loss, d = ce_rows(Softmax(logits), labels, label_smoothing)
    _write(loss, weights, scale, value, total, (grad, (1.0, d)))


@torch.no_grad()
def kl_div(p_logits, q_logits, weights, scale, value, total, p_grad, q_grad):
    loss, dp, dq = kl_rows(Softmax(p_logits), Softmax(q_logits))
    _write(loss, weights, scale, value, total, (p_grad, (1.0, dp)), (q_grad, (1.0, dq)))


@torch.no_grad()
def trades_loss(logits, adv_logits, labels, beta, weights, scale, value, total, grad, adv_grad):
    p, q = Softmax(logits), Softmax(adv_logits)
    ce, d = ce_rows(p, labels)
    kl, dp, dq = kl_rows(p, q)
    grads = (grad, (1.0, d), (beta, dp)), (adv_grad, (beta, dq))
    _write(ce + times(beta, kl), weights, scale, value, total, *grads)


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
    loss = ce - room.log() + beta * (kl * wrong)[:, 0]
    _write(loss, weights, scale, value, total, (grad, (1.0, dp)), (adv_grad, (1.0, dq)))


@torch.no_grad()
def entropy(logits, weights, scale, value, total, grad):
    s = Softmax(logits)
    log_p = torch.where(s.p == 0, 0.0, s.log_p)
    loss = -(s.p * log_p).sum(1)
    _write(loss, weights, scale, value, total, (grad, (-1.0, s.p * (log_p + loss[:, None]))))


@torch.no_grad()
def margin_loss(logits, labels, weights, scale, value, total, grad):
    loss, d = margin_rows(logits, labels)
    _write(loss, weights, scale, value, total, (grad, (1.0, d)))


@torch.no_grad()
def dlr_loss(logits, labels, targets, weights, scale, value, total, grad):
    loss, d = dlr_rows(logits, labels, targets)
    _write(loss, weights, scale, value, total, (grad, (1.0, d)))


@torch.no_grad()
def logit_pairing(logits, adv_logits, weights, scale, value, total, grad, adv_grad):
    loss, d = _pairing(logits, adv_logits)
    _write(loss, weights, scale, value, total, (grad, (4.0, d)), (adv_grad, (-4.0, d)))


@torch.no_grad()
def soft_cross_entropy(logits, distributions, label_smoothing, weights, scale, value, total, grad):
    loss, d = soft_rows(Softmax(logits), distributions, label_smoothing)
    _write(loss, weights, scale, value, total, (grad, (1.0, d)))


@torch.no_grad()
def consistency_loss(
    logits, other_logits, labels, distributions, distance, distance_weight, weight_tensor, label_smoothing, weights,
    scale, value, total, grad, other_grad, terms,
):  # fmt: skip
    q, other = Softmax(logits), Softmax(other_logits)
    if distributions is not None:
        ce, slope = soft_rows(q, distributions, label_smoothing)
    else:
        ce, slope = ce_rows(q, labels, label_smoothing)
    if distance == 0:
        apart, quarter = _pairing(logits, other_logits)
        factor, to_other, to_q = 4.0, -quarter, quarter
    else:
        factor = (2.0, 0.5, 1.0)[distance - 1]
        apart, to_other, to_q = (probability_rows, js_rows, kl_rows)[distance - 1](other, q)
    weight = distance_weight if weight_tensor is None else weight_tensor
    if terms is not None:
        terms.copy_(torch.stack([ce, apart]))
    grads = (grad, (1.0, slope), (factor * weight, to_q)), (other_grad, (factor * weight, to_other))
    _write(ce + times(weight, apart), weights, scale, value, total, *grads)


def _pairing(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distance, and a quarter of its gradient to ``a``: half of the difference, which stays finite."""
    a, b = a.to(compute_dtype(a.dtype)), b.to(compute_dtype(b.dtype))
    return (a - b).square().sum(1), a / 2 - b / 2


@torch.no_grad()
def atlas_loss(
    logits, labels, local, local_weight, global_term, global_weight, weights, scale, value, total, grad, terms
):
    batch, first = len(labels), int(global_term != NONE)
    z = logits.view(logits.shape[0] // batch if batch else first + 1, batch, -1 if batch else logits.shape[1])
    x, adv, neighbours = z[0], z[first], z[first + 1 :]
    ce, slope = ce_rows(Softmax(adv), labels)
    local_loss, global_loss = torch.zeros_like(ce), torch.zeros_like(ce)
    parts: list[list[tuple[float, Tensor]]] = [[] for _ in z]  # of the gradient of each batch
    parts[first].append((1.0, slope))

    for k, near in enumerate(neighbours, first + 1):
        weight = local_weight / len(neighbours)
        if local == KL:
            loss, _, slope = kl_rows(Softmax(adv), Softmax(near))
            parts[k].append((weight, slope))
        elif local == CE:
            loss, slope = ce_rows(Softmax(near), labels)
            parts[k].append((weight, slope))
        else:
            loss, quarter = _pairing(near, adv)
            parts[k].append((4 * weight, quarter))
            parts[first].append((-4 * weight, quarter))
        local_loss += loss / len(neighbours)

    if global_term == KL:
        global_loss, to_x, to_adv = kl_rows(Softmax(x), Softmax(adv))
        parts[0].append((global_weight, to_x))
        parts[1].append((global_weight, to_adv))
    elif global_term == CE:
        global_loss, to_x = ce_rows(Softmax(x), labels)
        parts[0].append((global_weight, to_x))
    elif first:
        global_loss, quarter = _pairing(x, adv)
        parts[0].append((4 * global_weight, quarter))
        parts[1].append((-4 * global_weight, quarter))

    if terms is not None:
        terms.copy_(torch.stack([ce, local_loss, global_loss]))
    loss = ce
    if len(neighbours):
        loss = loss + times(local_weight, local_loss)
    if first:
        loss = loss + times(global_weight, global_loss)
    batches = [None] * len(z) if grad is None else grad.view_as(z)
    _write(loss, weights, scale, value, total, *((out, *slopes) for out, slopes in zip(batches, parts, strict=True)))


@torch.no_grad()
def gairat_weights(kappa, steps, lam, out):
    out.copy_(formulas.gairat_weights(kappa, steps, lam))
