"""The nuclear norm in Triton: one program, which turns the pairs of vectors that do not meet at once (see
csrc/core/nuclear_norm.h). Unlike other kernels of Triton's here it takes float64 too: it computes in it anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from . import Launch, bound
from .rows import meta, power_of_two

LANES = 64  # entries of a vector at once
PAIRS = 16  # of vectors at once, at most
SWEEPS = tl.constexpr(30)


@triton.jit
def _magnitude(v):
    return tl.where(v < 0, -v, v)


@triton.jit
def _entries(start, LANES: tl.constexpr):
    return start + tl.arange(0, LANES)


@triton.jit
def _place(vector, entry, count, length, ROWS: tl.constexpr):
    """Where an entry of a vector lies in the matrix."""
    return tl.cast(vector, tl.int64) * length + entry if ROWS else entry.to(tl.int64) * count + vector


@triton.jit
def _pair(round, pair, count):
    """The pairs of vectors that meet in a round, and which of them are there."""
    turning = count + count % 2 - 1
    up, down = round + pair, round - pair
    a = tl.where(up < turning, up, up - turning)
    b = tl.where(pair == 0, turning, tl.where(down < 0, down + turning, down))
    return tl.where(a < b, a, b), tl.where(a < b, b, a), (2 * pair < turning) & (a < count) & (b < count)


@triton.jit
def _turn(work, round, first, count, length, stride, cosine, nothing, PAIRS: tl.constexpr, LANES: tl.constexpr):
    """Makes some pairs orthogonal; whether one was not."""
    a, b, there = _pair(round, first + tl.arange(0, PAIRS), count)
    u, v = work + (a.to(tl.int64) * stride)[:, None], work + (b.to(tl.int64) * stride)[:, None]
    there = there[:, None]
    uu = tl.zeros([PAIRS, LANES], tl.float64)
    vv, uv = uu, uu
    for start in range(0, length, LANES):
        k = _entries(start, LANES)[None, :]
        mask = there & (k < length)
        x, y = tl.load(u + k, mask=mask, other=0.0), tl.load(v + k, mask=mask, other=0.0)
        uu += x * x
        vv += y * y
        uv += x * y
    uu, vv, uv = tl.sum(uu, 1, keep_dims=True), tl.sum(vv, 1, keep_dims=True), tl.sum(uv, 1, keep_dims=True)
    needed = (tl.where(uu < vv, uu, vv) > nothing) & (uv * uv > cosine * cosine * (uu * vv))
    half = (vv - uu) / (2.0 * tl.where(needed, uv, 1.0))
    root = tl.sqrt(1.0 + half * half)
    t = 1.0 / tl.where(half < 0, half - root, half + root)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    s = c * t
    for start in range(0, stride, LANES):
        k = _entries(start, LANES)[None, :]
        mask = needed & (k < stride)
        x, y = tl.load(u + k, mask=mask, other=0.0), tl.load(v + k, mask=mask, other=0.0)
        tl.store(u + k, c * x - s * y, mask=mask)
        tl.store(v + k, s * x + c * y, mask=mask)
    return tl.max(tl.max(needed.to(tl.int32), 1), 0)


@triton.jit(do_not_specialize=["batch", "classes"])
def nuclear_norm_kernel(
    d, value, grad, work, batch, classes,
    ROWS: tl.constexpr, SINGLE: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The matrix as ``count`` vectors of ``length``, each followed in ``work`` by its parts of all that there were."""
    count, length = (batch, classes) if ROWS else (classes, batch)
    stride = length + count
    lengths = work + count.to(tl.int64) * stride

    tops, rests = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for i in range(0, count):
        for start in range(0, length, LANES):
            k = _entries(start, LANES)
            v = tl.load(d + _place(i, k, count, length, ROWS), mask=k < length, other=0.0).to(tl.float64)
            tops = tl.where(_magnitude(v) > tops, _magnitude(v), tops)
            rests += v - v  # NaN, if v is not finite
    top, rest = tl.max(tops, 0), tl.sum(rests, 0)
    if (rest == 0) & (top > 0):
        exponent = (top.to(tl.int64, bitcast=True) >> 52) - 1023
        exponent = tl.where(exponent < -1000, -1000, tl.where(exponent > 1000, 1000, exponent))
        scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
        squares = tl.zeros([LANES], tl.float64)
        for i in range(0, count):
            for start in range(0, stride, LANES):
                k = _entries(start, LANES)
                v = tl.load(d + _place(i, k, count, length, ROWS), mask=k < length, other=0.0).to(tl.float64) * scale
                squares += v * v
                tl.store(work + tl.cast(i, tl.int64) * stride + k, tl.where(k - length == i, 1.0, v), mask=k < stride)
        tl.debug_barrier()  # what other threads have written

        nothing = tl.sum(squares, 0) * 2.0**-104
        cosine = tl.cast(2.0**-36, tl.float64) if SINGLE else length.to(tl.float64) * 2.0**-52
        moved, sweep = tl.cast(1, tl.int32), tl.cast(0, tl.int32)
        while (moved > 0) & (sweep < SWEEPS):
            moved = tl.cast(0, tl.int32)
            for round in range(0, count + count % 2 - 1):
                for first in range(0, (count + 1) // 2, PAIRS):
                    turned = _turn(work, round, first, count, length, stride, cosine, nothing, PAIRS, LANES)
                    moved = tl.where(turned > 0, turned, moved)
                tl.debug_barrier()
            sweep += 1

        longest = tl.cast(0.0, tl.float64)
        for i in range(0, count):
            sums = tl.zeros([LANES], tl.float64)
            for start in range(0, length, LANES):
                k = _entries(start, LANES)
                v = tl.load(work + tl.cast(i, tl.int64) * stride + k, mask=k < length, other=0.0)
                sums += v * v
            own = tl.sqrt(tl.sum(sums, 0))
            longest = tl.where(own > longest, own, longest)
            tl.store(lengths + i, own)
        tl.debug_barrier()
        least = longest * length.to(tl.float64) * (2.0**-23 if SINGLE else 2.0**-52)
        total = tl.cast(0.0, tl.float64)
        for i in range(0, count):
            own = tl.load(lengths + i)
            total += tl.where(own > least, own, 0.0)
        tl.store(value, (total / scale).to(value.dtype.element_ty))

        if grad is not None:
            for first in range(0, count, PAIRS):
                j = (first + tl.arange(0, PAIRS))[:, None]
                for start in range(0, length, LANES):
                    k = _entries(start, LANES)[None, :]
                    slope = tl.zeros([PAIRS, LANES], tl.float64)
                    for i in range(0, count):
                        own, vector = tl.load(lengths + i), work + tl.cast(i, tl.int64) * stride
                        part = tl.load(vector + length + j, mask=j < count, other=0.0)
                        along = tl.load(vector + k, mask=k < length, other=0.0)
                        counts = own > least
                        slope += tl.where(counts, part, 0.0) / tl.where(counts, own, 1.0) * along
                    place = _place(j, k, count, length, ROWS)
                    tl.store(grad + place, slope.to(grad.dtype.element_ty), mask=(j < count) & (k < length))
    else:  # zeros, or numbers that are none
        tl.store(value, rest.to(value.dtype.element_ty))
        if grad is not None:
            blank = (tl.zeros([LANES], tl.float64) + rest).to(grad.dtype.element_ty)
            for i in range(0, count):
                for start in range(0, length, LANES):
                    k = _entries(start, LANES)
                    tl.store(grad + _place(i, k, count, length, ROWS), blank, mask=k < length)


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The one kernel."""
    d = given["d"]
    batch, classes = d.shape
    room = min(d.shape) * (batch + classes + 1)
    pairs = min(PAIRS, power_of_two((min(d.shape) + 1) // 2))
    values = {
        **given, "work": torch.empty(room, dtype=torch.float64, device=d.device), "batch": batch, "classes": classes,
        "rows": batch <= classes, "single": d.dtype != torch.float64, "pairs": pairs, "lanes": LANES,
    }  # fmt: skip
    return [bound(nuclear_norm_kernel, 1, values)]


def _example(batch: int, classes: int, dtype: torch.dtype = torch.float32, *, grad: bool = True) -> Launch:
    """A launch on a matrix without memory behind it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d, made = meta((batch, classes), dtype), meta((batch, classes), wide)
    given = {"d": d, "value": meta((), wide), "grad": made if grad else None}
    return launches("nuclear_norm", given)[0]


VARIANTS: dict[str, Callable[[], Launch]] = {
    "nuclear norm": partial(_example, 128, 10),
    "nuclear norm, bf16, wide, without gradient": partial(_example, 8, 100, torch.bfloat16, grad=False),
    "nuclear norm, fp16, many": partial(_example, 64, 64, torch.float16),
    "nuclear norm, fp64": partial(_example, 64, 10, torch.float64),
}
