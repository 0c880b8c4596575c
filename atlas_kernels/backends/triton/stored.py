"""FGSM-PGI's stored perturbations in Triton: a sum of the gradient's magnitudes, then start or step as one kernel with
parts left out (see csrc/api.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import plane_shape
from . import Launch, bound, require_single
from .perturb import TILE, _clip, _load, _row, _store, is_one_order, lasts, tile_of

MOST_SUMS = 1024  # which every program of the step adds up
_IMAGES = ("x", "grad", "stored", "momentum", "out")


@triton.jit
def stored_norm_kernel(grad, partial, numel, TILES: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.float64)
    for tile in range(TILES):
        place = (program * TILES + tile) * TILE + tl.arange(0, TILE)
        g = tl.load(grad + place, mask=place < numel, other=0.0).to(tl.float32)
        total += tl.where(g < 0, -g, g).to(tl.float64)
    tl.store(partial + program, tl.sum(total, 0))


@triton.jit
def _sign(v):
    return (v > 0).to(tl.float32) - (v < 0).to(tl.float32)


@triton.jit
def stored_kernel(
    x, grad, stored, momentum, out, index, partial,
    eps, eps_rows, step_size, step_size_rows, clip_min, clip_min_rows, clip_max, clip_max_rows, decay,
    count, channels, pixels, channel_tiles, pixel_tiles,
    X_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, STORED_LAST: tl.constexpr, MOMENTUM_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of a sample: BLOCK_C channels x BLOCK_P pixels."""
    program = tl.program_id(0)
    pixel_tile = (program % pixel_tiles).to(tl.int64)
    channel_tile = (program // pixel_tiles % channel_tiles).to(tl.int64)
    sample = (program // (pixel_tiles * channel_tiles)).to(tl.int64)
    channel = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    pixel = pixel_tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    pixel = tl.max_contiguous(pixel, [1, 4])
    inside = (channel < channels) & (pixel < pixels)
    number = tl.load(index + sample)
    there = (number >= 0) & (number < count)
    known = tl.where(there, inside, False)  # not &: Triton 3.9's interpreter makes int32

    lo = _row(clip_min, clip_min_rows, channel, channel < channels)
    hi = _row(clip_max, clip_max_rows, channel, channel < channels)
    clean = _load(x, sample, channel, pixel, channels, pixels, X_LAST, inside)
    d = _load(stored, number, channel, pixel, channels, pixels, STORED_LAST, known).to(tl.float32)
    if grad is None:
        found = clean + d
    else:
        ball, step = _row(eps, eps_rows, sample, None), _row(step_size, step_size_rows, sample, None)
        low = ball * -1.0  # not -ball: Triton 3.6 makes that 0 - ball, which loses the sign of a zero
        g = _load(grad, sample, channel, pixel, channels, pixels, GRAD_LAST, inside).to(tl.float32)
        found = clean + _clip(d + step * _sign(g), low, ball)
        norm = tl.sum(tl.load(partial + tl.arange(0, BLOCKS)), 0).to(tl.float32)
        m = _load(momentum, number, channel, pixel, channels, pixels, MOMENTUM_LAST, known).to(tl.float32)
        learns = (norm > 0) & (norm < float("inf"))
        m = tl.div_rn(g, tl.zeros_like(g) + tl.where(learns, norm, 1.0)) + tl.cast(decay, tl.float32) * m
        d = _clip(_clip(d + step * _sign(m), low, ball), lo - clean, hi - clean)
        usable = tl.where(learns, known, False)
        _store(stored, d, number, channel, pixel, channels, pixels, STORED_LAST, usable)
        _store(momentum, m, number, channel, pixel, channels, pixels, MOMENTUM_LAST, usable)
    found = tl.where(there, _clip(found, lo, hi), float("nan"))
    _store(out, found, sample, channel, pixel, channels, pixels, OUT_LAST, inside)


def launches(operator: str, given: dict[str, Any]) -> list[Launch]:
    """The sum of a gradient, and the kernel of the operator's arguments with its tiles; none without images."""
    x, grad = given["x"], given.get("grad")
    batch, channels, pixels = plane_shape(x.shape)
    require_single("images", x)
    if not x.numel():
        return []
    last = lasts(given, _IMAGES)
    if is_one_order(given, _IMAGES) and all(given.get(f"clip_{side}_rows") is None for side in ("min", "max")):
        # A pixel's place within its sample means nothing: run through memory as it lies.
        last = dict.fromkeys(last, False)
        channels, pixels = 1, channels * pixels
    block_c, block_p = tile_of(channels, pixels, any(last.values()))
    channel_tiles, pixel_tiles = -(-channels // block_c), -(-pixels // block_p)
    values = {
        **given, **last, "count": len(given["stored"]), "channels": channels, "pixels": pixels,
        "channel_tiles": channel_tiles, "pixel_tiles": pixel_tiles, "block_c": block_c, "block_p": block_p, "blocks": 1,
    }  # fmt: skip
    found = []
    if grad is not None:
        tiles = triton.next_power_of_2(triton.cdiv(x.numel(), MOST_SUMS * TILE))
        blocks = triton.cdiv(x.numel(), tiles * TILE)
        sums = triton.next_power_of_2(blocks)  # those beyond add nothing
        values |= {"partial": torch.empty(sums, dtype=torch.float64, device=x.device), "blocks": sums}
        values |= {"numel": x.numel(), "tiles": tiles, "tile": TILE}
        found.append(bound(stored_norm_kernel, sums, values))
    return [*found, bound(stored_kernel, batch * channel_tiles * pixel_tiles, values)]


def _example(
    dtype: torch.dtype = torch.float32, store: torch.dtype = torch.float32, *, step: bool = True, last: str = "",
    rows: bool = False, out: torch.dtype | None = None, which: int = -1, shape: tuple[int, ...] = (128, 3, 32, 32),
) -> Launch:  # fmt: skip
    """A launch on images without memory behind them (a batch of CIFAR-10); ``last``: what is in channels_last."""

    def meta(name: str, dtype: torch.dtype, count: int = shape[0]) -> Tensor:
        order = torch.channels_last if name in last.split() else torch.contiguous_format
        return torch.empty((count, *shape[1:]), dtype=dtype, device="meta").contiguous(memory_format=order)

    def vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    given: dict[str, Any] = {
        "x": meta("x", dtype), "stored": meta("stored", store, 50_000), "out": meta("out", out or dtype),
        "index": vector(shape[0], torch.int64), "clip_min": 0.0, "clip_max": 1.0,
    }  # fmt: skip
    if step:
        given |= {"grad": meta("grad", dtype), "momentum": meta("momentum", store, 50_000)}
        given |= {"eps": 0.03, "step_size": 0.03, "decay": 0.3}
    if rows:
        given |= {f"{name}_rows": vector(shape[0]) for name in ("eps", "step_size")}
        given |= {f"{name}_rows": vector(shape[1]) for name in ("clip_min", "clip_max")}
    return launches("", given)[which]


_BRAIN = torch.bfloat16
# To be compiled ahead of time.
VARIANTS: dict[str, Callable[[], Launch]] = {
    "stored start": partial(_example, step=False),
    "stored start, bf16 store, channels_last network": partial(
        _example, store=_BRAIN, step=False, out=_BRAIN, last="out"
    ),
    "stored norm": partial(_example, which=0),
    "stored norm, bf16": partial(_example, _BRAIN, which=0),
    "stored step": _example,
    "stored step, bf16 store": partial(_example, store=_BRAIN),
    "stored step, channels_last gradient": partial(_example, last="grad"),
    "stored step, per sample and channel": partial(_example, rows=True),
    "stored step, bf16": partial(_example, _BRAIN, _BRAIN, last="grad out"),
    "stored step, one pixel": partial(_example, shape=(1, 1, 1, 1)),
    "stored step of large images": partial(_example, shape=(256, 3, 224, 224)),
}
