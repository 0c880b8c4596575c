"""The Triton kernels of the losses and of the attacks' cotangents, in the three ways of test_triton.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels import formulas
from atlas_kernels.backends import BackendUnavailable, triton
from atlas_kernels.backends.door import DoorError

pytest.importorskip("triton", reason="Triton is not installed")
from atlas_kernels.backends.triton import losses, objectives
from test_triton import BRAIN, DEVICE, DOUBLE, DTYPES, HALF, ROOT, SINGLE, compiles, runs, tool_output

VARIANTS = {**losses.VARIANTS, **objectives.VARIANTS}
CLASSES = [2, 3, 10, 17, 100, 1000]
KL, CE, LOGIT, NONE = range(4)

# Operator: logits, whether it has labels and targets, its numbers, the fewest classes.
OPERATORS = {
    "cross_entropy": ("cross_entropy", 1, 1, False, (0.0,), 2),
    "cross_entropy, smoothed": ("cross_entropy", 1, 1, False, (0.1,), 2),
    "kl_div": ("kl_div", 2, 0, False, (), 2),
    "trades_loss": ("trades_loss", 2, 1, False, (6.0,), 2),
    "mart_loss": ("mart_loss", 2, 1, False, (5.0,), 2),
    "entropy": ("entropy", 1, 0, False, (), 2),
    "margin_loss": ("margin_loss", 1, 1, False, (), 2),
    "dlr_loss": ("dlr_loss", 1, 1, False, (), 3),
    "dlr_loss, targeted": ("dlr_loss", 1, 1, True, (), 4),
    "logit_pairing": ("logit_pairing", 2, 0, False, (), 2),
    "soft_cross_entropy": ("soft_cross_entropy", 1, 0, False, (0.0,), 2),
    "soft_cross_entropy, smoothed": ("soft_cross_entropy", 1, 0, False, (0.1,), 2),
    "consistency_loss, logit": ("consistency_loss", 2, 1, False, (0, 0.7, False, 0.0), 2),
    "consistency_loss, prob": ("consistency_loss", 2, 0, False, (1, 0.7, True, 0.0), 2),
    "consistency_loss, js": ("consistency_loss", 2, 0, False, (2, 0.7, False, 0.1), 2),
    "consistency_loss, kl, smoothed": ("consistency_loss", 2, 1, False, (3, 0.7, True, 0.1), 2),
}
PAIRING = ("logit_pairing", "consistency_loss, logit")
OBJECTIVES = ["ce", "kl", "margin", "dlr", "dlr_targeted"]


def problem(batch, classes, dtype=SINGLE, *, seed=0):
    """(z, z', labels, targets, weights): logits far enough apart for many probabilities, z' near z."""
    g = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn((batch, classes), generator=g)
    adv = z + torch.randn((batch, classes), generator=g)
    labels = torch.randint(classes, (batch,), generator=g)
    labels[: batch // 2] = z[: batch // 2].argmax(1)
    targets = (labels + 1 + torch.randint(classes - 1, (batch,), generator=g)) % classes
    weights = torch.rand(batch, generator=g) + 0.5
    made = z.to(dtype), adv.to(dtype), labels, targets, weights
    return tuple(t.to(DEVICE) for t in made)


def between(name, tensors):
    """The arguments of an operator from its logits to its weights."""
    operator, _, labelled, targeted, numbers, _ = OPERATORS[name]
    z, _, labels, targets, _ = tensors
    indices = [labels] * labelled + ([targets if targeted else None] if operator == "dlr_loss" else [])
    if operator not in ("soft_cross_entropy", "consistency_loss"):
        return *indices, *numbers
    compute = DOUBLE if z.dtype == DOUBLE else SINGLE
    one, other = ((torch.arange(z.shape[1], device=DEVICE) == v[:, None]).float() for v in (labels, targets))
    soft = (0.5 * one + 0.25 * other + 0.25 / z.shape[1]).to(compute)
    if operator == "soft_cross_entropy":
        return soft, *numbers
    distance, weight, on_device, smoothing = numbers
    there = torch.full((), weight, device=DEVICE).to(compute) if on_device else None
    return labels if labelled else None, None if labelled else soft, distance, weight, there, smoothing


def call(backend, name, tensors, *, weights=None, scale=0.25, gradients=True):
    """Every output of one loss: value, total, and the gradients."""
    operator, pair, *_ = OPERATORS[name]
    z, adv, *_ = tensors
    compute = DOUBLE if z.dtype == DOUBLE else SINGLE
    value, total = torch.empty(len(z), dtype=compute, device=DEVICE), torch.empty((), dtype=compute, device=DEVICE)
    grads = [torch.empty_like(z) if gradients else None for _ in range(pair)]
    terms = [None] * (operator == "consistency_loss")
    with ak.backend(backend):
        function = getattr(torch.ops.atlas_kernels, operator)
        function(*(z, adv)[:pair], *between(name, tensors), weights, scale, value, total, *grads, *terms)
    return value, total, *[t for t in grads if t is not None]


def call_atlas(backend, logits, labels, local, global_term, weights, *, gradients=True):
    compute = DOUBLE if logits.dtype == DOUBLE else SINGLE
    batch = len(labels)
    value, total, terms = (torch.empty(s, dtype=compute, device=DEVICE) for s in ((batch,), (), (3, batch)))
    grad = torch.empty_like(logits) if gradients else None
    with ak.backend(backend):
        torch.ops.atlas_kernels.atlas_loss(
            logits, labels, local, 0.7, global_term, 1.3, weights, 0.25, value, total, grad, terms
        )
    return (value, total, terms, grad) if gradients else (value, total, terms)


def double(tensors):
    return tuple(t.to(DOUBLE) if t is not None and t.is_floating_point() else t for t in tensors)


def close(got: Tensor, exact: Tensor, rtol: float = 2e-6, share: float = 1e-6, atol: float = 0.0) -> None:
    """Within ``rtol`` of each number, ``share`` of the row's largest and ``atol``, rounded to the dtype of ``got``."""
    fine = exact.isfinite()
    assert same([got[~fine].to(DOUBLE)], [exact[~fine]])
    rounding = 0.0 if got.dtype == SINGLE else torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    size = exact.where(fine, 0.0).abs()
    bound = (rtol + rounding) * size + tiny + atol
    bound = bound + share * (size.amax(-1, keepdim=True) if size.ndim else size)
    wrong = fine & ~((got.to(DOUBLE) - exact).abs() <= bound)
    assert not wrong.any(), (got[wrong][:5], exact[wrong][:5])


def same(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(7e30), y.nan_to_num(7e30)) for x, y in zip(a, b, strict=True))


