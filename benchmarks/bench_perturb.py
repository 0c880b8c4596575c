"""The l_inf perturbation operators against the forms people write, eager and compiled.

Bytes by the model: what the operator must read and write once. Plain forms: "minmax" clamps with min and max against
the ball, "delta" clamps the difference in place; both are what published training scripts do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import atlas_kernels as ak
from harness import Call, measure
from targets import COPY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 1, 28, 28), (128, 1, 28, 28), (128, 3, 32, 32), (512, 3, 32, 32), (32, 3, 224, 224)]
LARGE = (512, 3, 224, 224)  # of a GPU, far beyond its cache
if DEVICE.type == "cuda":
    SIZES.append(LARGE)
EPS, STEP, RADIUS, COUNT = 8 / 255, 2 / 255, 4 / 255, 2

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def images(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.rand(size, device=DEVICE)
    return (x + EPS * (2 * torch.rand_like(x) - 1)).clamp_(0, 1), torch.randn_like(x), x


def step_minmax(adv, grad, x):  # type: ignore[no-untyped-def]
    return torch.clamp(torch.max(torch.min(adv + STEP * grad.sign(), x + EPS), x - EPS), 0, 1)


def step_delta(adv, grad, x):  # type: ignore[no-untyped-def]
    return grad.sign().mul_(STEP).add_(adv).sub_(x).clamp_(-EPS, EPS).add_(x).clamp_(0, 1)


def apgd_plain(adv, old, grad, x, step, share):  # type: ignore[no-untyped-def]
    """As pyautoattack chains it."""
    inside = lambda v: torch.clamp(torch.min(torch.max(v, x - EPS), x + EPS), 0, 1)  # noqa: E731
    before, stepped = adv - old, inside(adv + step * grad.sign())
    return inside(adv + (stepped - adv) * share + before * (1 - share))


def start_plain(x, radius=EPS):  # type: ignore[no-untyped-def]
    return torch.empty_like(x).uniform_(-radius, radius).add_(x).clamp_(0, 1)


def neighbours_plain(adv):  # type: ignore[no-untyped-def]
    return start_plain(adv.repeat(COUNT, 1, 1, 1), RADIUS)


def step_neighbours_plain(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(adv, grad, x):  # type: ignore[no-untyped-def]
        moved = step(adv, grad, x)
        return torch.cat([x, moved, *(start_plain(moved, RADIUS) for _ in range(COUNT))])

    return run


def in_reference(call: Call) -> torch.Tensor:
    with ak.backend("reference"):
        return call()  # type: ignore[return-value]


def run(report, op, size, floats_per_pixel, ours, contenders, *inputs):  # type: ignore[no-untyped-def]
    """Check ours against the reference, then measure it beside its contenders, eager and compiled."""
    torch._dynamo.reset()
    calls: dict[str, Call] = {"ours": ours}
    for name, form in contenders.items():
        compiled = torch.compile(form, dynamic=False)
        calls[f"plain {name}"] = lambda form=form: form(*inputs)
        calls[f"compile {name}"] = lambda compiled=compiled: compiled(*inputs)
    checked = torch.equal(ours().clone(), in_reference(ours))  # a copy: both may write the same buffer
    bytes_moved = 4 * floats_per_pixel * inputs[0].numel()
    target = COPY.get(op) if size == LARGE else None
    report(measure(op, size, bytes_moved, calls, checked, DEVICE, target), ours)


def test_pgd_step(size, report):
    adv, grad, x = images(size)
    forms = {"minmax": step_minmax, "delta": step_delta}
    run(report, "pgd_step", size, 4, lambda: ak.pgd_step(adv, grad, x, EPS, STEP), forms, adv, grad, x)


def test_pgd_step_out(size, report):
    adv, grad, x = images(size)
    out = torch.empty_like(x)
    run(report, "pgd_step out=", size, 4, lambda: ak.pgd_step(adv, grad, x, EPS, STEP, out=out), {}, adv, grad, x)


def test_apgd_step(size, report):
    """Step sizes by sample, as APGD has them: some were halved more often than others."""
    adv, grad, x = images(size)
    old, rows = images(size)[0], 2 * EPS / 2 ** (torch.arange(size[0], device=DEVICE) % 4)
    ours = lambda: ak.apgd_step(adv, old, grad, x, EPS, rows, 0.75)  # noqa: E731
    inputs = adv, old, grad, x, rows.view(-1, 1, 1, 1), 0.75
    run(report, "apgd_step", size, 5, ours, {"clamps": apgd_plain}, *inputs)


def test_random_start(size, report):
    _, _, x = images(size)
    key = ak.noise_key(DEVICE)
    run(report, "random_start", size, 2, lambda: ak.random_start(x, EPS, key=key), {"uniform_": start_plain}, x)


def label_start_plain(x, labels, of_label):  # type: ignore[no-untyped-def]
    """As published, without the copies between host and device."""
    share, sign = 0.1 + 0.4 * torch.rand((), device=x.device), 1 - 2 * torch.randint(2, (), device=x.device)
    replaced = torch.rand_like(x) < share
    noise = torch.where(replaced, torch.empty_like(x).uniform_(-EPS, EPS), of_label[labels])
    return (x + sign * noise).clamp_(0, 1)


def test_label_noise_start(size, report):
    """Ten classes, whose noise is small beside the batch and mostly in the cache: the model has the images alone."""
    _, _, x = images(size)
    classes = 10
    of_label = EPS * torch.randn(classes, *size[1:], device=DEVICE).sign()
    labels, key = torch.arange(size[0], device=DEVICE) % classes, ak.noise_key(DEVICE)
    ours = lambda: ak.label_noise_start(x, labels, of_label, EPS, key=key)  # noqa: E731
    run(report, "label_noise_start", size, 2, ours, {"where": label_start_plain}, x, labels, of_label)


def test_sample_neighbours(size, report):
    adv, _, _ = images(size)
    key = ak.noise_key(DEVICE)
    ours = lambda: ak.sample_neighbours(adv, RADIUS, COUNT, key=key)  # noqa: E731
    run(report, f"sample_neighbours n={COUNT}", size, 1 + COUNT, ours, {"repeat": neighbours_plain}, adv)


def test_pgd_step_neighbours(size, report):
    adv, grad, x = images(size)
    key = ak.noise_key(DEVICE)
    ours = lambda: ak.pgd_step_neighbours(adv, grad, x, EPS, STEP, RADIUS, COUNT, key=key)  # noqa: E731
    forms = {"minmax": step_neighbours_plain(step_minmax), "delta": step_neighbours_plain(step_delta)}
    run(report, f"pgd_step_neighbours n={COUNT}", size, 5 + COUNT, ours, forms, adv, grad, x)


def test_pgd_step_neighbours_out(size, report):
    """As a trainer calls it: one batch buffer for all steps, beside plain code that has to concatenate."""
    adv, grad, x = images(size)
    key = ak.noise_key(DEVICE)
    out = torch.empty((2 + COUNT) * size[0], *size[1:], device=DEVICE)
    ours = lambda: ak.pgd_step_neighbours(adv, grad, x, EPS, STEP, RADIUS, COUNT, key=key, out=out)  # noqa: E731
    forms = {"minmax": step_neighbours_plain(step_minmax), "delta": step_neighbours_plain(step_delta)}
    run(report, f"pgd_step_neighbours n={COUNT} out=", size, 5 + COUNT, ours, forms, adv, grad, x)
