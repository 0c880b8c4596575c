"""The losses in Triton: one kernel for those of one or two tensors of logits, which also makes the attacks' cotangents
(objectives.py), one for a loss with a tie to other logits, one for ATLAS, and one-program kernels for what spans the
batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...schema import DISTANCES, TERMS, arguments_of
from . import Launch, bound, require_single
from .rows import (
    aligned,
    columns,
    difference,
    exp,
    expm1,
    here,
    largest,
    less_one_hot,
    load,
    log,
    log1p,
    meta,
    pick,
    power_of_two,
    probability,
    softmax,
    store,
    tiling,
)  # fmt: skip

VECTOR = 1024  # elements that a kernel over the batch takes at a time


@triton.jit
def _weighted(value, per_row, row, inside):
    if per_row is None:
        return tl.cast(value, tl.float32)
    else:
        return tl.load(per_row + row, mask=inside)


@triton.jit
def _cross_entropy(top, log_sum, z_y):
    return log_sum + (top - z_y)


@triton.jit
def _log_ratio(zp, p_top, p_log, zq, q_top, q_log):
    """log p - log q, from differences of like things, so that it is as small as p is close to q: of the logits of both
    where their largest are close, else of each logit and the largest of its row."""
    shift = p_top - q_top
    close = (shift >= -1.0) & (shift <= 1.0)
    p_from, q_from, shift = tl.where(close, 0.0, p_top), tl.where(close, 0.0, q_top), tl.where(close, shift, 0.0)
    return (((zp - p_from) - (zq - q_from)) - shift) - (p_log - q_log)


@triton.jit
def _times(p, x):
    """p x, and 0 where p is: there x may be infinite."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _scaled(weight, x):
    """The same for a weight that does not come from x: a NaN stays."""
    most = tl.where(weight == 0.0, 0.0, float("inf"))
    return weight * tl.clamp(x, -most, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_p(p, ratio, kl):
    """d KL / d(logits of p); where KL is infinite, the limit as q goes to 0."""
    return _times(p, tl.where(ratio == float("inf"), ratio, ratio - kl))


@triton.jit
def _kl(p_at, p_top, p_others, p_log, q_at, q_top, q_log, inside, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """KL(p||q), [ROWS, 1]."""
    kl = tl.zeros((p_at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        zp, zq = load(p_at, inside, tile, classes, BLOCK), load(q_at, inside, tile, classes, BLOCK)
        kl += _times(probability(zp, p_top, p_others), _log_ratio(zp, p_top, p_log, zq, q_top, q_log))
    return tl.sum(kl, 1, keep_dims=True)


@triton.jit
def _smoothed_cross_entropy(at, to, inside, y, scale, smoothing, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    top, others, log_sum = softmax(at, inside, classes, BLOCK, TILES)
    loss = _cross_entropy(top, log_sum, pick(at, inside, y, classes, BLOCK, TILES))
    kept = 0.0
    share = 0.0
    if smoothing is not None:
        kept = tl.cast(smoothing, tl.float32)
        share = tl.div_rn(kept, tl.cast(classes, tl.float32))
        below = tl.zeros((at.shape[0], BLOCK), tl.float32)  # of the halves and shares, which stay finite
        for tile in range(TILES):
            half = 0.5 * top - 0.5 * load(at, inside, tile, classes, BLOCK)
            below += tl.where(columns(tile, BLOCK) < classes, (2.0 * share) * half, 0.0)
        loss = _scaled(1.0 - kept, loss) + (tl.sum(below, 1, keep_dims=True) + kept * log_sum)
    if to is not None:
        for tile in range(TILES):
            p = probability(load(at, inside, tile, classes, BLOCK), top, others)
            hit = columns(tile, BLOCK) == y
            g = less_one_hot(p, others, hit)
            if smoothing is not None:
                g += tl.where(hit, kept, 0.0) - share
            store(to, scale * g, inside, tile, classes, BLOCK)
    return loss


@triton.jit
def _target(shares_at, inside, y, smoothing, tile, classes, BLOCK: tl.constexpr):
    """What the classes of a tile have of the distribution that a prediction should have been."""
    column = columns(tile, BLOCK)
    t = (column == y).to(tl.float32) if shares_at is None else load(shares_at, inside, tile, classes, BLOCK)
    if smoothing is not None:
        kept = tl.cast(smoothing, tl.float32)
        t = t * (1.0 - kept) + tl.div_rn(kept, tl.cast(classes, tl.float32))
    return tl.where(column < classes, t, 0.0)


@triton.jit
def _soft(at, shares_at, inside, y, top, log_sum, smoothing, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """(-sum_c t_c log p_c, the target's share of the classes with the largest logit, that of all others)."""
    above = tl.zeros((at.shape[0], BLOCK), tl.float32)
    rest = tl.zeros((at.shape[0], BLOCK), tl.float32)
    below = tl.zeros((at.shape[0], BLOCK), tl.float32)  # of the halves, which stay finite
    for tile in range(TILES):
        z = load(at, inside, tile, classes, BLOCK)
        t = _target(shares_at, inside, y, smoothing, tile, classes, BLOCK)
        above += tl.where(z == top, t, 0.0)
        rest += tl.where(z == top, 0.0, t)
        below += _times(2.0 * t, 0.5 * top - 0.5 * z)
    above = tl.sum(above, 1, keep_dims=True)
    rest = tl.sum(rest, 1, keep_dims=True)
    if shares_at is None:
        rest = tl.where((y >= 0) & (y < classes), rest, float("nan"))
    return tl.sum(below, 1, keep_dims=True) + (above + rest) * log_sum, above, rest


@triton.jit
def _less_target(z, t, top, others, above, rest):
    """total p - t; at the largest logit from what p and t lack of the whole."""
    total = above + rest
    lacking = rest + (above - t)
    plain = total * probability(z, top, others) - t
    return tl.where(z == top, lacking - total * tl.div_rn(others, 1.0 + others), plain)


@triton.jit
def _soft_cross_entropy(
    at, to, shares_at, inside, scale, smoothing, classes, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    top, others, log_sum = softmax(at, inside, classes, BLOCK, TILES)
    loss, above, rest = _soft(at, shares_at, inside, -1, top, log_sum, smoothing, classes, BLOCK, TILES)
    if to is not None:
        for tile in range(TILES):
            z = load(at, inside, tile, classes, BLOCK)
            t = _target(shares_at, inside, -1, smoothing, tile, classes, BLOCK)
            store(to, scale * _less_target(z, t, top, others, above, rest), inside, tile, classes, BLOCK)
    return loss


@triton.jit
def _entropy(at, to, inside, scale, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    top, others, log_sum = softmax(at, inside, classes, BLOCK, TILES)
    loss = tl.zeros((at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        z = load(at, inside, tile, classes, BLOCK)
        loss -= _times(probability(z, top, others), z - top - log_sum)
    loss = tl.sum(loss, 1, keep_dims=True)
    if to is not None:
        for tile in range(TILES):
            z = load(at, inside, tile, classes, BLOCK)
            g = _times(probability(z, top, others), (z - top - log_sum) + loss)
            store(to, -scale * g, inside, tile, classes, BLOCK)
    return loss


@triton.jit
def _trades(
    p_at, q_at, p_to, q_to, inside, y, scale, beta, classes,
    LOSS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """KL(p||q), or CE(p) + beta KL(p||q)."""
    p_top, p_others, p_log = softmax(p_at, inside, classes, BLOCK, TILES)
    q_top, q_others, q_log = softmax(q_at, inside, classes, BLOCK, TILES)
    kl = _kl(p_at, p_top, p_others, p_log, q_at, q_top, q_log, inside, classes, BLOCK, TILES)
    kl_scale = scale
    loss = kl
    if LOSS == "trades_loss":
        beta = tl.cast(beta, tl.float32)
        kl_scale = scale * beta
        loss = _cross_entropy(p_top, p_log, pick(p_at, inside, y, classes, BLOCK, TILES)) + _scaled(beta, kl)
    if p_to is not None or q_to is not None:
        for tile in range(TILES):
            zp, zq = load(p_at, inside, tile, classes, BLOCK), load(q_at, inside, tile, classes, BLOCK)
            p, q = probability(zp, p_top, p_others), probability(zq, q_top, q_others)
            if p_to is not None:
                g = _scaled(kl_scale, _to_p(p, _log_ratio(zp, p_top, p_log, zq, q_top, q_log), kl))
                if LOSS == "trades_loss":
                    g += scale * less_one_hot(p, p_others, columns(tile, BLOCK) == y)
                store(p_to, g, inside, tile, classes, BLOCK)
            if q_to is not None:
                store(q_to, kl_scale * difference(q, q_others, p, p_others), inside, tile, classes, BLOCK)
    return loss


@triton.jit
def _rest(z, top, others):
    """1 - p of the class with logit z."""
    p = probability(z, top, others)
    return tl.where(p > 0.5, tl.div_rn(others, 1.0 + others), 1.0 - p)


@triton.jit
def _mart_terms(zp, p_top, p_others, p_log, zq, q_top, q_others, q_log):
    """(p, q, log p - log(q + 1e-12), p q / (q + 1e-12))."""
    p, q = probability(zp, p_top, p_others), probability(zq, q_top, q_others)
    ratio = _log_ratio(zp, p_top, p_log, zq, q_top, q_log)
    ratio = tl.where(q > 1e-3, ratio, (zp - p_top - p_log) - log(q + 1e-12))  # above, 1e-12 is less than half an ulp
    return p, q, ratio, p * tl.div_rn(q, q + 1e-12)


@triton.jit
def _mart(
    p_at, q_at, p_to, q_to, inside, y, scale, beta, classes, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    p_top, p_others, p_log = softmax(p_at, inside, classes, BLOCK, TILES)
    q_top, q_others, q_log = softmax(q_at, inside, classes, BLOCK, TILES)
    zp_y = pick(p_at, inside, y, classes, BLOCK, TILES)
    zq_y = pick(q_at, inside, y, classes, BLOCK, TILES)
    zq_m, m = largest(q_at, inside, classes, y, -1, -1, BLOCK, TILES)
    kl = tl.zeros((p_at.shape[0], BLOCK), tl.float32)
    pull = tl.zeros((p_at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        zp, zq = load(p_at, inside, tile, classes, BLOCK), load(q_at, inside, tile, classes, BLOCK)
        p, q, ratio, r = _mart_terms(zp, p_top, p_others, p_log, zq, q_top, q_others, q_log)
        kl += _times(p, ratio)
        pull += r
    kl = tl.sum(kl, 1, keep_dims=True)
    pull = tl.sum(pull, 1, keep_dims=True)

    # 1.0001 - q_m and 1.0000001 - p_y, from what q_m and p_y lack of 1. Beside 1e-4, the published 1e-12 vanishes.
    q_m, p_y = probability(zq_m, q_top, q_others), probability(zp_y, p_top, p_others)
    room = _rest(zq_m, q_top, q_others) + 1e-4
    log_room = tl.where(q_m > 0.5, log(room), log1p(1e-4 - q_m))
    w = _rest(zp_y, p_top, p_others) + 1e-7
    beta = tl.cast(beta, tl.float32)
    if p_to is not None or q_to is not None:
        push = tl.div_rn(q_m, room)
        for tile in range(TILES):
            zp, zq = load(p_at, inside, tile, classes, BLOCK), load(q_at, inside, tile, classes, BLOCK)
            p, q, ratio, r = _mart_terms(zp, p_top, p_others, p_log, zq, q_top, q_others, q_log)
            column = columns(tile, BLOCK)
            if p_to is not None:
                g = w * _times(p, ratio - kl) + kl * p_y * less_one_hot(p, p_others, column == y)
                store(p_to, scale * beta * g, inside, tile, classes, BLOCK)
            if q_to is not None:
                g = less_one_hot(q, q_others, column == y) - push * less_one_hot(q, q_others, column == m)
                g += beta * w * (q * pull - r)
                store(q_to, scale * g, inside, tile, classes, BLOCK)
    return _cross_entropy(q_top, q_log, zq_y) - log_room + beta * kl * w


@triton.jit
def _margin(
    at, to, inside, y, t, scale, classes,
    LOSS: tl.constexpr, TARGETED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """z_other - z_y; for DLR divided by the distance of the largest logit from the third (and the fourth), both in
    halves, which stay finite."""
    if TARGETED:
        other = t
        z_other = pick(at, inside, t, classes, BLOCK, TILES)
    else:
        z_other, other = largest(at, inside, classes, y, -1, -1, BLOCK, TILES)
    z_y = pick(at, inside, y, classes, BLOCK, TILES)
    loss = z_other - z_y
    nan = tl.where((z_other == z_other) & (z_y == z_y), 0.0, float("nan"))  # of a row with a NaN
    if LOSS == "dlr_loss":
        z1, first = largest(at, inside, classes, -1, -1, -1, BLOCK, TILES)
        _, second = largest(at, inside, classes, first, -1, -1, BLOCK, TILES)
        z3, third = largest(at, inside, classes, first, second, -1, BLOCK, TILES)
        fourth, z4 = third, z3
        if TARGETED:
            z4, fourth = largest(at, inside, classes, first, second, third, BLOCK, TILES)
        # Two differences, each exact where the logits are close.
        divisor = (0.25 * z1 - 0.25 * z3) + (0.25 * z1 - 0.25 * z4) + 0.5e-12
        loss = tl.div_rn(0.5 * z_other - 0.5 * z_y, divisor)
        nan = tl.where(z1 == z1, 0.0, float("nan"))
        loss += nan
    if to is not None:
        for tile in range(TILES):
            column = columns(tile, BLOCK)
            g = (column == other).to(tl.float32) - (column == y).to(tl.float32) + nan
            if LOSS == "dlr_loss":
                half = 0.5 * loss
                down = tl.where(column == third, half, 0.0) + tl.where(column == fourth, half, 0.0)
                g = 0.5 * tl.div_rn(g - (tl.where(column == first, loss, 0.0) - down), divisor)
            store(to, _scaled(scale, g), inside, tile, classes, BLOCK)
    return loss


@triton.jit
def _squared_distance(a_at, b_at, inside, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """||a - b||^2, [ROWS, 1]."""
    distance = tl.zeros((a_at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        d = load(a_at, inside, tile, classes, BLOCK) - load(b_at, inside, tile, classes, BLOCK)
        distance += tl.where(columns(tile, BLOCK) < classes, d * d, 0.0)
    return tl.sum(distance, 1, keep_dims=True)


@triton.jit
def _pairing_gradient(a_at, b_at, inside, scale, tile, classes, BLOCK: tl.constexpr):
    """scale d||a - b||^2 / da. In halves, which stay finite."""
    half = 0.5 * load(a_at, inside, tile, classes, BLOCK) - 0.5 * load(b_at, inside, tile, classes, BLOCK)
    return _scaled(4.0 * scale, half)


@triton.jit
def _logit_pairing(a_at, b_at, a_to, b_to, inside, scale, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    loss = _squared_distance(a_at, b_at, inside, classes, BLOCK, TILES)
    if a_to is not None or b_to is not None:
        for tile in range(TILES):
            d = _pairing_gradient(a_at, b_at, inside, scale, tile, classes, BLOCK)
            if a_to is not None:
                store(a_to, d, inside, tile, classes, BLOCK)
            if b_to is not None:
                store(b_to, -d, inside, tile, classes, BLOCK)
    return loss


@triton.jit
def loss_kernel(
    logits, adv_logits, labels, targets, distributions, weights, value, grad, adv_grad, correct, kappa,
    weight, scale, parameter, batch, classes: tl.constexpr,
    LOSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """value = weight * loss, gradients times scale; correct, kappa: see attack_cotangent."""
    row, inside = here(batch, ROWS)
    offset = row * classes
    at = logits + offset
    to = None if grad is None else grad + offset
    adv_at = None if adv_logits is None else adv_logits + offset
    adv_to = None if adv_grad is None else adv_grad + offset
    y = -1 if labels is None else tl.load(labels + row, mask=inside, other=-1)
    t = -1 if targets is None else tl.load(targets + row, mask=inside, other=-1)
    w = _weighted(weight, weights, row, inside)
    s = w * tl.cast(scale, tl.float32)

    if correct is not None or kappa is not None:
        attacked = adv_at if LOSS == "kl_div" else at  # there at is the reference
        best, first = largest(attacked, inside, classes, -1, -1, -1, BLOCK, TILES)
        right = (first == y) & (best == best)  # no class is the prediction of a row with a NaN

    if LOSS == "cross_entropy":
        loss = _smoothed_cross_entropy(at, to, inside, y, s, parameter, classes, BLOCK, TILES)
    elif LOSS == "soft_cross_entropy":
        shares_at = distributions + offset
        loss = _soft_cross_entropy(at, to, shares_at, inside, s, parameter, classes, BLOCK, TILES)
    elif LOSS == "entropy":
        loss = _entropy(at, to, inside, s, classes, BLOCK, TILES)
    elif LOSS == "mart_loss":
        loss = _mart(at, adv_at, to, adv_to, inside, y, s, parameter, classes, BLOCK, TILES)
    elif LOSS == "logit_pairing":
        loss = _logit_pairing(at, adv_at, to, adv_to, inside, s, classes, BLOCK, TILES)
    elif adv_logits is not None:
        loss = _trades(at, adv_at, to, adv_to, inside, y, s, parameter, classes, LOSS, BLOCK, TILES)
    else:
        loss = _margin(at, to, inside, y, t, s, classes, LOSS, targets is not None, BLOCK, TILES)
    if value is not None:
        tl.store(value + row, _scaled(w, loss), mask=inside)
    if correct is not None:
        tl.store(correct + row, right, mask=inside)
    if kappa is not None:
        tl.store(kappa + row, tl.load(kappa + row, mask=inside) + right.to(tl.int64), mask=inside)


@triton.jit
def _power_ratio(zp, p_top, zq, q_top):
    """log of exp(zp - p_top) / exp(zq - q_top), from differences of like things."""
    shift = p_top - q_top
    close = (shift >= -1.0) & (shift <= 1.0)
    p_from, q_from, shift = tl.where(close, 0.0, p_top), tl.where(close, 0.0, q_top), tl.where(close, shift, 0.0)
    return ((zp - p_from) - (zq - q_from)) - shift


@triton.jit
def _log_shift(
    p_at, p_top, p_log, q_at, q_top, q_others, q_log, inside, classes, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The logarithm of the ratio of two sums of powers, as precise as it is small: where they are close, they are
    compared power by power."""
    more = tl.zeros((p_at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        zp, zq = load(p_at, inside, tile, classes, BLOCK), load(q_at, inside, tile, classes, BLOCK)
        x, start = _power_ratio(zp, p_top, zq, q_top), exp(zq - q_top)
        more += tl.where((x > -0.5) & (x < 0.5), start * expm1(x), exp(zp - p_top) - start)
    share = tl.div_rn(tl.sum(more, 1, keep_dims=True), 1.0 + q_others)
    return tl.where((share > -0.25) & (share < 0.25), log1p(share), p_log - q_log)


@triton.jit
def _twins(p, q, ratio):
    """(u = (p - q) / (p + q), log(p / m), log(q / m)), m = (p + q) / 2, of log p - log q. Nothing of it cancels where p
    is close to q."""
    more = ratio > 0.0
    away = tl.where(more, ratio, -ratio)
    less = expm1(-away)
    share = tl.div_rn(-less, less + 2.0)
    larger = -log1p(less * 0.5)
    smaller = larger - away
    return tl.where(more, share, -share), tl.where(more, larger, smaller), tl.where(more, smaller, larger)


@triton.jit
def _divergence(p, q, u, log_p, log_q):
    """(p log(p/m) + q log(q/m)) / 2; of a small u by the series of that."""
    square = u * u
    series = square * 0.0
    for k in tl.static_range(6):
        series = series * square + 1.0 / ((6 - k) * (11 - 2 * k))
    near = (p + q) * 0.25 * square * series
    return tl.where(square < 0.0625, near, (_times(p, log_p) + _times(q, log_q)) * 0.5)


@triton.jit
def consistency_kernel(
    logits, adv_logits, labels, distributions, weights, value, grad, adv_grad, terms, distance_weight,
    distance_weight_rows, scale, parameter, batch,
    classes: tl.constexpr, DISTANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """CE(logits) + distance_weight * distance of adv_logits (o) and logits (q)."""
    row, inside = here(batch, ROWS)
    offset = row * classes
    at, o_at = logits + offset, adv_logits + offset
    shares_at = None if distributions is None else distributions + offset
    y = -1 if labels is None else tl.load(labels + row, mask=inside, other=-1)
    w = _weighted(1.0, weights, row, inside)
    tie = tl.cast(distance_weight, tl.float32) if distance_weight_rows is None else tl.load(distance_weight_rows)
    s = w * tl.cast(scale, tl.float32)
    s_tie = s * tie

    top, others, log_sum = softmax(at, inside, classes, BLOCK, TILES)
    ce, above, rest = _soft(at, shares_at, inside, y, top, log_sum, parameter, classes, BLOCK, TILES)
    o_mean, q_mean = ce, ce  # of what each side's probabilities are pulled by, if that is asked for
    if DISTANCE == "logit":
        apart = _squared_distance(at, o_at, inside, classes, BLOCK, TILES)
    else:
        o_top, o_others, o_log = softmax(o_at, inside, classes, BLOCK, TILES)
        if DISTANCE == "kl":
            apart = _kl(o_at, o_top, o_others, o_log, at, top, log_sum, inside, classes, BLOCK, TILES)
        else:
            shift = _log_shift(o_at, o_top, o_log, at, top, others, log_sum, inside, classes, BLOCK, TILES)
            apart = tl.zeros((ROWS, BLOCK), tl.float32)
            o_mean = tl.zeros((ROWS, BLOCK), tl.float32)
            q_mean = tl.zeros((ROWS, BLOCK), tl.float32)
            for tile in range(TILES):
                zq, zo = load(at, inside, tile, classes, BLOCK), load(o_at, inside, tile, classes, BLOCK)
                q, o = probability(zq, top, others), probability(zo, o_top, o_others)
                u, log_o, log_q = _twins(o, q, _power_ratio(zo, o_top, zq, top) - shift)
                d = _times(o + q, u)
                if DISTANCE == "js":
                    apart += _divergence(o, q, u, log_o, log_q)
                    o_mean += _times(o, log_o)
                    q_mean += _times(q, log_q)
                else:
                    apart += d * d
                    o_mean += _times(o, d)
                    q_mean += _times(q, -d)
            apart = tl.sum(apart, 1, keep_dims=True)
            o_mean = tl.sum(o_mean, 1, keep_dims=True)
            q_mean = tl.sum(q_mean, 1, keep_dims=True)

    if grad is not None or adv_grad is not None:
        for tile in range(TILES):
            zq, zo = load(at, inside, tile, classes, BLOCK), load(o_at, inside, tile, classes, BLOCK)
            t = _target(shares_at, inside, y, parameter, tile, classes, BLOCK)
            g = s * _less_target(zq, t, top, others, above, rest)
            if DISTANCE == "logit":
                to_q = _scaled(4.0 * s_tie, 0.5 * zq - 0.5 * zo)
                to_o = -to_q
            else:
                q, o = probability(zq, top, others), probability(zo, o_top, o_others)
                if DISTANCE == "kl":
                    to_q = s_tie * difference(q, others, o, o_others)
                    to_o = _scaled(s_tie, _to_p(o, _log_ratio(zo, o_top, o_log, zq, top, log_sum), apart))
                else:
                    u, log_o, log_q = _twins(o, q, _power_ratio(zo, o_top, zq, top) - shift)
                    d = _times(o + q, u)
                    if DISTANCE == "js":
                        to_q = 0.5 * s_tie * _times(q, log_q - q_mean)
                        to_o = 0.5 * s_tie * _times(o, log_o - o_mean)
                    else:
                        to_q = 2.0 * s_tie * _times(q, -d - q_mean)
                        to_o = 2.0 * s_tie * _times(o, d - o_mean)
            if grad is not None:
                store(grad + offset, g + to_q, inside, tile, classes, BLOCK)
            if adv_grad is not None:
                store(adv_grad + offset, to_o, inside, tile, classes, BLOCK)

    tl.store(value + row, _scaled(w, ce + _scaled(tie, apart)), mask=inside)
    if terms is not None:
        tl.store(terms + row, ce, mask=inside)
        tl.store(terms + (row + batch), apart, mask=inside)


@triton.jit
def _neighbour(
    adv_at, z_at, z_to, inside, y, top, others, log_sum, scale, classes,
    LOCAL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The local term of one neighbour, and its gradient there."""
    if LOCAL == "logit":
        loss = _squared_distance(z_at, adv_at, inside, classes, BLOCK, TILES)
    else:
        z_top, z_others, z_log = softmax(z_at, inside, classes, BLOCK, TILES)
        if LOCAL == "kl":
            loss = _kl(adv_at, top, others, log_sum, z_at, z_top, z_log, inside, classes, BLOCK, TILES)
        else:
            loss = _cross_entropy(z_top, z_log, pick(z_at, inside, y, classes, BLOCK, TILES))
    if z_to is not None:
        for tile in range(TILES):
            if LOCAL == "logit":
                g = _pairing_gradient(z_at, adv_at, inside, scale, tile, classes, BLOCK)
            else:
                p = probability(load(z_at, inside, tile, classes, BLOCK), z_top, z_others)
                if LOCAL == "kl":
                    adv = load(adv_at, inside, tile, classes, BLOCK)
                    g = scale * difference(p, z_others, probability(adv, top, others), others)
                else:
                    g = scale * less_one_hot(p, z_others, columns(tile, BLOCK) == y)
            store(z_to, g, inside, tile, classes, BLOCK)
    return loss


@triton.jit
def atlas_kernel(
    logits, labels, weights, value, grad, terms, scale, local_weight, global_weight, batch,
    classes: tl.constexpr, count: tl.constexpr, LOCAL: tl.constexpr, GLOBAL_TERM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """CE(adv) + local_weight mean_k LOCAL(adv, z_k) + global_weight GLOBAL(x, adv); logits: [x;] adv; z_1; ..; z_count.

    A row of adv is read again, from the cache, for each neighbour, and for the logit form a neighbour's row as well.
    """
    row, inside = here(batch, ROWS)
    stride = tl.cast(batch, tl.int64) * classes
    offset = row * classes  # of x; then of adv
    x_at = logits + offset
    x_to = None if grad is None else grad + offset
    if GLOBAL_TERM != "none":
        offset += stride
    adv_at = logits + offset
    y = tl.load(labels + row, mask=inside, other=-1)
    w = _weighted(1.0, weights, row, inside)
    local_weight = tl.cast(local_weight, tl.float32)
    global_weight = tl.cast(global_weight, tl.float32)
    s = w * tl.cast(scale, tl.float32)
    s_global = s * global_weight
    neighbours = tl.cast(count if count > 0 else 1, tl.float32)
    s_local = s * tl.div_rn(local_weight, neighbours)

    top, others, log_sum = softmax(adv_at, inside, classes, BLOCK, TILES)
    ce = _cross_entropy(top, log_sum, pick(adv_at, inside, y, classes, BLOCK, TILES))
    tie = tl.zeros((ROWS, 1), tl.float32)
    if GLOBAL_TERM == "kl":
        x_top, x_others, x_log = softmax(x_at, inside, classes, BLOCK, TILES)
        tie = _kl(x_at, x_top, x_others, x_log, adv_at, top, log_sum, inside, classes, BLOCK, TILES)
    if GLOBAL_TERM == "ce":
        x_top, x_others, x_log = softmax(x_at, inside, classes, BLOCK, TILES)
        tie = _cross_entropy(x_top, x_log, pick(x_at, inside, y, classes, BLOCK, TILES))
    if GLOBAL_TERM == "logit":
        tie = _squared_distance(x_at, adv_at, inside, classes, BLOCK, TILES)

    if grad is not None:
        for tile in range(TILES):
            hit = columns(tile, BLOCK) == y
            adv = load(adv_at, inside, tile, classes, BLOCK)
            q = probability(adv, top, others)
            g = s * less_one_hot(q, others, hit)
            if GLOBAL_TERM != "none":
                if GLOBAL_TERM == "logit":
                    x_g = _pairing_gradient(x_at, adv_at, inside, s_global, tile, classes, BLOCK)
                    g -= x_g
                else:
                    x = load(x_at, inside, tile, classes, BLOCK)
                    p = probability(x, x_top, x_others)
                    if GLOBAL_TERM == "kl":
                        x_g = _scaled(s_global, _to_p(p, _log_ratio(x, x_top, x_log, adv, top, log_sum), tie))
                        g += s_global * difference(q, others, p, x_others)
                    else:
                        x_g = s_global * less_one_hot(p, x_others, hit)
                store(x_to, x_g, inside, tile, classes, BLOCK)
            if LOCAL == "logit":
                for k in range(count):
                    near_at = adv_at + (k + 1) * stride
                    g -= _pairing_gradient(near_at, adv_at, inside, s_local, tile, classes, BLOCK)
            store(grad + offset, g, inside, tile, classes, BLOCK)

    local = tl.zeros((ROWS, 1), tl.float32)
    for k in range(count):
        near = offset + (k + 1) * stride
        z_to = None if grad is None else grad + near
        loss = _neighbour(
            adv_at, logits + near, z_to, inside, y, top, others, log_sum, s_local, classes, LOCAL, BLOCK, TILES
        )
        local += tl.div_rn(loss, neighbours)
    loss = ce + _scaled(local_weight, local) + _scaled(global_weight, tie)
    tl.store(value + row, _scaled(w, loss), mask=inside)
    if terms is not None:
        tl.store(terms + row, ce, mask=inside)
        tl.store(terms + (row + batch), local, mask=inside)
        tl.store(terms + (row + batch + batch), tie, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["value"])  # of which the order of the sum would depend
def total_kernel(value, total, scale, batch, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """scale * sum(value) by one program, in an order that depends on nothing else."""
    lane = tl.arange(0, BLOCK)
    scale = tl.cast(scale, tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        i = block * BLOCK + lane
        found += scale * tl.load(value + i, mask=i < batch, other=0.0)
    tl.store(total, tl.sum(found, 0))


@triton.jit
def _geometry_weight(k, least, lam, half):
    """sigmoid(v), v = 2 lam + 10/half (half - k), over a number that brings the largest of the batch to 1/2 or more."""
    v = 2.0 * lam + tl.div_rn(10.0 * (half - k), half)
    largest_v = 2.0 * lam + tl.div_rn(10.0 * (half - least), half)
    power = tl.where(largest_v < 0.0, tl.div_rn(10.0 * (least - k), half), tl.where(v < 0.0, v, 0.0))
    return tl.div_rn(exp(power), 1.0 + exp(tl.where(v < 0.0, v, -v)))


@triton.jit(do_not_specialize_on_alignment=["kappa", "out"])
def gairat_kernel(kappa, out, lam, half, batch, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Weights with mean 1 by one program."""
    lane = tl.arange(0, BLOCK)
    lam = tl.cast(lam, tl.float32)
    half = tl.cast(half, tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for block in range(BLOCKS):
        i = block * BLOCK + lane
        k = tl.load(kappa + i, mask=i < batch, other=0).to(tl.float32)
        least = tl.minimum(least, tl.where(i < batch, k, float("inf")))
    least = tl.min(least, 0)
    found = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        i = block * BLOCK + lane
        k = tl.load(kappa + i, mask=i < batch, other=0).to(tl.float32)
        found += tl.where(i < batch, _geometry_weight(k, least, lam, half), 0.0)
    mean = tl.div_rn(tl.sum(found, 0), tl.cast(batch, tl.float32))
    for block in range(BLOCKS):
        i = block * BLOCK + lane
        k = tl.load(kappa + i, mask=i < batch, other=0).to(tl.float32)
        tl.store(out + i, tl.div_rn(_geometry_weight(k, least, lam, half), mean), mask=i < batch)


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The kernels of an operator's arguments, by the names of their fields."""
    if operator == "gairat_weights":
        return _gairat_launches(given)
    if operator.endswith(("cross_entropy", "consistency_loss")) and not given["parameter"]:
        given = {**given, "parameter": None}  # no smoothing: else 0 times an infinite logit
    if operator == "atlas_loss":
        found = _atlas_launches(given)
    elif operator == "consistency_loss":
        found = _consistency_launches(given)
    else:
        found = loss_launches(operator, given)
    value, total = given["value"], given["total"]
    if total is not None:
        found.append(_over_the_batch(total_kernel, len(value), given))
    return found


def loss_launches(loss: str, given: dict[str, Any]) -> list[Launch]:
    """The kernel of a loss of one or two tensors of logits; none for an empty batch."""
    batch, classes = given["logits"].shape
    require_single("logits", given["logits"])
    rows, block, tiles = tiling(classes)
    values = {"weight": 1.0, **given, "logits": aligned(given["logits"]), "batch": batch, "classes": classes,
              "loss": loss, "rows": rows, "block": block, "tiles": tiles}  # fmt: skip
    return [bound(loss_kernel, -(-batch // rows), values)] if batch else []


def _consistency_launches(given: dict[str, Any]) -> list[Launch]:
    batch, classes = given["logits"].shape
    require_single("logits", given["logits"])
    rows, block, tiles = tiling(classes)
    tensors = ("logits", "adv_logits", "distributions")
    values = {**given, **{name: aligned(given[name]) for name in tensors if given[name] is not None}, "batch": batch,
              "classes": classes, "distance": DISTANCES[given["distance"]], "rows": rows, "block": block,
              "tiles": tiles}  # fmt: skip
    return [bound(consistency_kernel, -(-batch // rows), values)] if batch else []


def _atlas_launches(given: dict[str, Any]) -> list[Launch]:
    batch, (all_rows, classes) = len(given["labels"]), given["logits"].shape
    require_single("logits", given["logits"])
    if not batch:
        return []
    rows, block, tiles = tiling(classes)
    local, global_term = TERMS[given["local"]], TERMS[given["global_term"]]
    count = all_rows // batch - (1 if global_term == "none" else 2)
    values = {**given, "logits": aligned(given["logits"]), "batch": batch, "classes": classes, "count": count,
              "local": local, "global_term": global_term, "rows": rows, "block": block, "tiles": tiles}  # fmt: skip
    return [bound(atlas_kernel, -(-batch // rows), values)]


def _gairat_launches(given: dict[str, Any]) -> list[Launch]:
    batch, half = len(given["kappa"]), float(given["steps"] // 2)
    return [_over_the_batch(gairat_kernel, batch, {**given, "half": half})] if batch else []


def _over_the_batch(kernel: Any, batch: int, given: dict[str, Any]) -> Launch:
    """One program; its vectors are a power of two, so that batches of every size are a few kernels."""
    blocks = power_of_two(-(-batch // VECTOR))
    return bound(kernel, 1, {**given, "batch": batch, "blocks": blocks, "block": VECTOR})


def _example(
    loss: str, dtype: torch.dtype = torch.float32, *, batch: int = 128, classes: int = 10, weighted: bool = False,
    parameter: float | None = None, targeted: bool = False,
) -> Launch:  # fmt: skip
    """A launch on logits without memory behind them, with every gradient."""
    z, y, v = meta((batch, classes), dtype), meta(batch, torch.int64), meta(batch)
    fields = {a.field for a in arguments_of(loss)}
    pair, labels = (t if name in fields else None for name, t in (("adv_logits", z), ("labels", y)))
    given = {
        "logits": z, "adv_logits": pair, "labels": labels, "targets": y if targeted else None,
        "distributions": meta((batch, classes)) if "distributions" in fields else None,
        "weights": v if weighted else None, "value": v, "grad": z, "adv_grad": pair, "scale": 0.5,
        "parameter": parameter,
    }  # fmt: skip
    return loss_launches(loss, given)[0]


def _atlas_example(
    local: str, global_term: str, count: int, dtype: torch.dtype = torch.float32, *, batch: int = 128,
    classes: int = 10,
) -> Launch:  # fmt: skip
    z = meta(((1 + (global_term != "none") + count) * batch, classes), dtype)
    y, v, terms = meta(batch, torch.int64), meta(batch), meta((3, batch))
    given = {
        "logits": z, "labels": y, "local": TERMS.index(local), "local_weight": 1.0,
        "global_term": TERMS.index(global_term), "global_weight": 1.0, "weights": v, "scale": 0.5, "value": v,
        "grad": z, "terms": terms,
    }  # fmt: skip
    return _atlas_launches(given)[0]


def _consistency_example(
    distance: str, dtype: torch.dtype = torch.float32, *, batch: int = 128, classes: int = 10, soft: bool = False,
    on_device: bool = False,
) -> Launch:  # fmt: skip
    z, v = meta((batch, classes), dtype), meta(batch)
    given = {
        "logits": z, "adv_logits": z, "labels": None if soft else meta(batch, torch.int64),
        "distributions": meta((batch, classes)) if soft else None, "distance": DISTANCES.index(distance),
        "distance_weight": 1.0, "distance_weight_rows": meta(()) if on_device else None, "parameter": None,
        "weights": None, "scale": 0.5, "value": v, "grad": z, "adv_grad": z, "terms": meta((2, batch)),
    }  # fmt: skip
    return _consistency_launches(given)[0]


_EXAMPLES: dict[str, Callable[..., Launch]] = {
    "cross_entropy": partial(_example, "cross_entropy"),
    "cross_entropy, smoothed, weighted": partial(_example, "cross_entropy", parameter=0.1, weighted=True),
    "kl_div": partial(_example, "kl_div"),
    "trades_loss": partial(_example, "trades_loss", parameter=6.0),
    "mart_loss": partial(_example, "mart_loss", parameter=5.0),
    "entropy": partial(_example, "entropy"),
    "margin_loss": partial(_example, "margin_loss"),
    "dlr_loss": partial(_example, "dlr_loss"),
    "dlr_loss, targeted": partial(_example, "dlr_loss", targeted=True),
    "logit_pairing": partial(_example, "logit_pairing"),
    "soft_cross_entropy": partial(_example, "soft_cross_entropy", parameter=0.1),
    **{f"consistency_loss, {distance}": partial(_consistency_example, distance) for distance in DISTANCES},
    "consistency_loss, js, soft": partial(_consistency_example, "js", soft=True, on_device=True),
    "atlas_loss": partial(_atlas_example, "kl", "kl", 1),
    "atlas_loss, ce, two neighbours": partial(_atlas_example, "ce", "ce", 2),
    "atlas_loss, logit, two neighbours": partial(_atlas_example, "logit", "logit", 2),
    "atlas_loss, adversaries only": partial(_atlas_example, "none", "none", 0),
}
# What the operators launch for the numbers of classes that training meets, to be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    **_EXAMPLES,
    **{f"{name}, 1000 classes, bf16": partial(f, dtype=torch.bfloat16, classes=1000) for name, f in _EXAMPLES.items()},
    "mart_loss, 21841 classes, fp16": partial(_example, "mart_loss", torch.float16, parameter=5.0, classes=21841),
    "atlas_loss, one sample": partial(_atlas_example, "kl", "kl", 1, batch=1),
    "trades_loss, more than 2**31 logits": partial(_example, "trades_loss", parameter=6.0, batch=1 << 21, classes=1024),
    "total": lambda: _over_the_batch(total_kernel, 128, {"value": meta(128), "total": meta(1), "scale": 0.5}),
    "gairat_weights": lambda: _gairat_launches(
        {"kappa": meta(3000, torch.int64), "steps": 10, "lam": -1.0, "out": meta(3000)}
    )[0],
}