# --- against the reference in fp64 ------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients(name, classes):
    if classes < OPERATORS[name][-1]:
        pytest.skip("too few classes")
    for dtype in DTYPES:
        tensors = problem(5, classes, dtype)
        weights = None if dtype == HALF else tensors[-1]
        exact = call("reference", name, double(tensors), weights=None if weights is None else weights.double())
        got = call("triton", name, tensors, weights=weights)
        for t, e in zip(got, exact, strict=True):
            # A sum of both signs; a pull less the mean of all pulls.
            close(t, e, atol={"mart_loss": 1e-10, "consistency_loss, prob": 1e-9}.get(name, 0.0))
        if dtype == HALF:
            assert same(call("triton", name, tensors, gradients=False), got[:2])


@runs
@pytest.mark.parametrize("name", [n for n in OPERATORS if not n.startswith("dlr")])
def test_no_worse_than_twice_eager(name):
    operator, pair, *_ = OPERATORS[name]
    tensors = problem(64, 10, seed=3)
    exact = call("reference", name, double(tensors), scale=1.0)
    got = call("triton", name, tensors, scale=1.0)
    z = [t.clone().requires_grad_() for t in tensors[:pair]]
    value, _ = formulas.loss_and_terms(getattr(formulas, operator)(*z, *between(name, tensors)))
    eager = (value.detach(), value.sum().detach(), *torch.autograd.grad(value.sum(), z))
    for t, e, plain in zip(got, exact, eager, strict=True):
        assert (t - e).abs().max() <= 2 * (plain - e).abs().max() + 1e-7 * e.abs().max()


@runs
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("global_term", [KL, CE, LOGIT, NONE])
@pytest.mark.parametrize(("local", "count"), [(KL, 1), (KL, 3), (CE, 2), (LOGIT, 2), (LOGIT, 0), (NONE, 0)])
def test_atlas_loss(local, count, global_term, classes):
    batch, dtype = 3, [SINGLE, BRAIN, HALF][(local + global_term) % 3]
    parts = [problem(batch, classes, seed=k) for k in range((global_term != NONE) + 1 + count)]
    logits, labels, weights = torch.cat([p[0] for p in parts]).to(dtype), parts[0][2], parts[0][4]
    w = None if classes == 2 else weights
    exact = call_atlas("reference", logits.double(), labels, local, global_term, None if w is None else w.double())
    got = call_atlas("triton", logits, labels, local, global_term, w)
    for t, e in zip(got, exact, strict=True):
        close(t, e, share=2e-6, atol=1e-8)
    if classes == 2:
        assert same(call_atlas("triton", logits, labels, local, global_term, w, gradients=False), got[:3])


