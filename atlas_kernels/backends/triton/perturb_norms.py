"""The l2 and l1 perturbation operators in Triton: all three are one kernel with parts left out, a program a sample that
sweeps over its pixels (see csrc/core/perturb_norms.h, whose searches it repeats)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import plane_shape
from ...schema import L1, NORMS, STREAM_START
from ..guard import DoorError
from . import Launch, bound, require_single
from .perturb import _clip, _load, _number, _row, _store, is_one_order, lasts, signed

GROUPS = 256  # of four pixels, a tile: never fewer pixels than threads (see TILE in perturb.py)
NEWTON_SWEEPS, SEARCH_SWEEPS = tl.constexpr(16), tl.constexpr(80)


@triton.jit
def _place(tile, channels, pixels, GROUPS: tl.constexpr):
    # Planes one after the other, each padded to whole groups of four pixels.
    groups = (pixels - 1) // 4 + 1
    place = tile * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    channel, pixel = place // (4 * groups), place % (4 * groups)
    return channel, pixel, (channel < channels) & (pixel < pixels)


@triton.jit
def _positive_uniform(word):
    return ((word >> 8).to(tl.int32) + 1).to(tl.float64) * (2.0**-24)


@triton.jit
def _normal_pair(w0, w1):
    # The sine and cosine of csrc/core/random.h.
    radius = tl.sqrt(-2.0 * tl.log(_positive_uniform(w0))).to(tl.float32)
    u = (w1.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * (2.0**-23)
    quarter = (u * 2.0 + tl.where(u < 0, -0.5, 0.5)).to(tl.int32)
    r = u - quarter.to(tl.float32) * 0.5
    r2 = r * r
    s = (((8.21458866e-2 * r2 - 5.99264529e-1) * r2 + 2.55016404) * r2 - 5.16771278).to(tl.float32)
    s = (r * 3.14159265 + r * r2 * s).to(tl.float32)
    c = ((((-2.58068913e-2 * r2 + 2.35330630e-1) * r2 - 1.33526277) * r2 + 4.05871213) * r2 - 4.93480220).to(tl.float32)
    c = (1.0 + r2 * c).to(tl.float32)
    swapped = (quarter & 1) != 0
    sine, cosine = tl.where(swapped, c, s), tl.where(swapped, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def _laplace(word):
    e = tl.log(_positive_uniform(word))
    return tl.where((word & 1) != 0, e, -e).to(tl.float32)


@triton.jit
def _direction(seed, number, draw, tile, NORM: tl.constexpr, STREAM: tl.constexpr, GROUPS: tl.constexpr):
    group = tile * GROUPS + tl.arange(0, GROUPS)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), number.to(tl.uint32), draw, STREAM)
    if NORM == 1:
        z0, z1 = _normal_pair(w0, w1)
        z2, z3 = _normal_pair(w2, w3)
    else:
        z0, z1, z2, z3 = _laplace(w0), _laplace(w1), _laplace(w2), _laplace(w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _magnitude(v):
    return tl.where(v < 0, -v, v)


@triton.jit
def _bits(v):
    return v.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _of_bits(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _room(d, x, lo, hi):
    c = tl.where(d > 0, hi - x, x - lo)
    return tl.where(c < 0, 0.0, c)


@triton.jit
def _reach(v, g, lo, hi, share, DESCEND: tl.constexpr):
    """How far a sparse step may take an entry: its share, or up to the end of the range."""
    c = tl.where(_upwards(g, DESCEND), hi - v, v - lo)
    c = tl.where(c < share, c, share)
    return tl.where(c > 0, c, 0.0)


@triton.jit
def _upwards(g, DESCEND: tl.constexpr):
    return g < 0 if DESCEND else g > 0


@triton.jit
def _points(adv, x, grad, sample, tile, channels, pixels, clip_min, min_rows, clip_max, max_rows, moves, scale, factor,
            share, least, most, part, ADV_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr,
            DESCEND: tl.constexpr, SPARSE: tl.constexpr, SIGNS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The clean pixels of a tile, where they have moved to, and the range."""
    channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
    lo = _row(clip_min, min_rows, channel, channel < channels)
    hi = _row(clip_max, max_rows, channel, channel < channels)
    v = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
    clean = _load(x, sample, channel, pixel, channels, pixels, X_LAST, inside)
    if grad is not None:
        g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
        if SPARSE:
            bits = _magnitude(g).to(tl.int32, bitcast=True)
            if SIGNS:
                way = tl.where(bits >= least, share, 0.0)
            else:
                c = _reach(v, g, lo, hi, share, DESCEND)
                way = tl.where(bits >= most, c, tl.where(bits >= least, c * part, 0.0))
            moved = tl.where(_upwards(g, DESCEND), v + way, v - way)
        else:
            moved = v + g * scale * factor
        v = tl.where(moves, moved, v)
    return v, clean, lo, hi


