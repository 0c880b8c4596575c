"""The losses and objectives on the CUDA kernels, which g++ compiled for the CPU, against the fp64 reference; run with
operators.py, whose last test asks whether every kernel ran."""

from __future__ import annotations

import ctypes
import itertools
import os

import pytest
import torch

import atlas_kernels as ak
from atlas_kernels.core import core

PATH = os.environ["ATLAS_CUDA_ON_HOST"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TERMS = ["kl", "ce", "logit", "none"]

WEIGHT = torch.tensor(1.5)


def wide(z):
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def spread(y, t, z):
    """A distribution that is half one class's, a quarter another's."""
    hot = [torch.nn.functional.one_hot(v, z.shape[1]).float() for v in (y, t)]
    return 0.5 * hot[0] + 0.25 * hot[1] + 0.25 / z.shape[1]


LOSSES = {
    "cross_entropy": lambda z, a, y, t, **k: ak.cross_entropy(z, y, **k),
    "smoothed": lambda z, a, y, t, **k: ak.cross_entropy(z, y, label_smoothing=0.1, **k),
    "kl_div": lambda z, a, y, t, **k: ak.kl_div(z, a, **k),
    "trades": lambda z, a, y, t, **k: ak.trades_loss(z, a, y, **k),
    "mart": lambda z, a, y, t, **k: ak.mart_loss(z, a, y, **k),
    "entropy": lambda z, a, y, t, **k: ak.entropy(z, **k),
    "margin": lambda z, a, y, t, **k: ak.margin_loss(z, y, **k),
    "dlr": lambda z, a, y, t, **k: ak.dlr_loss(z, y, **k),
    "dlr_targeted": lambda z, a, y, t, **k: ak.dlr_loss(z, y, targets=t, **k),
    "logit_pairing": lambda z, a, y, t, **k: ak.logit_pairing(z, a, **k),
    "soft": lambda z, a, y, t, **k: ak.cross_entropy(z, spread(y, t, z), label_smoothing=0.1, **k),
    "tied logit": lambda z, a, y, t, **k: ak.consistency_loss(z, a, y, distance="logit", weight=0.7, **k),
    "tied prob": lambda z, a, y, t, **k: ak.consistency_loss(z, a, y, distance="prob", weight=WEIGHT.to(wide(z)), **k),
    "tied js": lambda z, a, y, t, **k: ak.consistency_loss(
        z, a, spread(y, t, z), distance="js", weight=WEIGHT, label_smoothing=0.3, **k
    ),
    "tied kl": lambda z, a, y, t, **k: ak.consistency_loss(z, a, y, distance="kl", label_smoothing=0.1, **k),
}
OBJECTIVES = ["ce", "kl", "margin", "dlr", "dlr_targeted"]


@pytest.fixture(scope="module", autouse=True)
def library():
    """CPU tensors go to the kernels under test, as if they were on CUDA device 0."""
    core().load_cuda(PATH)
    core().on_cuda(0)
    library = ctypes.CDLL(PATH)
    library.on_host_ran.restype, library.on_host_ran.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    yield library
    core().on_cuda(-1)


def rows(batch, classes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, a = ((3 * torch.randn(batch, classes, generator=g)).to(dtype) for _ in range(2))
    y = torch.randint(classes, (batch,), generator=g)
    t = (y + torch.randint(1, classes, (batch,), generator=g)) % classes
    return z, a, y, t, torch.rand(batch, generator=g, dtype=torch.float64)


def close(got, expected, dtype=None):
    """Up to the sums' order, and the rounding of results that are stored in 16 bits."""
    accuracy = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-5, torch.float64: 1e-12}[
        dtype or got.dtype
    ]
    torch.testing.assert_close(got.double(), expected.double(), rtol=accuracy, atol=accuracy, equal_nan=True)


def value_and_gradients(loss, z, a, y, t, wide=False, reduction="sum", **options):
    z, a = ((v.double() if wide else v).detach().requires_grad_() for v in (z, a))
    value = loss(z, a, y, t, reduction=reduction, **options)
    grads = torch.autograd.grad(value.sum(), (z, a), allow_unused=True)
    return value.detach(), *grads


def check(loss, z, a, y, t, weights=None, **options):
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    weighted = {} if weights is None else {"weights": weights.to(dtype)}
    got = value_and_gradients(loss, z, a, y, t, **weighted, **options)
    with ak.backend("reference"):
        weighted = {} if weights is None else {"weights": weights.to(dtype).double()}
        expected = value_and_gradients(loss, z, a, y, t, wide=True, **weighted, **options)
    close(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == z.dtype
            close(one, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, dtype):
    for batch, classes in [(1, 4), (5, 4), (130, 5), (70, 10), (9, 33), (5, 100), (3, 512), (2, 513), (3, 700)]:
        *inputs, weights = rows(batch, classes, dtype)
        check(LOSSES[name], *inputs, weights, reduction="none")
        check(LOSSES[name], *inputs, reduction="mean" if batch % 2 else "sum")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_atlas_loss(dtype):
    for (local, glob), n, classes in itertools.product(itertools.product(TERMS, TERMS), (0, 1, 3), (2, 10, 600)):
        if local == "none" and n:
            continue
        batch = 6 if classes < 100 else 2
        *_, y, _, weights = rows(batch, classes, dtype)
        joint = rows((n + 1 + (glob != "none")) * batch, classes, dtype, seed=1)[0]

        seen: list[torch.Tensor] = []

        def loss(z, a, y, t, local=local, glob=glob, seen=seen, **options):
            terms = {"local": local, "local_weight": 0.7, "global_term": glob, "global_weight": 1.3}
            loss, parts = ak.atlas_loss(z, y, **terms, return_terms=True, **options)
            seen.append(parts)
            return loss

        check(loss, joint, joint, y, None, weights)
        close(seen[0], seen[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective, dtype):
    for batch, classes in [(1, 4), (130, 5), (70, 10), (5, 100), (2, 513)]:
        z, a, y, t, _ = rows(batch, classes, dtype)
        z[::3, 0] = z[::3].amax(1)  # ties
        kappa = torch.arange(batch)
        options = {"objective": objective, "descend": batch == 5, "return_correct": True, "return_value": True}
        options |= {"targets": t} if objective == "dlr_targeted" else {}
        got = ak.attack_cotangent(z, y, reference=a if objective == "kl" else None, kappa=kappa, **options)
        with ak.backend("reference"):
            wide = a.double() if objective == "kl" else None
            expected = ak.attack_cotangent(z.double(), y, reference=wide, **options)
        close(got.cotangent, expected.cotangent)
        close(got.value, expected.value)
        assert torch.equal(got.correct, expected.correct)
        assert torch.equal(kappa, torch.arange(batch) + expected.correct)


def test_large_logits_and_infinite_losses_of_weight_zero():
    for big in (20.0, 65504.0, 1e37):
        z = torch.tensor([[big, 0.25, -1.25, 0.75], [1.0, 0.25, 0.125, -0.5], [0.5, big, -2.0, 1.0]])
        y, t = torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])
        for name in ("cross_entropy", "smoothed", "kl_div", "trades", "entropy", "dlr", "dlr_targeted"):
            check(LOSSES[name], z, z.roll(1, 0), y, t)
    q = torch.tensor([[0.0, -torch.inf, 1.0, 0.0]]).expand(3, 4).clone()
    for name in ("kl_div", "trades"):
        check(LOSSES[name], torch.zeros(3, 4), q, y, t, torch.tensor([0.0, 1.0, 0.0]), reduction="none")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("classes", [10, 100, 600])
def test_nan_stays_in_its_row(classes, bad):
    z, a, y, t, _ = rows(4, classes, torch.float32)
    broken = z.clone()
    broken[2, -1] = bad
    for name, loss in LOSSES.items():
        good = value_and_gradients(loss, z, a, y, t, reduction="none")
        got = value_and_gradients(loss, broken, a, y, t, reduction="none")
        for one, other in zip(good, got, strict=True):
            if one is not None:
                assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]]), name
        if bad != bad:
            nan = got[1][2].isnan()
            assert got[0][2].isnan() and (nan[-1] if name == "logit_pairing" else nan.all()), name
            other = LOSSES["tied js"](z, broken, y, t, reduction="none")
            assert other.isnan().tolist() == [False, False, True, False]
    got = ak.attack_cotangent(broken, y, return_correct=True)
    assert not got.correct[2]


