"""What the kernels on logits [B, C] share. A program has ROWS rows and runs through their classes in TILES tiles.

One tile, up to 2048 classes, is read once: the compiler joins loads of one place with no store between them. More
tiles are read again, from the cache, for every reduction. Padding is -inf, so that its probability is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # elements, unless
WIDEST = 2048  # classes, that still fit the registers with two tensors and their gradients, are a tile


@triton.jit
def exp(x):
    """e**x for x <= 0, as in csrc/core/math.h: tl.exp is off by |x| ulp."""
    x = tl.where(x < -104.0, -104.0, x)
    k = (x * 1.44269504 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    n = k.to(tl.float32)
    high, low = x - n * 0.693359375, n * -2.12194440e-4
    r = high - low
    lost = (high - r) - low
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    one_r = 1.0 + r
    y = one_r + ((r - (one_r - 1.0)) + (r * r * p + lost))
    half = k >> 1  # two factors, for subnormal results
    y = y * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return y * ((k - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """ln x for normal x > 0 (and NaN), as in csrc/core/math.h: tl.log contracts."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    n = k.to(tl.float32)
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    ff = f * f
    tail = (f * ff * p + n * -2.12194440e-4) - ff * 0.5
    high = n * 0.693359375
    total = high + f
    y = total + ((f - (total - high)) + tail)
    return tl.where(x == x, y, x)


@triton.jit
def log1p(x):
    """ln(1 + x) for -1/2 < x: the logarithm of the rounded sum, corrected for the rounding."""
    u = 1.0 + x
    return log(u) + tl.div_rn(x - (u - 1.0), u)


@triton.jit
def expm1(x):
    """e**x - 1 for x < 1/2, as in csrc/core/math.h: by its series between -1/2 and 1/2, else of x <= -1/2."""
    series = x * 0.0 + 1.0
    for k in tl.static_range(7):
        series = series * x * (1.0 / (8 - k)) + 1.0
    return tl.where((x > -0.5) & (x < 0.5), x * series, exp(x) - 1.0)


@triton.jit
def here(batch, ROWS: tl.constexpr):
    """(row, whether there is one), both [ROWS, 1]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < batch


@triton.jit
def columns(tile, BLOCK: tl.constexpr):
    return tile * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load(at, inside, tile, classes, BLOCK: tl.constexpr):
    """A tile of the rows that start at ``at``, in fp32."""
    column = columns(tile, BLOCK)
    return tl.load(at + column, mask=inside & (column < classes), other=float("-inf")).to(tl.float32)


@triton.jit
def store(to, g, inside, tile, classes, BLOCK: tl.constexpr):
    column = columns(tile, BLOCK)
    tl.store(to + column, g.to(to.dtype.element_ty), mask=inside & (column < classes))


@triton.jit
def softmax(at, inside, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """(largest logit, sum of exp(z - largest) over the OTHER classes, logarithm of the whole sum), each [ROWS, 1].

    Without the 1 of the largest, the sum keeps its precision when a probability is close to 1.
    """
    top = load(at, inside, 0, classes, BLOCK)
    for tile in range(1, TILES):
        top = tl.maximum(top, load(at, inside, tile, classes, BLOCK))
    top = tl.max(top, 1, keep_dims=True)
    others = tl.zeros((at.shape[0], BLOCK), tl.float32)
    equals = tl.zeros((at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        z = load(at, inside, tile, classes, BLOCK)
        e = exp(z - top)
        others += tl.where(z == top, e - 1.0, e)  # 0, or NaN where the largest is infinite
        equals += (z == top).to(tl.float32)
    others = tl.sum(others, 1, keep_dims=True) + (tl.sum(equals, 1, keep_dims=True) - 1.0)
    return top, others, log1p(others)


@triton.jit
def probability(z, top, others):
    return exp(z - top) * tl.div_rn(1.0, 1.0 + others)


@triton.jit
def less_one_hot(p, others, hit):
    """p - [hit]; where p is near 1, minus the probability of the others."""
    rest = tl.div_rn(others, 1.0 + others)
    return tl.where(hit, tl.where(p > 0.5, -rest, p - 1.0), p)


@triton.jit
def difference(q, q_others, p, p_others):
    """q - p; where both are near 1, the difference of what they lack."""
    rest = tl.div_rn(p_others, 1.0 + p_others) - tl.div_rn(q_others, 1.0 + q_others)
    return tl.where((q > 0.5) & (p > 0.5), rest, q - p)


@triton.jit
def pick(at, inside, label, classes, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The logit of class ``label``, found by comparing: a label out of range reads nothing and gives NaN."""
    found = tl.zeros((at.shape[0], BLOCK), tl.float32)
    for tile in range(TILES):
        z = load(at, inside, tile, classes, BLOCK)
        found += tl.where(columns(tile, BLOCK) == label, z, 0.0)
    found = tl.sum(found, 1, keep_dims=True)
    return tl.where((label >= 0) & (label < classes), found, float("nan"))


@triton.jit
def largest(at, inside, classes, not_a, not_b, not_c, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """(value, class) of the largest logit outside of three classes (-1: of all): the first of equals. NaN is largest.

    Logits are compared as integers of the same order, with the class, from the last on, in the lower half.
    """
    best = tl.full((at.shape[0], BLOCK), -0x7F80000100000000, tl.int64)  # -inf
    for tile in range(TILES):
        z = load(at, inside, tile, classes, BLOCK)
        column = columns(tile, BLOCK)
        bits = tl.where(z == z, z + 0.0, float("nan")).to(tl.int32, bitcast=True)  # + 0: the zeros are equal
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
        allowed = (column != not_a) & (column != not_b) & (column != not_c)
        best = tl.where(allowed & (key > best), key, best)
    best = tl.max(best, 1, keep_dims=True)
    order = (best >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)


def power_of_two(n: int) -> int:
    """The smallest one that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


def tiling(classes: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, TILES), of the number of classes alone: so a row's result does not depend on the batch."""
    block = power_of_two(classes) if classes <= WIDEST else TILE
    return max(1, TILE // block), block, -(-classes // block)


def aligned(logits: Tensor) -> Tensor:
    """The same logits at a multiple of 16 bytes: elsewhere fewer neighbours are a thread's, and a row's sums would be
    made in another order."""
    return logits.clone() if logits.data_ptr() % 16 else logits


def meta(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, to plan a launch with."""
    return torch.empty(shape, dtype=dtype, device="meta")
