"""FAB's step towards a hyperplane in Triton: a program a sample that sweeps over its pixels (see
csrc/core/hyperplane.h, whose searches it repeats)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...layout import plane_shape
from ...schema import NORMS
from ..guard import DoorError
from . import Launch, bound, require_single
from .perturb import _clip, _load, _row, _store, is_one_order, lasts
from .perturb_norms import GROUPS, _bits, _magnitude, _place

FAR, SHORTEST = tl.constexpr(2.0**60), tl.constexpr(1e-8)


@triton.jit
def _pixels(adv, grad, x, sample, tile, channels, pixels, clip_min, min_rows, clip_max, max_rows,
            ADV_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """Of a tile: iterate, gradient, clean pixel and range. A pixel outside has no gradient."""
    channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
    lo = _row(clip_min, min_rows, channel, channel < channels)
    hi = _row(clip_max, max_rows, channel, channel < channels)
    v = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
    g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
    clean = _load(x, sample, channel, pixel, channels, pixels, X_LAST, inside)
    return tl.where(inside, v, 0.0), tl.where(inside, g, 0.0), tl.where(inside, clean, 0.0), lo, hi


@triton.jit
def _room(v, g, along, lo, hi):
    c = tl.where(g * along > 0, hi - v, v - lo)
    c = tl.where(c > 0, c, 0.0)  # none for NaN
    return tl.where(c < FAR, c, FAR)


@triton.jit
def _gains(v, g, along, lo, hi, root, NORM: tl.constexpr):
    """What the pixels that are not used up gain for each unit of the root, and what the others gain in all."""
    c, m = _room(v, g, along, lo, hi).to(tl.float64), _magnitude(g).to(tl.float64)
    if NORM == 1:
        free, slope = root * m < c, m * m
    else:
        free, slope = root < c, m
    return tl.where(free, slope, 0.0), tl.where(free, 0.0, m * c)


@triton.jit
def _gain_from(v, g, along, lo, hi, threshold):
    """What the pixels gain whose gradients are at least the threshold, of which these are the bits."""
    c, m = _room(v, g, along, lo, hi).to(tl.float64), _magnitude(g)
    return tl.where(_bits(m) >= threshold, m.to(tl.float64) * c, 0.0)


@triton.jit
def _distance(v, g, along, lo, hi, moves, root, least, most, part, NORM: tl.constexpr):
    c, m = _room(v, g, along, lo, hi), _magnitude(g)
    if NORM == 2:
        bits = _bits(m)
        d = tl.where(bits >= most, c, tl.where(bits >= least, c * part, 0.0))
    else:
        d = (root * m.to(tl.float64)).to(tl.float32) if NORM == 1 else root.to(tl.float32)
        d = tl.where(d < c, d, c)
    return tl.where(moves, tl.where(m > 0, d, 0.0), 0.0)


@triton.jit
def _newton(root, slope, gained, target):
    """The next root, and whether the search goes on; a root that is found stays."""
    following = tl.where(slope > 0, (target - gained) / slope, float("inf"))
    rises = following > root
    return tl.where(rises, following, root), rises & (following < float("inf"))


@triton.jit
def _halved(gained, target, tried, least, most, from_least, from_most):
    """The bracket of the threshold after one more trial; one that is narrow stays."""
    seeks = most - least > 1
    enough = gained >= target
    return (
        tl.where(seeks & enough, tried, least), tl.where(seeks, tl.where(enough, most, tried), most),
        tl.where(seeks & enough, gained, from_least), tl.where(seeks, tl.where(enough, from_most, gained), from_most),
    )  # fmt: skip


@triton.jit
def _part(target, from_least, from_most):
    tied = from_least - from_most
    return tl.where(tied > 0, (target - from_most) / tied, 0.0).to(tl.float32)


@triton.jit
def _fold(lengths, d, NORM: tl.constexpr):
    d = d.to(tl.float64)
    if NORM == 0:
        return tl.where(d > lengths, d, lengths)
    elif NORM == 1:
        return lengths + d * d
    else:
        return lengths + d


@triton.jit
def _length(lengths, NORM: tl.constexpr):
    if NORM == 0:
        found = tl.max(lengths, 0)
    else:
        found = tl.sum(lengths, 0)
        if NORM == 1:
            found = tl.sqrt(found)
    return tl.where(found > SHORTEST, found, SHORTEST)


@triton.jit
def hyperplane_kernel(
    adv, grad, x, out, gap, alpha_max, overshoot, clip_min, clip_min_rows, clip_max, clip_max_rows, channels, pixels,
    TILES: tl.constexpr, ADV_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One sample; NORM is 0 for l_inf, 1 for l2, 2 for l1. Of the two ways, a is from the iterate, b from x."""
    sample = tl.program_id(0).to(tl.int64)
    between, sizes = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
    for tile in range(TILES):
        v, g, clean, lo, hi = _pixels(
            adv, grad, x, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
            ADV_LAST, GRAD_LAST, X_LAST, GROUPS,
        )  # fmt: skip
        between += g.to(tl.float64) * (clean.to(tl.float64) - v.to(tl.float64))
        sizes += _magnitude(g).to(tl.float64)
    size = tl.sum(sizes, 0)
    gap_a = tl.load(gap + sample).to(tl.float64)
    gap_b = gap_a + tl.sum(between, 0)
    along_a, along_b = tl.where(gap_a < 0, 1.0, -1.0), tl.where(gap_b < 0, 1.0, -1.0)
    target_a, target_b = _magnitude(gap_a), _magnitude(gap_b)
    moves_a = (target_a < float("inf")) & (size < float("inf"))
    moves_b = (target_b < float("inf")) & (size < float("inf"))
    target_a, target_b = tl.where(moves_a, target_a, 0.0), tl.where(moves_b, target_b, 0.0)

    root_a, root_b = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    part_a, part_b = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    least_a, least_b = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    most_a, most_b = tl.cast(1, tl.int64), tl.cast(1, tl.int64)
    if NORM == 2:
        top = _bits(size.to(tl.float32)) + 1  # no entry is larger
        most_a, most_b = tl.where(moves_a, top, most_a), tl.where(moves_b, top, most_b)
        from_least_a, from_least_b = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
        from_most_a, from_most_b = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
        searching = (most_a - least_a > 1) | (most_b - least_b > 1)
        while searching:
            tried_a, tried_b = least_a + (most_a - least_a) // 2, least_b + (most_b - least_b) // 2
            gains_a, gains_b = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
            for tile in range(TILES):
                v, g, clean, lo, hi = _pixels(
                    adv, grad, x, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
                    ADV_LAST, GRAD_LAST, X_LAST, GROUPS,
                )  # fmt: skip
                gains_a += _gain_from(v, g, along_a, lo, hi, tried_a)
                gains_b += _gain_from(clean, g, along_b, lo, hi, tried_b)
            least_a, most_a, from_least_a, from_most_a = _halved(
                tl.sum(gains_a, 0), target_a, tried_a, least_a, most_a, from_least_a, from_most_a
            )
            least_b, most_b, from_least_b, from_most_b = _halved(
                tl.sum(gains_b, 0), target_b, tried_b, least_b, most_b, from_least_b, from_most_b
            )
            searching = (most_a - least_a > 1) | (most_b - least_b > 1)
        part_a, part_b = _part(target_a, from_least_a, from_most_a), _part(target_b, from_least_b, from_most_b)
    else:
        searching = moves_a | moves_b
        while searching:
            slope_a, gained_a = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
            slope_b, gained_b = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
            for tile in range(TILES):
                v, g, clean, lo, hi = _pixels(
                    adv, grad, x, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
                    ADV_LAST, GRAD_LAST, X_LAST, GROUPS,
                )  # fmt: skip
                free, used = _gains(v, g, along_a, lo, hi, root_a, NORM)
                slope_a += free
                gained_a += used
                free, used = _gains(clean, g, along_b, lo, hi, root_b, NORM)
                slope_b += free
                gained_b += used
            root_a, seeks_a = _newton(root_a, tl.sum(slope_a, 0), tl.sum(gained_a, 0), target_a)
            root_b, seeks_b = _newton(root_b, tl.sum(slope_b, 0), tl.sum(gained_b, 0), target_b)
            searching = seeks_a | seeks_b

    lengths_a, lengths_b = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
    for tile in range(TILES):
        v, g, clean, lo, hi = _pixels(
            adv, grad, x, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
            ADV_LAST, GRAD_LAST, X_LAST, GROUPS,
        )  # fmt: skip
        d = _distance(v, g, along_a, lo, hi, moves_a, root_a, least_a, most_a, part_a, NORM)
        lengths_a = _fold(lengths_a, d, NORM)
        d = _distance(clean, g, along_b, lo, hi, moves_b, root_b, least_b, most_b, part_b, NORM)
        lengths_b = _fold(lengths_b, d, NORM)
    length_a, length_b = _length(lengths_a, NORM), _length(lengths_b, NORM)
    share = length_a / (length_a + length_b)
    most_share = tl.cast(alpha_max, tl.float64)
    alpha = tl.where(share < most_share, share, most_share).to(tl.float32)
    beyond = tl.cast(overshoot, tl.float32)

    for tile in range(TILES):
        channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
        v, g, clean, lo, hi = _pixels(
            adv, grad, x, sample, tile, channels, pixels, clip_min, clip_min_rows, clip_max, clip_max_rows,
            ADV_LAST, GRAD_LAST, X_LAST, GROUPS,
        )  # fmt: skip
        d = _distance(v, g, along_a, lo, hi, moves_a, root_a, least_a, most_a, part_a, NORM) * beyond
        moved = v + tl.where(g * along_a > 0, d, -d)
        d = _distance(clean, g, along_b, lo, hi, moves_b, root_b, least_b, most_b, part_b, NORM) * beyond
        back = clean + tl.where(g * along_b > 0, d, -d)
        found = _clip(moved * (1.0 - alpha) + back * alpha, lo, hi)
        _store(out, found, sample, channel, pixel, channels, pixels, OUT_LAST, inside)


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The one kernel of an operator's arguments, by the names of their fields; none without images."""
    adv = given["adv"]
    batch, channels, pixels = plane_shape(adv.shape)
    require_single("images", adv)
    if not adv.numel():
        return []
    last = lasts(given)
    if is_one_order(given) and all(given.get(name) is None for name in ("clip_min_rows", "clip_max_rows")):
        last = dict.fromkeys(last, False)
        channels, pixels = 1, channels * pixels
    groups = channels * -(-pixels // 4)
    if 4 * groups + 4 * GROUPS >= 2**31:
        raise DoorError(f"a sample of shape {list(adv.shape[1:])} is more than 32 bits can number")
    values = {
        **given, **last, "channels": channels, "pixels": pixels, "tiles": -(-groups // GROUPS), "groups": GROUPS,
    }  # fmt: skip
    return [bound(hyperplane_kernel, batch, values)]


def _example(
    norm: int, dtype: torch.dtype = torch.float32, *, last: str = "", rows: bool = False,
    shape: tuple[int, ...] = (128, 3, 32, 32),
) -> Launch:  # fmt: skip
    """A launch on images without memory behind them (a batch of CIFAR-10); ``last``: what is in channels_last."""
    given: dict[str, Any] = {
        name: torch.empty(shape, dtype=dtype, device="meta").contiguous(
            memory_format=torch.channels_last if name in last.split() else torch.contiguous_format
        )
        for name in ("adv", "grad", "x", "out")
    }
    ranges = {
        f"{name}_rows": torch.empty(shape[1], device="meta") if rows else None for name in ("clip_min", "clip_max")
    }
    given |= {"gap": torch.empty(shape[0], device="meta"), "norm": norm, "alpha_max": 0.1, "overshoot": 1.05}
    return launches("", given | {"clip_min": 0.0, "clip_max": 1.0} | ranges)[0]


# To be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    **{f"{norm} plane": partial(_example, number) for number, norm in enumerate(NORMS)},
    "linf plane, per channel": partial(_example, 0, rows=True),
    "l2 plane, bf16, channels_last gradient": partial(_example, 1, torch.bfloat16, last="grad"),
    "l1 plane, fp16": partial(_example, 2, torch.float16),
    "l1 plane, one pixel": partial(_example, 2, shape=(1, 1, 1, 1)),
}
