"""The l2 and l1 perturbation operators in Triton: all three are one kernel with parts left out, a program a sample that
sweeps over its pixels (see csrc/core/perturb_norms.h, whose search it repeats)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import is_channels_last, plane_shape
from ...noise import STREAM_START
from ...schema import NORMS
from .. import BackendUnavailable
from ..native.door import DoorError, images, vector
from . import Launch, launch
from .perturb import _clip, _load, _number, _row, _signed, _store

GROUPS = 256  # of four pixels, a tile: never fewer pixels than threads (see TILE in perturb.py)
NEWTON_SWEEPS, SEARCH_SWEEPS = tl.constexpr(16), tl.constexpr(64)


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
def _room(d, x, lo, hi):
    c = tl.where(d > 0, hi - x, x - lo)
    return tl.where(c < 0, 0.0, c)


@triton.jit
def _points(adv, x, g, sample, tile, channels, pixels, moves, scale, factor, ADV_LAST: tl.constexpr,
            X_LAST: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The clean pixels of a tile, and where they have moved to."""
    channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
    v = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
    clean = _load(x, sample, channel, pixel, channels, pixels, X_LAST, inside)
    return tl.where(moves, v + g * scale * factor, v), clean


@triton.jit(do_not_specialize=["draw"])
def norms_kernel(
    adv, grad, x, out, cast, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, active,
    key, ids, draw, channels, pixels,
    TILES: tl.constexpr, ADV_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, CAST_LAST: tl.constexpr, NORM: tl.constexpr, DESCEND: tl.constexpr,
    STREAM: tl.constexpr, GROUPS: tl.constexpr,
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
            step = _row(step_size, step_rows, sample, None)
            if DESCEND:
                step *= -1.0
        scale = power.to(tl.float32)
        factor = (step.to(tl.float64) / (length * power)).to(tl.float32)

    projects = sample < 0
    shrink = tl.cast(1.0, tl.float32)
    if NORM != 0 and key is None:
        first, second = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
        for tile in range(TILES):
            channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
            g = 0.0
            if grad is not None:
                g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
            v, clean = _points(
                adv, x, g, sample, tile, channels, pixels, moves, scale, factor, ADV_LAST, X_LAST, GROUPS
            )
            d = v - clean
            m = _magnitude(d)
            if NORM == 1:
                first += tl.where(inside, d.to(tl.float64) * d.to(tl.float64), 0.0)
            else:
                lo = _row(clip_min, min_rows, channel, channel < channels)
                c = _room(d, clean, lo, _row(clip_max, max_rows, channel, channel < channels))
                first += tl.where(inside, tl.where(m > c, c, m).to(tl.float64), 0.0)
                second += tl.where(inside, m.to(tl.float64), 0.0)
        distance, unclipped = tl.sum(first, 0), tl.sum(second, 0)
        if NORM == 1:
            distance = tl.sqrt(distance)
            unclipped = distance
        projects = tl.where((distance > wide_ball) & (unclipped < float("inf")), moving, False)
        if NORM == 1:
            shrink = (wide_ball / distance).to(tl.float32)
        else:
            low, high = ((distance - wide_ball) / dimensions).to(tl.float32), unclipped.to(tl.float32)
            shrink = tl.where(ball > 0, low, high)
            searching = tl.where(ball > 0, projects, False)
            searched = 0
            while searching:
                kept, some = tl.zeros([4 * GROUPS], tl.float64), tl.zeros([4 * GROUPS], tl.float64)
                for tile in range(TILES):
                    channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
                    g = 0.0
                    if grad is not None:
                        g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
                    v, clean = _points(
                        adv, x, g, sample, tile, channels, pixels, moves, scale, factor, ADV_LAST, X_LAST, GROUPS
                    )
                    d = v - clean
                    m = _magnitude(d)
                    lo = _row(clip_min, min_rows, channel, channel < channels)
                    c = _room(d, clean, lo, _row(clip_max, max_rows, channel, channel < channels))
                    left = tl.where(inside, m - shrink, 0.0)
                    kept += tl.where(left > 0, tl.where(left > c, c, m), 0.0).to(tl.float64)
                    some += tl.where(left > 0, tl.where(left > c, 0.0, 1.0), 0.0).to(tl.float64)
                total, slope = tl.sum(kept, 0), tl.sum(some, 0)
                root = ((total - wide_ball) / slope).to(tl.float32)
                outside = total - slope * shrink.to(tl.float64) > wide_ball
                low, high = tl.where(outside, shrink, low), tl.where(outside, high, shrink)
                middle = (low + (high - low) * 0.5).to(tl.float32)
                searched += 1
                if (root == shrink) | (middle == low) | (middle == high) | (searched == SEARCH_SWEEPS):
                    shrink = tl.where((root >= low) & (root <= high), root, high)
                    searching = sample < 0
                else:
                    newton = (root > low) & (root < high) & (searched <= NEWTON_SWEEPS)
                    shrink = tl.where(newton, root, middle)

    for tile in range(TILES):
        channel, pixel, inside = _place(tile, channels, pixels, GROUPS)
        lo = _row(clip_min, min_rows, channel, channel < channels)
        hi = _row(clip_max, max_rows, channel, channel < channels)
        g = 0.0
        if key is not None:
            g = _direction(seed, number, draw, tile, NORM, STREAM, GROUPS)
        elif grad is not None:
            g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
        v, clean = _points(adv, x, g, sample, tile, channels, pixels, moves, scale, factor, ADV_LAST, X_LAST, GROUPS)
        found = v
        if NORM == 0:
            found = _clip(v, clean - ball, clean + ball)
        elif key is None:
            d = v - clean
            if NORM == 1:
                kept = d * shrink
            else:
                kept = _clip(_magnitude(d) - shrink, 0.0, _room(d, clean, lo, hi))
                kept = tl.where(d < 0, -kept, kept)
            found = tl.where(projects, clean + kept, v)
        found = _clip(found, lo, hi)
        if active is not None:
            found = tl.where(moving, found, v)
        _store(out, found, sample, channel, pixel, channels, pixels, OUT_LAST, inside)
        if cast is not None:
            _store(cast, found, sample, channel, pixel, channels, pixels, CAST_LAST, inside)


def _plan(
    adv, grad, x, out, cast, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows,
    descend=False, active=None, key=None, ids=None, draw=0,
) -> Launch:  # fmt: skip
    """Check every tensor whose address the kernel gets, as for the native core."""
    shape, device = adv.shape, adv.device
    batch, channels, pixels = plane_shape(shape)
    if adv.dtype == torch.float64:
        raise BackendUnavailable(
            "the triton backend computes float32, float16 and bfloat16 images, got float64: convert them with "
            '.float(), or use backend("native") or backend("reference")'
        )
    if not (grad is not None or key is not None) <= norm < len(NORMS):
        raise DoorError(f"norm is {norm}, expected an index of {NORMS}, of linf for project alone")
    last: list[bool | None] = []
    for name, t in (("adv", adv), ("grad", grad), ("x", x), ("out", out), ("cast", cast)):
        if t is not None:
            images(name, t, shape, device)
        last.append(None if t is None else is_channels_last(t))
    for name, t, size, dtype in (
        ("eps", eps_rows, batch, torch.float32), ("step_size", step_rows, batch, torch.float32),
        ("clip_min", min_rows, channels, torch.float32), ("clip_max", max_rows, channels, torch.float32),
        ("active", active, batch, torch.bool), ("key", key, 2, torch.int64), ("ids", ids, batch, torch.int64),
    ):  # fmt: skip
        if t is not None:
            vector(name, t, size, dtype, device)
    same_order = len({order for order in last if order is not None}) == 1
    if same_order and key is None and min_rows is None and max_rows is None:
        last = [False] * len(last)
        channels, pixels = 1, channels * pixels
    groups = channels * -(-pixels // 4)
    if 4 * groups + 4 * GROUPS >= 2**31:
        raise DoorError(f"a sample of shape {list(shape[1:])} is more than 32 bits can number")
    arguments = (
        adv, grad, x, out, cast, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, active,
        key, ids, _signed(draw), channels, pixels, -(-groups // GROUPS), *map(bool, last), norm, bool(descend),
        STREAM_START, GROUPS,
    )  # fmt: skip
    return Launch(norms_kernel, batch, arguments)


def _pass(*arguments: Any, **options: Any) -> None:
    adv = arguments[0]
    if adv.numel():
        launch(_plan(*arguments, **options), adv.device)


def random_start_norm(x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    bounds = clip_min, min_rows, clip_max, max_rows
    _pass(x, None, x, out, None, norm, eps, eps_rows, 0.0, None, *bounds, key=key, ids=ids, draw=draw)


def pgd_step_norm(
    adv, grad, x, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    _pass(adv, grad, x, out, cast, norm, eps, eps_rows, step_size, step_rows, *bounds, descend, active)


def project(v, x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, out):
    _pass(v, None, x, out, None, norm, eps, eps_rows, 0.0, None, clip_min, min_rows, clip_max, max_rows)


def _example(
    norm: int, dtype: torch.dtype = torch.float32, *, step: bool = True, start: bool = False, last: str = "",
    rows: bool = False, shape: tuple[int, ...] = (128, 3, 32, 32),
) -> Launch:  # fmt: skip
    """A launch on images without memory behind them (a batch of CIFAR-10); ``last``: what is in channels_last."""

    def meta(name: str, wanted: bool = True) -> Tensor | None:
        order = torch.channels_last if name in last.split() else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=order) if wanted else None

    def vector(given: bool, size: int = shape[0], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device="meta") if given else None

    return _plan(
        meta("adv"), meta("grad", step), meta("x"), meta("out"), None, norm, 0.5, vector(rows), 0.1, vector(rows),
        0.0, vector(rows, shape[1]), 1.0, vector(rows, shape[1]), False, vector(rows, dtype=torch.bool),
        vector(start, 2, torch.int64), vector(start and rows, dtype=torch.int64),
    )  # fmt: skip


_START = partial(_example, step=False, start=True)
# To be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    "l2 step": partial(_example, 1),
    "l2 step, per sample and channel": partial(_example, 1, rows=True),
    "l2 step, bf16, channels_last gradient": partial(_example, 1, torch.bfloat16, last="grad"),
    "l2 start": partial(_START, 1),
    "l1 step": partial(_example, 2),
    "l1 step, per sample and channel": partial(_example, 2, rows=True),
    "l1 start, per sample": partial(_START, 2, rows=True),
    "l1 project, fp16": partial(_example, 2, torch.float16, step=False),
    "l_inf project": partial(_example, 0, step=False),
    "l1 step, one pixel": partial(_example, 2, shape=(1, 1, 1, 1)),
    "l2 start, one pixel": partial(_START, 1, shape=(1, 1, 1, 1)),
}