@runs
def test_terms_of_consistency():
    z, adv, labels, _, weights = problem(5, 10)
    for distance in ("logit", "prob", "js", "kl"):
        made = []
        for backend in ("triton", "reference"):
            with ak.backend(backend):
                made.append(ak.consistency_loss(
                    z, adv, labels, distance=distance, weight=0.7, weights=weights, return_terms=True
                ))  # fmt: skip
        torch.testing.assert_close(*made, rtol=2e-6, atol=1e-7)


def cotangent(backend, objective, tensors, descend=False):
    z, adv, labels, targets, _ = tensors
    kappa = torch.arange(len(z), device=DEVICE)
    with ak.backend(backend):
        found = ak.attack_cotangent(
            adv, labels, objective=objective, reference=z if objective == "kl" else None, descend=descend, kappa=kappa,
            targets=targets if objective == "dlr_targeted" else None, return_correct=True, return_value=True,
        )  # fmt: skip
    return found.cotangent, found.value, found.correct, kappa


@runs
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_attack_cotangent(objective, classes):
    if classes < {"dlr": 3, "dlr_targeted": 4}.get(objective, 2):
        pytest.skip("too few classes")
    for dtype in DTYPES:
        tensors, descend = problem(5, classes, dtype), dtype != BRAIN
        exact = cotangent("reference", objective, double(tensors), descend)
        got = cotangent("triton", objective, tensors, descend)
        close(got[0], exact[0], atol=1e-11)  # the 1e-12 of DLR
        close(got[1], exact[1])
        assert torch.equal(got[2], exact[2]) and got[2].any() and torch.equal(got[3], exact[3])


@runs
def test_attack_cotangent_of_few_outputs():
    z = problem(4, 10)[0]
    with ak.backend("triton"):
        found = ak.attack_cotangent(z, objective="kl", reference=z.flip(0))
    assert found.correct is None and found.value is None and found.cotangent.isfinite().all()