def test_labels_that_are_no_class(monkeypatch):
    """Nothing is read or written out of bounds: the sanitizers say so. Such a row's loss is NaN."""
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    z = rows(4, 10, torch.float32)[0]
    labels = torch.tensor([10, -1, 2**62, 3])
    value, total, grad = torch.empty(4), torch.empty(()), torch.empty_like(z)
    torch.ops.atlas_kernels.cross_entropy(z, labels, 0.0, None, 1.0, value, total, grad)
    assert value.isnan().tolist() == [True, True, True, False] and total.isnan()
    for objective in range(5):
        cotangent, correct, kappa = torch.empty_like(z), torch.empty(4, dtype=torch.bool), torch.zeros(4).long()
        ops = torch.ops.atlas_kernels
        ops.attack_cotangent(z, labels, labels, z, objective, False, cotangent, correct, kappa, None)
        assert not correct[:3].any()


def test_gairat_weights():
    for batch, lam in itertools.product((1, 7, 256, 700), (-1.0, 2.0, -1e3)):
        kappa = torch.randint(11, (batch,), generator=torch.Generator().manual_seed(0))
        got = ak.gairat_weights(kappa, 10, lam)
        with ak.backend("reference"):
            close(got, ak.gairat_weights(kappa, 10, lam))


def test_nothing_is_launched_for_nothing(library):
    def ran():
        return sum(1 for _ in itertools.takewhile(bool, map(library.on_host_ran, itertools.count())))

    z, a, y, t, weights = rows(0, 10, torch.bfloat16)
    before = ran()
    for loss in LOSSES.values():
        value_and_gradients(loss, z, a, y, t, reduction="none")
        assert loss(z, a, y, t, reduction="sum") == 0 and loss(z, a, y, t, reduction="mean").isnan()
    for objective in OBJECTIVES:
        ak.attack_cotangent(
            z, y, objective=objective, reference=a if objective == "kl" else None,
            targets=t if objective == "dlr_targeted" else None,
        )  # fmt: skip
    ak.gairat_weights(y, 10)
    assert ran() <= before + 1  # the one that makes an empty sum 0
