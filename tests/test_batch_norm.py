"""BatchNorm: PyTorch's bits once, its second derivatives to rounding, for layers as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import atlas_kernels as ak
from atlas_kernels.batch_norm import batch_norm
from operator_cases import same_bits, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(4, 3, 5, 5), (8, 64, 4, 4), (3, 70, 6, 6), (16, 33), (130, 8), (5, 7, 9), (2, 3, 2, 3, 4), (1, 2, 40, 50),
          (64, 12, 1, 1)]  # fmt: skip
OP = torch.ops.atlas_kernels.batch_norm_double_backward.default


def problem(shape, *, dtype=torch.float32, last=False, device="cpu", seed=0, mean=1.0, wide=None):
    """What batch_norm takes, and the cotangents: of its output, and of the gradients by x, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    wide = wide or (torch.float64 if dtype == torch.float64 else torch.float32)
    x, cotangent, v = (torch.randn(shape, generator=g) for _ in range(3))
    images = [to_layout(t.to(device, dtype), last) for t in (x + mean, cotangent, v)]
    numbers = [torch.randn(shape[1], generator=g).to(device, wide) for _ in range(5)]
    return {
        "x": images[0], "weight": numbers[0], "bias": numbers[1], "running_mean": numbers[2] * 0.1 + mean,
        "running_var": 0.5 + numbers[2].square(), "cotangent": images[1], "v": images[2],
        "weight_cotangent": numbers[3], "bias_cotangent": numbers[4],
    }  # fmt: skip


def derivatives(function, p, *, training, eps=1e-5):
    """Output and running statistics, gradients, and second derivatives by cotangent, x and weight."""
    running = [None if t is None else t.clone() for t in (p["running_mean"], p["running_var"])]
    x, weight, bias, cotangent = (
        None if p[n] is None else p[n].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for n in ("x", "weight", "bias", "cotangent")
    )
    out = function(x, *running, weight, bias, training, 0.1, eps)
    sources = [t for t in (x, weight, bias) if t is not None]
    first = torch.autograd.grad(out, sources, cotangent, create_graph=True)
    of = [p[n] for n in ("v", "weight_cotangent", "bias_cotangent")][: len(first)]
    used = [(t, u) for t, u in zip(first, of, strict=True) if u is not None]
    by = [t for t in (cotangent, x, weight) if t is not None]
    second = torch.autograd.grad([t for t, _ in used], by, [u for _, u in used], allow_unused=True)
    return [out.detach(), *running], [t.detach() for t in first], second


def check(p, **options):
    """PyTorch's bits but for the second derivatives. Those are not more than twice as far from float64 as PyTorch's, or
    a few roundings of the terms that they are sums of."""
    exact = derivatives(F.batch_norm, {n: None if t is None else t.double() for n, t in p.items()}, **options)[2]
    theirs = derivatives(F.batch_norm, p, **options)
    ours = derivatives(batch_norm, p, **options)
    assert all(a is b is None or same_bits(a, b) for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True))
    terms = (p["v"].double() * p["cotangent"].double()).abs().transpose(0, 1).flatten(1).sum(1)
    x, spread = p["x"].double().transpose(0, 1).flatten(1), p["running_var"]
    scale = ((x.var(1, correction=0) if options["training"] else spread.double()) + options.get("eps", 1e-5)).rsqrt()
    for what, a, b, c in zip(("cotangent", "x", "weight"), ours[2], theirs[2], exact, strict=False):
        if c is None:
            assert a is None or not a.any(), what
            continue
        source = p[what]
        assert a.dtype == source.dtype and a.shape == source.shape, what
        size = c.abs().max() if what != "weight" else (terms * scale).max()
        rounding = torch.finfo(a.dtype).eps * (16 if a.dtype != torch.float64 else 64)
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding * size, what


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, training, engine):
    for last in (False, True) if len(shape) > 3 else (False,):
        check(problem(shape, dtype=dtype, last=last, device=engine), training=training)


def check_operator(p, laid=torch.clone, *, training, parameters=True):
    """The operator itself against the reference in float64, which is given the same statistics."""
    wide = p["weight"].dtype
    if p["x"].ndim == 2:  # as the public function does
        p = p | {n: p[n].unsqueeze(2) for n in ("x", "cotangent", "v")}
    images = [laid(p[n]) for n in ("x", "cotangent", "v")]
    dims = [0, *range(2, p["x"].ndim)]
    mean, var = p["x"].double().mean(dims), p["x"].double().var(dims, correction=0)
    per_channel = [mean.to(wide), (var + 1e-5).rsqrt().to(wide)]
    per_channel += [p[n] if parameters else None for n in ("weight", "weight_cotangent", "bias_cotangent")]
    outs = [laid(torch.full_like(p["x"], torch.nan)) for _ in range(2)] + [torch.full_like(p["weight"], torch.nan)]
    OP(*images, *per_channel, training, *outs)
    exact = [torch.empty_like(t, dtype=torch.float64) for t in outs]
    with ak.backend("reference"):
        double = [None if t is None else t.double() for t in (*images, *per_channel)]
        OP(*double, training, *exact)
    terms = (p["v"] * p["cotangent"]).double().abs().sum(dims) * double[4]
    sizes = [*(t.abs().max() for t in exact[:2]), terms.max()]
    for a, c, size in zip(outs, exact, sizes, strict=True):
        assert (a.double() - c).abs().max() <= torch.finfo(a.dtype).eps * 16 * size
    alone = torch.full_like(p["weight"], torch.nan)
    OP(*images, *per_channel, training, None, None, alone)
    assert same_bits(alone, outs[2])


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_operator_itself(training, parameters, engine):
    for shape in SHAPES:
        for last in (False, True) if len(shape) == 4 else (False,):
            p = problem(shape, dtype=torch.float32, last=last, device=engine)
            check_operator(p, training=training, parameters=parameters)
