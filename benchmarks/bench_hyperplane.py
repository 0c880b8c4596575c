"""FAB's step against the form people write, eager and compiled: both projections by sorting, then the mix.

Bytes by the model: three images read and one written. What a sample is swept over more often than once stays in the
cache, or in L2.
"""

from __future__ import annotations

import pytest
import torch

import atlas_kernels as ak
from atlas_kernels.backends.reference.hyperplane import length, way
from bench_perturb import DEVICE, SIZES
from harness import measure

pytestmark = [pytest.mark.parametrize("size", SIZES, ids=str), pytest.mark.parametrize("norm", ["linf", "l2", "l1"])]


def plain(adv, grad, x, gap, norm):  # type: ignore[no-untyped-def]
    low, high = torch.zeros((), device=adv.device), torch.ones((), device=adv.device)
    from_x = gap + (grad * (x - adv)).flatten(1).sum(1)
    d, d0 = way(adv, grad, gap, norm, low, high), way(x, grad, from_x, norm, low, high)
    a, b = (length(t, norm).clamp_min(1e-8) for t in (d, d0))
    alpha = (a / (a + b)).clamp_max(0.1).float().view(-1, 1, 1, 1)
    return ((adv + 1.05 * d) * (1 - alpha) + (x + 1.05 * d0) * alpha).clamp(0, 1)


def test_hyperplane_step(size, norm, report):
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    x, grad = torch.rand(size, generator=g), torch.randn(size, generator=g)
    adv = (x + 0.03 * torch.randn(size, generator=g)).clamp(0, 1)
    gap = -0.02 * grad.abs().flatten(1).sum(1)
    inputs = [t.to(DEVICE) for t in (adv, grad, x, gap)]
    calls = {
        "ours": lambda: ak.hyperplane_step(*inputs, norm=norm),
        "plain sort": lambda: plain(*inputs, norm),
        "compile sort": lambda: torch.compile(plain, dynamic=False)(*inputs, norm),
    }
    checked = bool(torch.allclose(calls["ours"](), calls["plain sort"](), atol=1e-5))
    report(measure(f"hyperplane_step {norm}", size, 16 * x.numel(), calls, checked, DEVICE, None), calls["ours"])
