"""FGSM-PGI's operators on a store of perturbations against the forms people write, eager and compiled.

Bytes by the model: what must be read and written once, the gradient twice (its norm is needed before the step). The
store has four times the images of a batch, and each call takes the next quarter, so that on a CPU it is in no cache
that would not hold it in training. Plain form: gather, steps and scatter as the authors' code has them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import atlas_kernels as ak
from bench_perturb import DEVICE, EPS, SIZES
from harness import measure
from targets import COPY

BATCHES, DECAY = 4, 0.3
LARGE = (512, 3, 224, 224)
TYPES = {"": torch.float32, " bf16": torch.bfloat16}

pytestmark = [pytest.mark.parametrize("size", SIZES, ids=str), pytest.mark.parametrize("kind", TYPES)]


def plain_start(x, stored, index):  # type: ignore[no-untyped-def]
    return torch.clamp(x + stored[index], 0, 1)


def plain_step(x, grad, stored, momentum, index):  # type: ignore[no-untyped-def]
    delta = stored[index].float()
    m = grad / grad.abs().sum() + DECAY * momentum[index]
    kept = torch.clamp(torch.clamp(delta + EPS * m.sign(), -EPS, EPS), -x, 1 - x)
    stored[index], momentum[index] = kept.to(stored.dtype), m.to(momentum.dtype)
    return torch.clamp(x + torch.clamp(delta + EPS * grad.sign(), -EPS, EPS), 0, 1)


def run(report, op, size, kind, reads, writes, ours, plain, *inputs):  # type: ignore[no-untyped-def]
    """reads, writes: of images and of the store, in elements a pixel."""
    torch._dynamo.reset()
    store = [torch.rand(BATCHES * size[0], *size[1:], device=DEVICE, dtype=TYPES[kind]) for _ in range(writes or 1)]
    parts = torch.randperm(BATCHES * size[0], device=DEVICE).view(BATCHES, -1)
    compiled = torch.compile(plain, dynamic=False)
    forms = {"ours": ours, "plain gather": plain, "compile gather": compiled}

    def each(form):  # type: ignore[no-untyped-def]
        turn = itertools.cycle(parts)
        return lambda: form(*inputs, *store, next(turn))

    found = []
    for backend in ("reference", ak.backends.default_for(DEVICE.type)):
        copies = [t.clone() for t in store]
        with ak.backend(backend):
            found.append([ours(*inputs, *copies, parts[0]), *copies])
    checked = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    pixel = 4 * reads + len(store) * store[0].element_size() * (2 if writes else 1)
    target = COPY.get(op) if size == LARGE else None
    calls = {name: each(form) for name, form in forms.items()}
    report(measure(op + kind, size, pixel * inputs[0].numel(), calls, checked, DEVICE, target), calls["ours"])


def test_stored_start(size, kind, report):
    x = torch.rand(size, device=DEVICE)
    run(report, "stored_start", size, kind, 2, 0, ak.stored_start, plain_start, x)


def test_stored_step(size, kind, report):
    x = torch.rand(size, device=DEVICE)
    ours = lambda *given: ak.stored_step(*given, EPS, decay=DECAY)  # noqa: E731
    run(report, "stored_step", size, kind, 4, 2, ours, plain_step, x, torch.randn_like(x))