@triton.jit
def _select(adv, grad, sample, channels, pixels, clip_min, min_rows, clip_max, max_rows, largest, length, step, moves,
            TILES: tl.constexpr, ADV_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, DESCEND: tl.constexpr,
            GROUPS: tl.constexpr):  # fmt: skip
    """(share, least, most, part, moves) of a sparse step, as in csrc/core/perturb_norms.h."""
    count = tl.cast(largest, tl.float64)
    share = (_magnitude(step).to(tl.float64) / count).to(tl.float32)
    budget = share.to(tl.float64) * count
    moves = tl.where(budget > 0, moves, False)
    least, most = tl.cast(0, tl.int64), _bits(length.to(tl.float32)) + 1  # no entry is larger
    within, above = tl.cast(float("inf"), tl.float64), tl.cast(0.0, tl.float64)
    searching = moves
    while searching:
        width = most - least
        first, second = least + (width + 2) // 3, least + (2 * width + 2) // 3
        sums, upper = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
        for tile in range(TILES):
            channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
            lo = _row(clip_min, min_rows, channel, channel < channels)
            hi = _row(clip_max, max_rows, channel, channel < channels)
            v = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
            g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
            bits = _magnitude(g).to(tl.int32, bitcast=True).to(tl.int64)
            c = tl.where(inside, _reach(v, g, lo, hi, share, DESCEND), 0.0).to(tl.float64)
            sums += tl.where(bits >= first, c, 0.0)
            upper += tl.where(bits >= second, c, 0.0)
        from_first, from_second = tl.sum(sums, 0), tl.sum(upper, 0)
        high, low = from_second >= budget, from_first >= budget
        above = tl.where(high, above, tl.where(low, from_second, from_first))
        within = tl.where(high, from_second, tl.where(low, from_first, within))
        most = tl.where(high, most, tl.where(low, second, first))
        least = tl.where(high, second, tl.where(low, first, least))
        most = tl.where(within == budget, least, most)
        searching = most - least > 1
    tied = (within < float("inf")) & (most > least)
    part = tl.where(tied, (budget - above) / (within - above), 0.0).to(tl.float32)
    return share, least.to(tl.int32), most.to(tl.int32), part, moves


