"""The l_inf perturbation operators in Triton: all four are one kernel with parts left out (see csrc/api.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import is_channels_last, plane_shape
from ...schema import STREAM_NEIGHBOUR, STREAM_START
from . import Launch, bound, require_single

# Pixels a program: eight a thread. Never fewer than one a thread: Triton would then let two threads load one pixel, and
# where the step is made in place the second might find it moved.
TILE = 1024
MAX_CHANNELS = 16  # of a tile of a channels_last tensor


@triton.jit
def _clip(v, lo, hi):
    # Two selects: tl.minimum and tl.maximum drop NaN.
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)


@triton.jit
def _row(value, per_row, row, mask):
    # The cast is for the interpreter, which leaves Python floats in double precision.
    if per_row is None:
        return tl.cast(value, tl.float32)
    else:
        return tl.load(per_row + row, mask=mask)


@triton.jit
def _offset(sample, channel, pixel, channels, pixels, LAST: tl.constexpr):
    if LAST:
        return (sample * pixels + pixel) * channels + channel
    else:
        return (sample * channels + channel) * pixels + pixel


@triton.jit
def _load(images, sample, channel, pixel, channels, pixels, LAST: tl.constexpr, mask):
    v = tl.load(images + _offset(sample, channel, pixel, channels, pixels, LAST), mask=mask)
    return v.to(tl.float32) if v.dtype.primitive_bitwidth == 16 else v


@triton.jit
def _store(images, v, sample, channel, pixel, channels, pixels, LAST: tl.constexpr, mask):
    to = images + _offset(sample, channel, pixel, channels, pixels, LAST)
    tl.store(to, v.to(images.dtype.element_ty), mask=mask)


@triton.jit
def _number(key, ids, sample):
    # The low 32 bits alone count: base + row wraps.
    if ids is None:
        return tl.load(key + 1).to(tl.uint32) + sample.to(tl.uint32)
    else:
        return tl.load(ids + sample).to(tl.uint32)


@triton.jit
def _words(seed, c0, c1, c2, c3):
    # The four words of a group side by side, [C, G] -> [C, 4 G]: one 128-bit access of the thread that drew them.
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["draw", "share_low", "share_high", "classes"])
def perturb_kernel(
    adv, old, grad, x, out, cast, eps, eps_rows, step_size, step_size_rows, momentum, momentum_rows,
    radius, radius_rows, clip_min, clip_min_rows, clip_max, clip_max_rows,
    active, key, ids, draw, labels, classes, share_low, share_high, batch, channels, pixels, channel_tiles, pixel_tiles,
    count: tl.constexpr,  # else Triton 3.6's interpreter cannot loop up to it under NumPy 2.4
    ADV_LAST: tl.constexpr, OLD_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, CAST_LAST: tl.constexpr, INCLUDE_X: tl.constexpr, DESCEND: tl.constexpr,
    PROJECT: tl.constexpr, STREAM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One tile of a sample: BLOCK_C channels x BLOCK_G groups of four pixels. ``out`` is [x;] [adv';] z_0; z_1; ..."""
    program = tl.program_id(0)
    pixel_tile = (program % pixel_tiles).to(tl.int64)
    channel_tile = (program // pixel_tiles % channel_tiles).to(tl.int64)
    sample = (program // (pixel_tiles * channel_tiles)).to(tl.int64)
    channel = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    pixel = pixel_tile * (4 * BLOCK_G) + tl.arange(0, 4 * BLOCK_G)[None, :]
    # Four pixels an access in every dtype: else tensors of different dtypes meet in shared memory.
    pixel = tl.max_contiguous(pixel, [1, 4])
    inside = (channel < channels) & (pixel < pixels)

    lo = _row(clip_min, clip_min_rows, channel, channel < channels)
    hi = _row(clip_max, clip_max_rows, channel, channel < channels)
    point = _load(adv, sample, channel, pixel, channels, pixels, ADV_LAST, inside)
    row = sample  # of out

    of_x = sample
    if labels is not None:
        label = tl.load(labels + sample)
        known = (label >= 0) & (label < classes)
        of_x = tl.where(known, label, 0)
    if x is not None:
        clean = _load(x, of_x, channel, pixel, channels, pixels, X_LAST, inside)
        if labels is None:
            ball = _row(eps, eps_rows, sample, None)
        if INCLUDE_X:
            _store(out, clean, row, channel, pixel, channels, pixels, OUT_LAST, inside)
            row += batch

    if grad is not None:
        moving = inside
        if active is not None:
            moving = tl.where(tl.load(active + sample), inside, False)  # not &: Triton 3.9's interpreter makes int32
        g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, moving)
        step = _row(step_size, step_size_rows, sample, None)
        if DESCEND:
            step *= -1.0  # not -step: Triton 3.6 makes that 0 - step, which loses the sign of a zero
        moved = point + step * ((g > 0).to(tl.float32) - (g < 0).to(tl.float32))
        moved = _clip(_clip(moved, clean - ball, clean + ball), lo, hi)
        if old is not None:
            before = point - _load(old, sample, channel, pixel, channels, pixels, OLD_LAST, moving)
            share = _row(momentum, momentum_rows, sample, None)
            moved = point + (moved - point) * share + before * (1.0 - share)
            moved = _clip(_clip(moved, clean - ball, clean + ball), lo, hi)
        point = moved if active is None else tl.where(moving, moved, point)
        _store(out, point, row, channel, pixel, channels, pixels, OUT_LAST, inside)
        row += batch
        if cast is not None:
            _store(cast, point, sample, channel, pixel, channels, pixels, CAST_LAST, inside)

    if count > 0:
        seed = tl.load(key)
        number = _number(key, ids, sample)
        group = pixel_tile * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
        c0 = (channel * ((pixels - 1) // 4 + 1) + group).to(tl.uint32)
        local = _row(radius, radius_rows, sample, None)
        if labels is not None:  # what the call draws, whatever its samples are
            zero = tl.zeros([1, 1], tl.uint32)
            drawn, turned, _, _ = tl.philox(seed, zero, zero, draw, 1 << 8 | STREAM)
            span = (share_high - share_low + 1).to(tl.uint32)
            share = share_low + tl.umulhi(drawn, span + zero).to(tl.int32)
            sign = tl.where(turned.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)
            sign = tl.where(known, sign, float("nan"))
        for k in range(count):
            words = _words(seed, c0, number, draw, k << 8 | STREAM)
            if labels is not None:
                noise = local * (((words << 12) >> 12).to(tl.float32) * (2.0**-19))
                z = point + sign * tl.where(((words >> 20) & 0xFFF) < share, noise, clean.to(tl.float32))
            else:
                z = point + local * ((words >> 8).to(tl.float32) * (2.0**-23))
            if PROJECT:
                z = _clip(z, clean - ball, clean + ball)
            z = _clip(z, lo, hi)
            _store(out, z, row, channel, pixel, channels, pixels, OUT_LAST, inside)
            row += batch


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The one kernel of an operator's arguments, by the names of their fields, with its tiles; none without images."""
    adv, out = given["adv"], given["out"]
    batch, channels, pixels = plane_shape(adv.shape)
    require_single("images", adv)
    if not out.numel():
        return []
    last, count = lasts(given), given.get("count", 0)
    placed = count or given.get("clip_min_rows") is not None or given.get("clip_max_rows") is not None
    if is_one_order(given) and not placed:
        # Without noise and per-channel bounds a pixel's place means nothing: run through memory as it lies.
        last = dict.fromkeys(last, False)
        channels, pixels = 1, channels * pixels
        if all(given.get(name) is None for name in ("active", "eps_rows", "step_size_rows", "momentum_rows")):
            batch, pixels = 1, batch * pixels
    block_c, block_p = tile_of(channels, pixels, any(last.values()))
    channel_tiles, pixel_tiles = -(-channels // block_c), -(-pixels // block_p)
    values = {
        **given, **last, "batch": batch, "channels": channels, "pixels": pixels, "channel_tiles": channel_tiles,
        "pixel_tiles": pixel_tiles, "count": count, "draw": signed(given.get("draw", 0)),
        "project": bool(given.get("project", operator == "sample_neighbours" and given.get("x") is not None)),
        "classes": len(given["x"]) if given.get("x") is not None else 0,
        "block_c": block_c, "block_g": block_p // 4,
    }  # fmt: skip
    return [bound(perturb_kernel, batch * channel_tiles * pixel_tiles, values)]


_IMAGES = ("adv", "old", "grad", "x", "out", "cast")


def lasts(given: dict[str, Any], images: tuple[str, ...] = _IMAGES) -> dict[str, bool]:
    """Of each of the images, whether they lie in channels_last: ``adv_last`` and so on."""
    return {f"{name}_last": (t := given.get(name)) is not None and is_channels_last(t) for name in images}


def is_one_order(given: dict[str, Any], images: tuple[str, ...] = _IMAGES) -> bool:
    """Whether all images lie in memory in one order."""
    return len({is_channels_last(given[name]) for name in images if given.get(name) is not None}) == 1


def tile_of(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """(channels, pixels) of a tile: one plane, but all channels where they lie side by side, or planes are small."""
    fill = TILE // min(TILE, max(4, _power_of_two(pixels)))
    block_c = min(_power_of_two(channels), max(fill, MAX_CHANNELS if channels_last else 1))
    return block_c, TILE // block_c


def _power_of_two(n: int) -> int:
    """The smallest one that is not less than ``n``."""
    return 1 << (n - 1).bit_length()


def signed(word: int) -> int:
    """The same 32 bits as an int32, the one type that Triton passes them as."""
    return (word + 2**31) % 2**32 - 2**31


def _example(
    dtype: torch.dtype = torch.float32, *, step: bool = True, count: int = 0, grad: torch.dtype | None = None,
    out: torch.dtype | None = None, cast: torch.dtype | None = None, last: str = "", include_x: bool = False,
    project: bool = False, per_sample: bool = False, per_channel: bool = False, labels: bool = False, old: bool = False,
    shape: tuple[int, ...] = (128, 3, 32, 32),
) -> Launch:  # fmt: skip
    """A launch on images without memory behind them (a batch of CIFAR-10); ``last``: what is in channels_last."""

    def meta(name: str, dtype: torch.dtype | None, slices: int = 1) -> Tensor | None:
        order = torch.channels_last if name in last.split() else torch.contiguous_format
        t = None if dtype is None else torch.empty((slices * shape[0], *shape[1:]), dtype=dtype, device="meta")
        return None if t is None else t.contiguous(memory_format=order)

    def vector(given: bool, size: int = shape[0], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device="meta") if given else None

    given = {
        "adv": meta("adv", dtype), "old": meta("old", dtype if old else None),
        "grad": meta("grad", (grad or dtype) if step else None),
        "x": meta("x", dtype if step or project or labels else None),
        "out": meta("out", out or dtype, include_x + step + count),
        "cast": meta("cast", cast), "eps": 0.03, "step_size": 0.01, "momentum": 0.75, "radius": 0.02,
        "clip_min": 0.0, "clip_max": 1.0,
        **{f"{name}_rows": vector(per_sample) for name in ("eps", "step_size", "momentum", "radius")},
        **{f"{name}_rows": vector(per_channel, shape[1]) for name in ("clip_min", "clip_max")},
        "active": vector(per_sample, dtype=torch.bool), "key": vector(count > 0, 2, torch.int64),
        "ids": vector(per_sample, dtype=torch.int64), "count": count, "include_x": include_x, "descend": False,
        "project": project, "stream": STREAM_NEIGHBOUR if step or count > 1 else STREAM_START,
        "labels": vector(labels, dtype=torch.int64), "share_low": 410, "share_high": 2048,
    }  # fmt: skip
    return launches("", given)[0]


_HALF, _BRAIN, _DOUBLE = torch.float16, torch.bfloat16, torch.float64
_BOTH = partial(_example, count=4, include_x=True)
# What the operators launch for the layouts and dtypes that training meets, to be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    "start": partial(_example, step=False, count=1),
    "start, channels_last": partial(_example, step=False, count=1, last="adv out"),
    "label noise": partial(_example, step=False, count=1, labels=True),
    "label noise, channels_last, per sample": partial(
        _example, step=False, count=1, labels=True, per_sample=True, last="adv x out"
    ),
    "step": _example,
    "step, per sample": partial(_example, per_sample=True),
    "step, per sample and channel": partial(_example, per_sample=True, per_channel=True),
    "step, bf16 gradient": partial(_example, grad=_BRAIN),
    "step, fp64 gradient": partial(_example, grad=_DOUBLE),
    "step, fp16": partial(_example, _HALF),
    "step, bf16": partial(_example, _BRAIN),
    "step, channels_last gradient": partial(_example, last="grad"),
    "step, channels_last bf16 gradient and cast": partial(_example, grad=_BRAIN, cast=_BRAIN, last="grad cast"),
    "step with momentum": partial(_example, old=True),
    "step with momentum, per sample": partial(_example, old=True, per_sample=True),
    "step with momentum, per sample and channel, channels_last": partial(
        _example, old=True, per_sample=True, per_channel=True, cast=_BRAIN, last="adv old x cast"
    ),
    "neighbours": partial(_example, step=False, count=4),
    "neighbours, projected, per sample": partial(_example, step=False, count=4, project=True, per_sample=True),
    "step and neighbours": _BOTH,
    "step and neighbours, per sample and channel": partial(_BOTH, project=True, per_sample=True, per_channel=True),
    "step and neighbours, channels_last": partial(_BOTH, last="adv grad x out"),
    "step and neighbours, fp16": partial(_BOTH, _HALF),
    "step and neighbours, bf16": partial(_BOTH, _BRAIN, project=True),
    "step and neighbours, bf16 network": partial(_BOTH, grad=_BRAIN, out=_BRAIN),
    "step and neighbours, bf16 channels_last network": partial(_BOTH, grad=_BRAIN, out=_BRAIN, last="grad out"),
    "step and neighbours, one pixel": partial(_BOTH, project=True, shape=(1, 2, 1, 1)),
    "step, more than 2**31 pixels": partial(_example, shape=(1 << 16, 3, 128, 128)),
}