@runs
@pytest.mark.parametrize("batch", [1, 7, 1024, 3000])
def test_gairat_weights(batch):
    kappa = torch.randint(0, 11, (batch,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for lam in (-1.0, 0.0, 3.0, -60.0, -1e6, float("inf")):
        for k in (kappa, kappa.clamp(min=8)):
            with ak.backend("triton"):
                got = ak.gairat_weights(k, 11, lam)
            with ak.backend("reference"):
                torch.testing.assert_close(got, ak.gairat_weights(k, 11, lam), rtol=2e-6, atol=0)
            if lam == -1e6:
                with ak.backend("triton"):
                    assert torch.equal(got, ak.gairat_weights(k, 11, -3e38))


# --- at the edges -----------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("classes", [2, 10, 2500])
def test_probabilities_near_one(classes):
    """Relative to each number: neither log p_y nor p_y - 1 may cancel."""
    z = -10 - torch.arange(classes, device=DEVICE) % 7 * torch.arange(1.0, 7.0, device=DEVICE)[:, None]
    adv = z - 0.5 * (torch.arange(classes, device=DEVICE) % 3)
    labels = torch.arange(6, device=DEVICE) % classes
    for t in (z, adv):
        t[torch.arange(6), labels] = 15.0
    tensors = z, adv, labels, labels, None
    for name in ("cross_entropy", "entropy", "kl_div", "trades_loss", "mart_loss"):
        exact = call("reference", name, double(tensors))
        for t, e in zip(call("triton", name, tensors), exact, strict=True):
            close(t, e, 2e-6, 0.0, 1e-15)  # q - p cancels in the reference, in fp64


@runs
@pytest.mark.parametrize("name", OPERATORS)
def test_edges(name):
    """+-1e4, ties, zero probabilities, all equal; in a row of many tiles as well."""
    inf = float("inf")
    rows = [[1e4, -1e4, 0, 5, 1e4], [1, 3, 3, 3, 0], [2, 2, 2, 2, 2], [0, -inf, 1, -inf, 4], [-0.0, 0.0, -0.0, 0.0, -1],
            [-1e4, -1e4, -1e4, -1e4, -9e3], [1e-30, 2e-30, 0, -1e-30, 1e-38]]  # fmt: skip
    z = torch.tensor(rows, device=DEVICE)
    pairing = name in PAIRING
    if pairing:
        z = z.nan_to_num(neginf=-50.0)
    if name == "mart_loss":
        z = z[:-1]  # its largest other probability is a tie, of different logits
    padding = torch.full((len(z), 3000), -1e4 if pairing else -inf, device=DEVICE)
    for logits in (z, torch.cat([z[:, :2], padding, z[:, 2:]], 1)):
        for shift in range(5):
            labels = torch.arange(len(z), device=DEVICE).add(shift) % 5
            columns = labels if logits is z else torch.where(labels < 2, labels, labels + 3000)
            tensors = logits, logits.where(logits < -1e3, logits * 0.5), columns, columns.roll(1), None
            if logits is not z and ("smoothed" in name or (not pairing and name.startswith(("soft", "consistency")))):
                continue  # a target at a logit of -inf
            exact = call("reference", name, double(tensors))
            for t, e in zip(call("triton", name, tensors), exact, strict=True):
                close(t, e.to(SINGLE).to(DOUBLE), 1e-5, atol=2e-7)
            if logits is not z:
                break


@runs
@pytest.mark.parametrize("name", OPERATORS)
def test_large_logits_keep_their_digits(name):
    for big in (20.0, 100.0, 65504.0, 1e6, 3e38):
        sure = [[big, 0.25, -1.25, 0.75, -2], [0.5, big, -2, 1, 0], [-big, 0.25, -1, 0.5, 2], [1, 0.25, 0.125, -0.5, 0]]
        pairs = [(a, b) for a in sure for b in sure]
        z, adv = (torch.tensor([pair[i] for pair in pairs], device=DEVICE) for i in (0, 1))
        labels = torch.arange(len(pairs), device=DEVICE) % 5
        tensors = z, adv, labels, (labels + 2) % 5, None
        value, total, *grads = call("reference", name, double(tensors))
        found = call("triton", name, tensors)
        close(found[0], value.to(SINGLE).to(DOUBLE), 1e-5, atol=1e-6)
        close(found[1], total.to(SINGLE).to(DOUBLE), atol=1e-6 * float(value.abs().sum()))
        size = value.abs().clamp(1, 1e38)[:, None]  # p (log ratio - KL) is what is left of two numbers of this size
        for t, e in zip(found[2:], grads, strict=True):
            close(t, e.to(SINGLE).to(DOUBLE), 1e-5, atol=1e-6 * size)


@runs
def test_what_has_weight_zero_adds_nothing_though_it_is_infinite():
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([[1, 2, 0.0], [1, 2, 0], [1, nan, 0], [1, 2, -inf]], device=DEVICE)
    q = torch.tensor([[0, -inf, 1.0], [0, -inf, 1], [0, 1, 0], [0, 0, 1]], device=DEVICE)
    labels, weights = torch.tensor([1, 1, 0, 2], device=DEVICE), torch.tensor([0, 1.0, 0, 0], device=DEVICE)
    tensors = z, q, labels, labels, weights
    for name in (n for n in OPERATORS if not n.startswith("dlr")):
        for t, e in zip(*(call(b, name, tensors, weights=weights) for b in ("triton", "reference")), strict=True):
            torch.testing.assert_close(t, e, rtol=1e-5, atol=1e-6, equal_nan=True)
    value, _, to_z, to_q = call("triton", "kl_div", tensors, weights=weights)
    assert value[[0, 3]].tolist() == [0, 0] and value[1] == inf and value[2].isnan()
    assert not to_z[[0, 3]].any() and not to_q[[0, 3]].any() and to_z[1].tolist() == [-inf, inf, -inf]
    got, want = (call_atlas(b, torch.cat([z, q, z]), labels, KL, KL, weights) for b in ("triton", "reference"))
    for t, e in zip(got, want, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not got[3].view(3, 4, 3)[:, [0, 3]].any()


@runs
@pytest.mark.parametrize("name", OPERATORS)
def test_nan_stays_in_its_row(name):
    tensors = problem(40, 10)  # more rows than one program has
    clean = call("triton", name, tensors)
    others = torch.arange(40, device=DEVICE) != 3
    looks_at_few = name in ("margin_loss", "dlr_loss", "dlr_loss, targeted", *PAIRING)
    for bad in (float("nan"),) if looks_at_few else (float("nan"), float("inf")):
        for broken in (tensors[0], tensors[1])[: OPERATORS[name][1]]:
            before, broken[3, 4] = broken[3, 4].item(), bad
            got = call("triton", name, tensors)
            assert got[0][3].isnan() and got[1].isnan() and same([got[0][others]], [clean[0][others]])
            for t, c in zip(got[2:], clean[2:], strict=True):
                assert same([t[others]], [c[others]])
                assert t[3].isnan().any() if name in PAIRING else t[3].isnan().all()
            broken[3, 4] = before


@runs
def test_nan_and_ties_in_the_prediction():
    nan = float("nan")
    z = torch.tensor([[1, 3, 3, 0], [nan, 9, nan, 1], [0, nan, 9, 1], [-0.0, 0.0, 0, 0.0]], device=DEVICE)
    for labels in torch.arange(4, device=DEVICE).expand(4, 4).T:
        got, exact = (cotangent(b, "margin", (z, z, labels, labels, None)) for b in ("triton", "reference"))
        assert torch.equal(got[2], exact[2]) and same(got[:2], exact[:2])


@runs
@pytest.mark.parametrize("name", [n for n in OPERATORS if OPERATORS[n][2]])
def test_labels_out_of_range_read_nothing(name):
    tensors = problem(6, 10)
    clean = call("triton", name, tensors)
    for bad in (-1, 10, 15, 2**40, -(2**62)):
        tensors[2][1] = bad
        got = call("triton", name, tensors)
        assert got[0][1].isnan()
        assert same([got[0][2:], *(t[2:] for t in got[2:])], [clean[0][2:], *(t[2:] for t in clean[2:])])
    logits = torch.cat([tensors[0], tensors[1]])
    assert call_atlas("triton", logits, tensors[2], KL, KL, None)[0].isnan().tolist() == [False, True] + 4 * [False]


@runs
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("classes", [10, 2500])
def test_a_row_does_not_depend_on_the_batch(name, classes):
    tensors = problem(70 if classes == 10 else 3, classes)
    whole = call("triton", name, tensors)
    for i in (0, len(tensors[0]) - 1):
        alone = tuple(t[i : i + 1] for t in tensors)  # which lies at no multiple of 16 bytes
        one = call("triton", name, alone)
        assert same([one[0], *one[2:]], [t[i : i + 1] for t in (whole[0], *whole[2:])])
        assert same(call("triton", name, alone, gradients=False)[:1], one[:1])


@runs
def test_total_of_many_samples():
    tensors = problem(3000, 2)
    value, total, _ = call("triton", "entropy", tensors, weights=tensors[-1])
    assert abs(total.item() - 0.25 * value.double().sum().item()) <= 1e-6 * total.item()


@runs
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_batch(name):
    tensors = tuple(t[:0] for t in problem(2, 10))
    value, total, *grads = call("triton", name, tensors)
    assert value.shape == (0,) and total == 0 and all(t.shape == (0, 10) for t in grads)
    if name == "entropy":
        assert cotangent("triton", "ce", tensors)[0].shape == (0, 10)
        assert call_atlas("triton", tensors[0], tensors[2], KL, KL, None)[1] == 0
        with ak.backend("triton"):
            assert ak.gairat_weights(tensors[2], 10).shape == (0,)


@runs
def test_double_precision_is_refused():
    with pytest.raises(BackendUnavailable, match=r"got float64: convert them with .float\(\), or use backend"):
        call("triton", "entropy", double(problem(2, 10)))


@runs
def test_the_door():
    """Whoever calls the operator itself must not make the kernel read or write outside of a tensor."""
    z, adv, labels, targets, weights = problem(4, 10)
    value, total, grad = torch.empty(4, device=DEVICE), torch.empty((), device=DEVICE), torch.empty_like(z)
    ce, kl = torch.ops.atlas_kernels.cross_entropy, torch.ops.atlas_kernels.kl_div
    atlas, cotangent = torch.ops.atlas_kernels.atlas_loss, torch.ops.atlas_kernels.attack_cotangent
    with ak.backend("triton"):
        for arguments, message in (
            ((z, labels[:3], 0.0, None, 1.0, value, total, grad), "labels is"),
            ((z, labels.int(), 0.0, None, 1.0, value, total, grad), "labels is"),
            ((z, labels, 0.0, weights[:1], 1.0, value, total, grad), "weights is"),
            ((z, labels, 0.0, None, 1.0, value.double(), total, grad), "value is"),
            ((z, labels, 0.0, None, 1.0, value, value[:0].clone(), grad), "total is"),
            ((z, labels, 0.0, None, 1.0, value, total, grad.half()), "grad is"),
            ((z.T.contiguous().T, labels, 0.0, None, 1.0, value, total, grad), "logits is"),
        ):
            with pytest.raises(DoorError, match=message):
                ce(*arguments)
        with pytest.raises(DoorError, match="q_logits is"):
            kl(z, adv[:, :5].contiguous(), None, 1.0, value, total, grad, None)
        with pytest.raises(ValueError, match="grad shares memory with logits"):
            ce(z, labels, 0.0, None, 1.0, value, total, z)
        with pytest.raises(ValueError, match="q_grad shares memory with p_grad"):
            kl(z, adv, None, 1.0, value, total, grad, grad)
        for wrong in ((torch.cat([z, z, z[:1]]), KL), (z, KL), (torch.cat([z, z, z]), NONE)):
            with pytest.raises(DoorError, match="logits"):
                atlas(wrong[0], labels, wrong[1], 1.0, KL, 1.0, None, 1.0, value, total, None, None)
        with pytest.raises(DoorError, match="reference"):
            cotangent(z, labels, None, None, 1, False, grad, None, None, None)
        with pytest.raises(DoorError, match="unknown"):
            cotangent(z, labels, None, None, 7, False, grad, None, None, None)
        with pytest.raises(DoorError, match="kappa is"):
            cotangent(z, labels, None, None, 0, False, grad, None, targets[:3], None)


@runs
def test_through_autograd():
    z, _, labels, _, weights = problem(5, 10)
    grads = []
    for backend in ("triton", "reference"):
        leaf = z.clone().requires_grad_()
        with ak.backend(backend):
            ak.mart_loss(leaf, 0.5 * leaf, labels, weights=weights).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# --- without a GPU ----------------------------------------------------------------------------------------------------


@compiles
def test_in_the_interpreter():
    """Every comparison of this file on the CPU."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 200, f"the comparisons did not run:\n{result.stdout[-2000:]}"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_ahead_of_time(variant, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = triton.compile_ahead(VARIANTS[variant](), capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    ptx = re.sub(r"//.*", "", compiled.asm["ptx"])
    # Neither contraction nor approximations nor flushed denormals.
    for forbidden in ("fma.", "mad.f", ".ftz", ".approx", "div.full", "cvt.rz."):
        assert forbidden not in ptx, forbidden
    assert re.search(r"STACK:0 .*LOCAL:0 ", tool_output("cuobjdump", "-res-usage", cubin)), "registers spill"
    if "1000 classes" in variant and "atlas" not in variant:
        # A row is read once: eight 16-bit logits a thread are one access.
        pair = any(name in variant for name in ("kl", "trades", "mart", "pairing", "consistency"))
        soft = "soft" in variant  # whose target distribution is in fp32
        assert len(re.findall(r"ld\.global\S*v4\.b32", ptx)) == 1 + pair + 2 * soft


@compiles
@pytest.mark.parametrize("variant", ["trades_loss", "atlas_loss, one sample", "objective dlr_targeted"])
def test_what_is_launched_is_what_was_inspected(variant, compiled_at_launch):
    plan = VARIANTS[variant]()
    assert compiled_at_launch(plan).asm["cubin"] == triton.compile_ahead(plan, 90).asm["cubin"]


@compiles
def test_logits_that_are_not_aligned_are_added_up_in_the_same_order(compiled_at_launch):
    z, y, value = torch.empty(1281)[1:].view(128, 10), torch.empty(128, dtype=torch.int64), torch.empty(128)
    given = {"logits": z, "labels": y, "value": value, "scale": 1.0, "parameter": None}
    atlas = {"local": KL, "global_term": NONE, "local_weight": 1.0, "global_weight": 1.0}
    for launches, rest in ((partial(losses.loss_launches, "cross_entropy"), {}), (losses._atlas_launches, atlas)):
        found = [launches({**given, **rest, "logits": t})[0] for t in (z, torch.empty(128, 10))]
        assert z.data_ptr() % 16 and not found[0].arguments[0].data_ptr() % 16
        assert compiled_at_launch(found[0]).asm["cubin"] == compiled_at_launch(found[1]).asm["cubin"]
    total = losses.VARIANTS["total"]()
    found = [total._replace(arguments=(t, *total.arguments[1:])) for t in (torch.empty(129)[1:], torch.empty(128))]
    assert compiled_at_launch(found[0]).asm["cubin"] == compiled_at_launch(found[1]).asm["cubin"]