@triton.jit
def _select_signs(grad, sample, channels, pixels, largest, length, step, moves, TILES: tl.constexpr,
                  GRAD_LAST: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """(share, least) of a step of APGD: entries whose bits are `least` or more move, by `share` each."""
    budget = tl.where(largest > 1, largest, 1)
    least, most = tl.cast(1, tl.int64), _bits(length.to(tl.float32)) + 1  # no entry of 0; none is larger
    count, searching = budget, moves
    while searching:
        width = most - least
        first = tl.where(width > 1, least + (width + 2) // 3, least)
        second = tl.where(width > 1, least + (2 * width + 2) // 3, most)
        lower, upper = tl.zeros([4 * GROUPS], tl.int64), tl.zeros([4 * GROUPS], tl.int64)
        for tile in range(TILES):
            channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
            g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
            bits = tl.where(inside, _magnitude(g), 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            lower += tl.where(bits >= first, 1, 0)
            upper += tl.where(bits >= second, 1, 0)
        from_first, from_second = tl.sum(lower, 0), tl.sum(upper, 0)
        if (from_first == budget) | (from_second == budget):
            least, searching = tl.where(from_second == budget, second, first), sample < 0
        elif width == 1:
            count, searching = from_first, sample < 0  # as many as tie, or as there are
        else:
            high, low = from_second >= budget, from_first >= budget
            most = tl.where(high, most, tl.where(low, second, first))
            least = tl.where(high, second, tl.where(low, first, least))
    share = (_magnitude(step).to(tl.float64) / count.to(tl.float64)).to(tl.float32)
    return share, least.to(tl.int32)


@triton.jit
def _carried(v, moved, clean, before, lo, hi, projects, shrink, share):
    """Where a step to `moved` and momentum take pixels from v (see csrc/core/perturb_norms.h)."""
    way = _clip(tl.where(projects, clean + (moved - clean) * shrink, moved), lo, hi) - v
    return v + way * share + (v - before) * (1.0 - share)


@triton.jit(do_not_specialize=["draw", "largest"])
def norms_kernel(
    adv, old, grad, x, out, cast, eps, eps_rows, step_size, step_size_rows, momentum, momentum_rows,
    clip_min, clip_min_rows, clip_max, clip_max_rows, active, key, ids, draw, largest, largest_rows, channels, pixels,
    TILES: tl.constexpr, ADV_LAST: tl.constexpr, OLD_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, CAST_LAST: tl.constexpr, NORM: tl.constexpr, DESCEND: tl.constexpr,
    SPARSE: tl.constexpr, SIGNS: tl.constexpr, STREAM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One sample; NORM is 0 for l_inf, 1 for l2, 2 for l1."""
    sample = tl.program_id(0).to(tl.int64)
    ball = _row(eps, eps_rows, sample, None)
    wide_ball = ball.to(tl.float64)
    dimensions = tl.cast(channels * pixels, tl.float64)
    moving = sample >= 0
    if active is not None:
        moving = tl.load(active + sample)
    seed, number = sample, sample
    if key is not None:
        seed = tl.load(key)
        number = _number(key, ids, sample)

    moves = moving
    scale, factor = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    share, part, least, most = scale, scale, tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    if grad is not None or key is not None:
        sums = tl.zeros([4 * GROUPS], tl.float64)
        for tile in range(TILES):
            channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
            if key is not None:
                g = tl.where(inside, _direction(seed, number, draw, tile, NORM, STREAM, GROUPS), 0.0)
            else:
                g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside)
            g = tl.where(inside, g.to(tl.float64), 0.0)
            sums += g * g if NORM == 1 else _magnitude(g)
        length = tl.sum(sums, 0)
        if NORM == 1:
            length = tl.sqrt(length)
        moves = tl.where((length > 0) & (length < float("inf")), moving, False)
        exponent = (length.to(tl.int64, bitcast=True) >> 52) - 1023
        exponent = tl.where(exponent < -126, -126, tl.where(exponent > 126, 126, exponent))
        power = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
        if key is not None:
            word, _, _, _ = tl.philox(seed, tl.zeros([1], tl.uint32), number.to(tl.uint32), draw, 1 << 8 | STREAM)
            u = tl.sum((word.to(tl.float64) + 0.5) * (2.0**-32), 0)
            step = (wide_ball * tl.exp(tl.log(u) / dimensions)).to(tl.float32)
        else:
            step = _row(step_size, step_size_rows, sample, None)
            if DESCEND:
                step *= -1.0
        scale = power.to(tl.float32)
        factor = (step.to(tl.float64) / (length * power)).to(tl.float32)
        if SIGNS:
            share, least = _select_signs(
                grad, sample, channels, pixels, tl.load(largest_rows + sample), length, step, moves, TILES, GRAD_LAST,
                GROUPS,
            )  # fmt: skip
        elif SPARSE:
            share, least, most, part, moves = _select(
                adv, grad, sample, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows, largest, length,
                step, moves, TILES, ADV_LAST, GRAD_LAST, DESCEND, GROUPS,
            )  # fmt: skip

    projects = sample < 0
    shrink, base = tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    if NORM != 0 and key is None:
        first, second = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
        for tile in range(TILES):
            _, _, inside = _place(tile, channels, pixels, GROUPS)
            v, clean, lo, hi = _points(
                adv, x, grad, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows, moves,
                scale, factor, share, least, most, part, ADV_LAST, GRAD_LAST, X_LAST, DESCEND, SPARSE, SIGNS, GROUPS,
            )  # fmt: skip
            d = v - clean
            m = _magnitude(d)
            if NORM == 1:
                first += tl.where(inside, d.to(tl.float64) * d.to(tl.float64), 0.0)
            else:
                c = _room(d, clean, lo, hi)
                first += tl.where(inside, tl.where(m > c, c, m).to(tl.float64), 0.0)
                second += tl.where(inside, m.to(tl.float64), 0.0)
        distance, unclipped = tl.sum(first, 0), tl.sum(second, 0)
        if NORM == 1:
            distance = tl.sqrt(distance)
            unclipped = distance
        projects = tl.where((distance > wide_ball) & (unclipped < float("inf")), moving, False)
        if NORM == 1:
            shrink = (wide_ball / distance).to(tl.float32)
            if old is not None:
                carry = _row(momentum, momentum_rows, sample, None)
                step_projects, step_shrink = projects, shrink
                sums = tl.zeros([4 * GROUPS], tl.float64)
                for tile in range(TILES):
                    channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
                    v, clean, lo, hi = _points(
                        adv, x, grad, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
                        moves, scale, factor, share, least, most, part, ADV_LAST, GRAD_LAST, X_LAST, DESCEND, SPARSE,
                        SIGNS, GROUPS,
                    )  # fmt: skip
                    start = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
                    before = _load(old, sample, channel, pixel, channels, pixels, OLD_LAST, inside)
                    d = _carried(start, v, clean, before, lo, hi, step_projects, step_shrink, carry) - clean
                    sums += tl.where(inside, d.to(tl.float64) * d.to(tl.float64), 0.0)
                distance = tl.sqrt(tl.sum(sums, 0))
                projects = tl.where((distance > wide_ball) & (distance < float("inf")), moving, False)
                shrink = (wide_ball / distance).to(tl.float32)
        else:
            low = ((distance - wide_ball) / dimensions).to(tl.float32)
            low = _of_bits(_bits(low) - tl.where(low > 0, 1, 0))  # rounding may have taken it past the root
            high = unclipped.to(tl.float32)
            shrink = tl.where(ball > 0, low, high)
            searching = tl.where(ball > 0, projects, False)
            searched, fine = 0, sample < 0
            while searching:
                kept, some = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
                for tile in range(TILES):
                    _, _, inside = _place(tile, channels, pixels, GROUPS)
                    v, clean, lo, hi = _points(
                        adv, x, grad, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
                        moves, scale, factor, share, least, most, part, ADV_LAST, GRAD_LAST, X_LAST, DESCEND, SPARSE,
                        SIGNS, GROUPS,
                    )  # fmt: skip
                    d = v - clean
                    c = _room(d, clean, lo, hi).to(tl.float64)
                    left = (_magnitude(d).to(tl.float64) - base.to(tl.float64)) - shrink.to(tl.float64)
                    left = tl.where(inside, left, 0.0)
                    kept += tl.where(left > 0, tl.where(left > c, c, left), 0.0)
                    some += tl.where(left > 0, tl.where(left > c, 0.0, 1.0), 0.0)
                excess, slope = tl.sum(kept, 0) - wide_ball, tl.sum(some, 0)
                root = (shrink.to(tl.float64) + excess / slope).to(tl.float32)
                outside = excess > 0
                low, high = tl.where(outside, shrink, low), tl.where(outside, high, shrink)
                coarse = tl.where(fine, False, shrink.to(tl.float64) * dimensions > 256.0 * wide_ball)
                middle = _of_bits((_bits(_magnitude(low)) + _bits(_magnitude(high))) // 2)
                middle = tl.where(fine, -middle, middle)
                searched += 1
                settled = tl.where(coarse, False, root == shrink)
                if settled | (middle == low) | (middle == high) | (searched == SEARCH_SWEEPS):
                    if coarse:
                        base, low, high = high, low - high, high - high
                        shrink = -_of_bits(_bits(_magnitude(low)) // 2)
                        searched, fine = 0, sample >= 0
                    else:
                        shrink = tl.where((root >= low) & (root <= high), root, high)
                        searching = sample < 0
                elif root == shrink:
                    shrink = _of_bits(_bits(shrink) + tl.where(outside, 1, -1))
                else:
                    newton = (root > low) & (root < high) & (searched <= NEWTON_SWEEPS)
                    shrink = tl.where(newton, root, middle)

    for tile in range(TILES):
        channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
        v, clean, lo, hi = _points(
            adv, x, grad, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows, moves,
            scale, factor, share, least, most, part, ADV_LAST, GRAD_LAST, X_LAST, DESCEND, SPARSE, SIGNS, GROUPS,
        )  # fmt: skip
        if key is not None:
            g = _direction(seed, number, draw, tile, NORM, STREAM, GROUPS)
            v = tl.where(moves, v + g * scale * factor, v)
        still = v  # of a sample at rest
        if old is not None:
            start = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
            before = _load(old, sample, channel, pixel, channels, pixels, OLD_LAST, inside)
            v = _carried(start, v, clean, before, lo, hi, step_projects, step_shrink, carry)
        found = v
        if NORM == 0:
            found = _clip(v, clean - ball, clean + ball)
        elif key is None:
            d = v - clean
            if NORM == 1:
                kept = d * shrink
            else:
                kept = _clip((_magnitude(d) - base) - shrink, 0.0, _room(d, clean, lo, hi))
                kept = tl.where(d < 0, -kept, kept)
            found = tl.where(projects, clean + kept, v)
        found = _clip(found, lo, hi)
        if active is not None:
            found = tl.where(moving, found, still)
        _store(out, found, sample, channel, pixel, channels, pixels, OUT_LAST, inside)
        if cast is not None:
            _store(cast, found, sample, channel, pixel, channels, pixels, CAST_LAST, inside)


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The one kernel of an operator's arguments, by the names of their fields; none without images."""
    adv, largest, signs = given["adv"], given.get("largest", 0), given.get("largest_rows") is not None
    batch, channels, pixels = plane_shape(adv.shape)
    require_single("images", adv)
    if not adv.numel():
        return []
    given = {"x": adv, **given}  # a start is around its own images
    if given["norm"] == NORMS.index(L1):
        given["old"] = None
    last = lasts(given)
    placed = any(given.get(name) is not None for name in ("key", "clip_min_rows", "clip_max_rows"))
    if is_one_order(given) and not placed:
        last = dict.fromkeys(last, False)
        channels, pixels = 1, channels * pixels
    groups = channels * -(-pixels // 4)
    if 4 * groups + 4 * GROUPS >= 2**31:
        raise DoorError(f"a sample of shape {list(adv.shape[1:])} is more than 32 bits can number")
    values = {
        **given, **last, "largest": largest, "channels": channels, "pixels": pixels, "tiles": -(-groups // GROUPS),
        "draw": signed(given.get("draw", 0)), "sparse": given["norm"] == NORMS.index(L1) and (signs or largest > 0),
        "signs": signs, "groups": GROUPS,
    }  # fmt: skip
    return [bound(norms_kernel, batch, values)]


def _example(
    norm: int, dtype: torch.dtype = torch.float32, *, step: bool = True, start: bool = False, last: str = "",
    rows: bool = False, largest: int = 0, apgd: bool = False, shape: tuple[int, ...] = (128, 3, 32, 32),
) -> Launch:  # fmt: skip
    """A launch on images without memory behind them (a batch of CIFAR-10); ``last``: what is in channels_last."""

    def meta(name: str, wanted: bool = True) -> Tensor | None:
        order = torch.channels_last if name in last.split() else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=order) if wanted else None

    def vector(given: bool, size: int = shape[0], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device="meta") if given else None

    given = {
        "adv": meta("adv"), "old": meta("old", apgd), "grad": meta("grad", step), "x": meta("x"), "out": meta("out"),
        "norm": norm, "eps": 0.5, "step_size": 0.1, "momentum": 0.75, "clip_min": 0.0, "clip_max": 1.0,
        **{f"{name}_rows": vector(rows) for name in ("eps", "step_size", "momentum")},
        **{f"{name}_rows": vector(rows, shape[1]) for name in ("clip_min", "clip_max")},
        "active": vector(rows, dtype=torch.bool), "largest": largest,
        "largest_rows": vector(apgd and norm == 2, dtype=torch.int64),
        "key": vector(start, 2, torch.int64), "ids": vector(start and rows, dtype=torch.int64), "stream": STREAM_START,
    }  # fmt: skip
    return launches("", given)[0]


_START = partial(_example, step=False, start=True)
# To be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    "l2 step": partial(_example, 1),
    "l2 step, per sample and channel": partial(_example, 1, rows=True),
    "l2 step, bf16, channels_last gradient": partial(_example, 1, torch.bfloat16, last="grad"),
    "l2 step of APGD": partial(_example, 1, apgd=True),
    "l2 step of APGD, bf16, per sample and channel, channels_last": partial(
        _example, 1, torch.bfloat16, apgd=True, rows=True, last="adv old grad x"
    ),
    "l1 step of APGD": partial(_example, 2, apgd=True),
    "l1 step of APGD, per sample and channel, channels_last gradient": partial(
        _example, 2, apgd=True, rows=True, last="grad"
    ),
    "l2 start": partial(_START, 1),
    "l1 step": partial(_example, 2),
    "l1 step, per sample and channel": partial(_example, 2, rows=True),
    "l1 step, sparse": partial(_example, 2, largest=31),
    "l1 step, sparse, per sample and channel": partial(_example, 2, rows=True, largest=31),
    "l1 start, per sample": partial(_START, 2, rows=True),
    "l1 project, fp16": partial(_example, 2, torch.float16, step=False),
    "l_inf project": partial(_example, 0, step=False),
    "l1 step, one pixel": partial(_example, 2, shape=(1, 1, 1, 1)),
    "l1 step, sparse, one pixel": partial(_example, 2, largest=1, shape=(1, 1, 1, 1)),
    "l2 start, one pixel": partial(_START, 1, shape=(1, 1, 1, 1)),
}
