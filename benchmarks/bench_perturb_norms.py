"""Steps and starts in the l2 and l1 ball against the forms people write, eager and compiled.

Bytes by the model: what the operator must read and write once. Plain forms: "renorm" is the step of Rice et al. 2020,
"in place" the same with the fewest passes that PyTorch allows; "sort" projects on the l1 ball alone (Duchi et al.
2008), then clips, which is less than ours does; "topk" is that behind the sparse step of Tramer & Boneh 2019 without
its care for the range. "lengths" is the step of Auto-PGD as pyautoattack chains it, and "signs" its l1 step, with
"sort" behind it, which is less than its projection on ball and range.
"""

from __future__ import annotations

import math

import pytest
import torch

import atlas_kernels as ak
from atlas_kernels.perturb import SPARSITY
from bench_perturb import images, in_reference
from harness import Call, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(128, 1, 28, 28), (128, 3, 32, 32), (8, 3, 224, 224)]
EPS, STEP, EPS_1, STEP_1 = 0.5, 0.125, 12.0, 3.0
PIXELS = (1, 2, 3)

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def l2_renorm(adv, grad, x):  # type: ignore[no-untyped-def]
    norm = grad.view(grad.shape[0], -1).norm(dim=1).view(-1, 1, 1, 1)
    d = adv + grad / (norm + 1e-10) * STEP - x
    return torch.clamp(x + d.view(d.size(0), -1).renorm(p=2, dim=0, maxnorm=EPS).view_as(d), 0, 1)


def l2_in_place(adv, grad, x):  # type: ignore[no-untyped-def]
    d = (adv - x).addcmul_(grad, STEP / torch.linalg.vector_norm(grad, dim=PIXELS, keepdim=True))
    shrink = (EPS / torch.linalg.vector_norm(d, dim=PIXELS, keepdim=True)).clamp_(max=1)
    return d.mul_(shrink).add_(x).clamp_(0, 1)


def onto_l1_ball(v, x):  # type: ignore[no-untyped-def]
    d = (v - x).flatten(1)
    sorted_ = d.abs().sort(1, descending=True)[0]
    left = sorted_.cumsum(1) - EPS_1
    count = (sorted_ * torch.arange(1, d.shape[1] + 1, device=d.device) > left).sum(1, keepdim=True)
    threshold = (left.gather(1, count - 1) / count).clamp_(min=0)
    return (x + (d.sign() * (d.abs() - threshold).clamp_(min=0)).view_as(x)).clamp_(0, 1)


def l1_sort(adv, grad, x):  # type: ignore[no-untyped-def]
    return onto_l1_ball(adv + STEP_1 * grad / grad.abs().sum(PIXELS, keepdim=True), x)


def l1_topk(adv, grad, x):  # type: ignore[no-untyped-def]
    flat = grad.flatten(1)
    largest = flat.abs().topk(math.ceil((1 - SPARSITY) * flat.shape[1]), sorted=False).indices
    step = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign_().mul_(STEP_1 / largest.shape[1]))
    return onto_l1_ball(adv + step.view_as(adv), x)


def apgd_l2(adv, old, grad, x):  # type: ignore[no-untyped-def]
    size = lambda t: t.square().flatten(1).sum(1).sqrt().view(-1, 1, 1, 1)  # noqa: E731

    def inside(v):  # type: ignore[no-untyped-def]
        d = v - x
        return torch.clamp(x + d / (size(d) + 1e-12) * torch.clamp(size(d), max=EPS), 0, 1)

    before, stepped = adv - old, inside(adv + STEP * (grad / (size(grad) + 1e-12)))
    return inside(adv + (stepped - adv) * 0.75 + before * 0.25)


def apgd_l1(adv, grad, x, counts):  # type: ignore[no-untyped-def]
    m = grad.abs().flatten(1)
    threshold = m.sort(1)[0].gather(1, m.shape[1] - counts.view(-1, 1)).view(-1, 1, 1, 1)
    signs = (grad * (grad.abs() >= threshold)).sign()
    return onto_l1_ball(adv + STEP_1 * signs / signs.abs().sum(PIXELS, keepdim=True), x)


def l2_start(x):  # type: ignore[no-untyped-def]
    z = torch.randn_like(x)
    radius = EPS * torch.rand(x.shape[0], 1, 1, 1, device=x.device).pow(1 / x[0].numel())
    return z.mul_(radius / torch.linalg.vector_norm(z, dim=PIXELS, keepdim=True)).add_(x).clamp_(0, 1)


def run(report, op, size, floats_per_pixel, ours, contenders, *inputs):  # type: ignore[no-untyped-def]
    """Check ours against the reference, to its promise, then measure it beside its contenders, eager and compiled."""
    torch._dynamo.reset()
    calls: dict[str, Call] = {"ours": ours}
    for name, form in contenders.items():
        compiled = torch.compile(form, dynamic=False)
        calls[f"plain {name}"] = lambda form=form: form(*inputs)
        calls[f"compile {name}"] = lambda compiled=compiled: compiled(*inputs)
    checked = torch.allclose(ours(), in_reference(ours), rtol=0, atol=4 * 2**-23)
    report(measure(op, size, 4 * floats_per_pixel * inputs[0].numel(), calls, checked, DEVICE), ours)


def test_pgd_step_l2(size, report):
    inputs = images(size)
    forms = {"renorm": l2_renorm, "in place": l2_in_place}
    run(report, "pgd_step l2", size, 4, lambda: ak.pgd_step(*inputs, EPS, STEP, norm="l2"), forms, *inputs)


def test_pgd_step_l1(size, report):
    inputs = images(size)
    ours = lambda: ak.pgd_step(*inputs, EPS_1, STEP_1, norm="l1", sparsity=None)  # noqa: E731
    run(report, "pgd_step l1", size, 4, ours, {"sort": l1_sort}, *inputs)


def test_pgd_step_l1_sparse(size, report):
    inputs = images(size)
    ours = lambda: ak.pgd_step(*inputs, EPS_1, STEP_1, norm="l1")  # noqa: E731
    run(report, "pgd_step l1 sparse", size, 4, ours, {"topk": l1_topk}, *inputs)


def test_apgd_step_l2(size, report):
    adv, grad, x = images(size)
    old = images(size)[0]
    ours = lambda: ak.apgd_step(adv, old, grad, x, EPS, STEP, 0.75, norm="l2")  # noqa: E731
    run(report, "apgd_step l2", size, 5, ours, {"lengths": apgd_l2}, adv, old, grad, x)


def test_apgd_step_l1(size, report):
    """A fifth of the entries moves, as in APGD's first iterations."""
    adv, grad, x = images(size)
    counts = torch.full(size[:1], x[0].numel() // 5, device=DEVICE)
    ours = lambda: ak.apgd_step(adv, adv, grad, x, EPS_1, STEP_1, 1.0, norm="l1", largest=counts)  # noqa: E731
    run(report, "apgd_step l1", size, 4, ours, {"signs": apgd_l1}, adv, grad, x, counts)


def test_random_start_l2(size, report):
    _, _, x = images(size)
    key = ak.noise_key(DEVICE)
    ours = lambda: ak.random_start(x, EPS, norm="l2", key=key)  # noqa: E731
    run(report, "random_start l2", size, 2, ours, {"randn": l2_start}, x)
