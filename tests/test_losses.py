"""The losses: exact values and gradients on every backend, edges, double backward, and what PyTorch asks of an op."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels import formulas
from operator_cases import refused, same_bits
from published import losses as published

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CLASSES = [2, 3, 4, 10, 17, 63, 64, 65, 100, 1000, 32768]
TERMS = ["kl", "ce", "logit"]
OPS = torch.ops.atlas_kernels
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Loss:
    """A loss and its published form, both as f(logits, labels, targets, **options)."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: int = 1  # tensors of logits
    classes: int = 2
    batches: int = 1  # in one tensor of logits


def atlas(local: str, global_term: str, batches: int) -> Loss:
    how = {"local": local, "local_weight": 0.7, "global_term": global_term, "global_weight": 1.3}
    return Loss(
        lambda z, y, t, **o: ak.atlas_loss(*z, y, **how, **o),
        lambda z, y, t: published.atlas(*z, y, **how)[0],
        batches=batches,
    )


def spread(y: Tensor, t: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A distribution over the classes that is half one's, a quarter another's, in the same numbers for every dtype."""
    hot = [torch.nn.functional.one_hot(v, like.shape[1]).float() for v in (y, t)]
    return (0.5 * hot[0] + 0.25 * hot[1] + 0.25 / like.shape[1]).to(dtype or like.dtype)


def tied(distance: str) -> Loss:
    return Loss(
        lambda z, y, t, **o: ak.consistency_loss(*z, y, distance=distance, weight=0.7, **o),
        lambda z, y, t: published.consistency(*z, y, distance, 0.7),
        2,
    )


LOSSES = {
    "soft": Loss(
        lambda z, y, t, **o: ak.cross_entropy(*z, spread(y, t, z[0], torch.float32), label_smoothing=0.1, **o),
        lambda z, y, t: published.soft_cross_entropy(*z, spread(y, t, z[0]), 0.1),
    ),
    **{f"tied {distance}": tied(distance) for distance in ("logit", "prob", "kl")},
    "tied js": Loss(
        lambda z, y, t, **o: ak.consistency_loss(
            *z,
            spread(y, t, z[0], torch.float32),
            distance="js",
            weight=torch.tensor(1.5, device=y.device),
            label_smoothing=0.3,
            **o,
        ),
        lambda z, y, t: published.consistency(*z, spread(y, t, z[0]), "js", 1.5, 0.3),
        2,
    ),
    "cross_entropy": Loss(
        lambda z, y, t, **o: ak.cross_entropy(*z, y, **o), lambda z, y, t: published.cross_entropy(*z, y)
    ),
    "smoothed": Loss(
        lambda z, y, t, **o: ak.cross_entropy(*z, y, label_smoothing=0.1, **o),
        lambda z, y, t: published.cross_entropy(*z, y, 0.1),
    ),
    "kl_div": Loss(lambda z, y, t, **o: ak.kl_div(*z, **o), lambda z, y, t: published.kl_div(*z), 2),
    "trades": Loss(
        lambda z, y, t, **o: ak.trades_loss(*z, y, beta=5.0, **o), lambda z, y, t: published.trades(*z, y, 5.0), 2
    ),
    "mart": Loss(
        lambda z, y, t, **o: ak.mart_loss(*z, y, beta=5.0, **o), lambda z, y, t: published.mart(*z, y, 5.0), 2
    ),
    "entropy": Loss(lambda z, y, t, **o: ak.entropy(*z, **o), lambda z, y, t: published.entropy(*z)),
    "margin": Loss(lambda z, y, t, **o: ak.margin_loss(*z, y, **o), lambda z, y, t: published.margin(*z, y)),
    "dlr": Loss(lambda z, y, t, **o: ak.dlr_loss(*z, y, **o), lambda z, y, t: published.dlr(*z, y), classes=3),
    "dlr_targeted": Loss(
        lambda z, y, t, **o: ak.dlr_loss(*z, y, targets=t, **o),
        lambda z, y, t: published.dlr_targeted(*z, y, t),
        classes=4,
    ),
    "logit_pairing": Loss(
        lambda z, y, t, **o: ak.logit_pairing(*z, **o), lambda z, y, t: published.logit_pairing(*z), 2
    ),
    "atlas": atlas("kl", "kl", 4),
}
ATLAS = {
    f"atlas {a} {b} {n}": atlas(a, b, 1 + (b != "none") + n) for a in TERMS for b in [*TERMS, "none"] for n in (0, 1, 3)
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def problem(loss: Loss, batch: int, classes: int, *, dtype=torch.float32, device="cpu", spread=3.0, seed=0):
    """(logits, labels, targets): some labels are right, some wrong; no two logits of a row are equal."""
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(loss.batches * batch, classes, generator=g) * spread for _ in range(loss.inputs)]
    if torch.finfo(dtype).bits == 16:  # on a grid that bfloat16 has
        z = [v.argsort(1).argsort(1) * 2.0 ** round(math.log2(spread) - math.log2(classes) + 1) for v in z]
    z = [v.to(device, dtype).requires_grad_() for v in z]
    y = torch.randint(classes, (batch,), generator=g)
    right = torch.rand(batch, generator=g) < 0.5
    y = torch.where(right, z[0].detach().cpu()[:batch].argmax(1), y)
    t = (y + 1 + torch.randint(classes - 1, (batch,), generator=g)) % classes
    return z, y.to(device), t.to(device)


def evaluated(loss: Callable[..., Tensor], z, y, t, weights=None, reduction="none"):
    """The loss [per sample, or reduced] and its gradients, by a published form in the dtype of z."""
    z = [v.detach().requires_grad_() for v in z]
    rows = loss(z, y, t)
    rows = rows if weights is None else rows * weights
    value = {"none": lambda: rows, "sum": rows.sum, "mean": rows.mean}[reduction]()
    return value.detach(), torch.autograd.grad(value.sum(), z)


def assert_as_exact_as_eager(name, loss, z, y, t, weights=None, reduction="none", ulps=16.0):
    """Error against fp64 at most twice that of the published form in PyTorch, plus a few units in the last place."""
    wide = [v.detach().to(torch.float64 if v.dtype == torch.float64 else torch.float32) for v in z]
    w64 = None if weights is None else weights.double()
    exact, exact_grads = evaluated(loss.theirs, [v.double() for v in wide], y, t, w64, reduction)
    eager, eager_grads = evaluated(loss.theirs, wide, y, t, weights, reduction)
    value = loss.ours(z, y, t, weights=weights, reduction=reduction)
    grads = torch.autograd.grad(value.sum(), z)
    assert value.dtype == wide[0].dtype
    for what, got, by_eager, truth in zip(
        ("value", "grad", "adv_grad"), (value, *grads), (eager, *eager_grads), (exact, *exact_grads), strict=False
    ):
        # In fp64 eager PyTorch is itself the truth.
        units = ulps * (1 if got.dtype != torch.float64 else 1000) * torch.finfo(got.dtype).eps
        size = truth.abs().max().clamp(min=0.1)  # a small result is what is left of larger terms
        # The published KL's gradient is NaN where p underflows, which allows us nothing.
        allowed = 2 * (by_eager.double() - truth).nan_to_num(nan=0.0).abs().max() + units * size
        error = (got.double() - truth).abs().max()
        assert error <= allowed, f"{what} of {name}: error {error:.3g}, allowed {allowed:.3g}"


def check(name: str, loss: Loss, batch: int, classes: int, device, dtype=torch.float32, **options) -> None:
    if classes < loss.classes:
        pytest.skip(f"needs {loss.classes} classes")
    z, y, t = problem(loss, batch, classes, dtype=dtype, device=device)
    if refused(dtype, lambda: loss.ours(z, y, t, **options)):
        return
    assert_as_exact_as_eager(name, loss, z, y, t, **options)


@each_loss
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_in_every_dtype(name, dtype, engine):
    for batch in (1, 33):
        check(name, LOSSES[name], batch, 10, engine, dtype)


@each_loss
@pytest.mark.parametrize("classes", CLASSES)
def test_exact_for_any_number_of_classes(name, classes, engine):
    many = {"batch": 3, "ulps": 64} if classes > 1000 else {"batch": 19}  # the more terms, the longer the sums
    check(name, LOSSES[name], classes=classes, device=engine, **many)
    if classes <= 100:
        check(name, LOSSES[name], 5, classes, engine, torch.float64)
        check(name, LOSSES[name], 9, classes, engine, torch.bfloat16)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_reductions(name, reduction, weighted, engine):
    for dtype in (torch.float32, torch.float64, torch.float16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.tensor([0.0, 1.0, -2.5, 0.3, 1e-3, 4.0, 1.0], dtype=wide, device=engine) if weighted else None
        check(name, LOSSES[name], 7, 10, engine, dtype, weights=weights, reduction=reduction)


@pytest.mark.parametrize("name", ATLAS)
def test_every_form_of_atlas(name, engine):
    for classes in (10, 100):
        check(name, ATLAS[name], 11, classes, engine)


@pytest.mark.parametrize("local", TERMS)
@pytest.mark.parametrize("global_term", [*TERMS, "none"])
@pytest.mark.parametrize("near", [0, 2])
def test_terms_of_atlas(local, global_term, near, engine):
    loss = atlas(local, global_term, 1 + (global_term != "none") + near)
    (z,), y, _ = problem(loss, 7, 10, device=engine)
    how = {"local": local, "local_weight": 0.7, "global_term": global_term, "global_weight": 1.3}
    weights = torch.rand(7, device=engine)
    for logits in (z, z.detach()):
        value, terms = ak.atlas_loss(logits, y, **how, weights=weights, return_terms=True)
        _, *expected = published.atlas(z.detach(), y, **how)
        assert terms.shape == (3, 7) and terms.dtype == torch.float32 and not terms.requires_grad
        torch.testing.assert_close(terms, torch.stack(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, (weights * (terms.T @ torch.tensor([1, 0.7, 1.3], device=engine))).mean())
    if not near:
        assert torch.equal(ak.atlas_loss(z, y, **{**how, "local": "none"}), ak.atlas_loss(z, y, **how))


def test_atlas_without_terms_is_cross_entropy_bit_for_bit(engine):
    (z,), y, _ = problem(LOSSES["cross_entropy"], 33, 10, device=engine)
    a, b = ak.atlas_loss(z, y, local="none", global_term="none"), ak.cross_entropy(z, y)
    assert same_bits(a.detach(), b.detach())
    assert same_bits(*(torch.autograd.grad(v, z)[0] for v in (a, b)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_anything(data):
    draw = data.draw
    name = draw(st.sampled_from([*LOSSES, *ATLAS]))
    loss = {**LOSSES, **ATLAS}[name]
    z, y, t = problem(
        loss, draw(st.integers(1, 40)), draw(st.integers(loss.classes, 140)), dtype=draw(st.sampled_from(FLOATS)),
        spread=draw(st.sampled_from([0.1, 3.0, 30.0])), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    if draw(st.booleans()):
        z = [v.detach().T.contiguous().T.requires_grad_() for v in z]
    assert_as_exact_as_eager(name, loss, z, y, t, ulps=64)


# --- edges ---


def by_rows(values: list[list[float]], device, dtype=torch.float32) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).requires_grad_()


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), inputs)


@each_loss
def test_huge_logits_stay_finite(name, engine):
    loss = LOSSES[name]
    z, y, t = problem(loss, 8, 10, device=engine, spread=1e4)
    value = loss.ours(z, y, t, reduction="none")
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients(value, *z))
    torch.testing.assert_close(value.double(), loss.theirs([v.double() for v in z], y, t), rtol=1e-5, atol=1e-5)
    if name not in ("trades", "mart"):  # their published gradients are NaN where p = 0
        assert_as_exact_as_eager(name, loss, z, y, t)


def test_probability_close_to_one_keeps_its_precision(engine):
    """CE and p_y - 1 where 1 - p_y is far below half a unit of 1."""
    gaps = [12.0, 20.0, 40.0, 80.0]
    z = by_rows([[gap, 0.0, -1.0] for gap in gaps], engine)
    y = torch.zeros(4, dtype=torch.int64, device=engine)
    value = ak.cross_entropy(z, y, reduction="none")
    (grad,) = gradients(value, z)
    others = torch.tensor([math.log1p(math.exp(-gap) + math.exp(-gap - 1)) for gap in gaps], device=engine)
    torch.testing.assert_close(value.detach(), others, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[:, 0], torch.expm1(-others), rtol=1e-6, atol=0)
    assert (grad[:, 0] < 0).all() and (ak.attack_cotangent(z, y).cotangent[:, 0] < 0).all()


@pytest.mark.parametrize("distance", ["prob", "js"])
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_predictions_that_are_almost_one_have_all_digits_of_their_distance(distance, classes, engine):
    """A distance of 1e-14 too, of which p log(p / m) + q log(q / m) would keep none."""
    g = torch.Generator().manual_seed(classes)
    y = torch.zeros(40, dtype=torch.int64, device=engine)
    for apart in (1.0, 1e-1, 1e-2, 1e-4, 1e-6):
        z = torch.randn(40, classes, generator=g)
        pair = [v.to(engine).requires_grad_() for v in (z, z + apart * torch.randn(40, classes, generator=g))]
        wide = [v.detach().double().requires_grad_() for v in pair]
        _, terms = ak.consistency_loss(*pair, y, distance=distance, return_terms=True)
        only = ak.consistency_loss(*pair, torch.zeros_like(z, device=engine), distance=distance, reduction="sum")
        # From the difference p - q itself, and Jensen-Shannon by its series, all in fp64.
        log_p, log_q = wide[0].log_softmax(1), wide[1].log_softmax(1)
        both, u = log_p.exp() + log_q.exp(), ((log_p - log_q) / 2).tanh()
        if distance == "prob":
            truth = (both * u).square().sum(1)
        else:
            small, square = u.abs() < 0.1, u.square().clamp(max=0.99)
            series = sum(square**k / ((k + 1) * (2 * k + 1)) for k in range(9)) * square
            whole = (1 + u) * (1 + u).log() + (1 - u) * (1 - u).log()
            truth = (both / 4 * torch.where(small, series, whole)).sum(1)
        torch.testing.assert_close(terms[1].double(), truth, rtol=2e-5, atol=1e-30)
        for got, wanted in zip(gradients(only, *pair), gradients(truth, *wide), strict=True):
            size = wanted.abs().amax(1, keepdim=True)
            assert ((got.double() - wanted).abs() <= 2e-5 * size).all(), (apart, got - wanted, size)


def test_distributions_are_as_in_pytorch(engine):
    z, t = by_rows([[1.0, -2.0, 0.5], [0.0, 3.0, 30.0]], engine), torch.tensor([[0.2, 0.5, 0.3], [2.0, 0.0, 1.0]])
    t = t.to(engine)
    for smoothing, dtype in itertools.product((0.0, 0.3, 1.0), (torch.float32, torch.float16, torch.float64)):
        truth = torch.nn.functional.cross_entropy(z.double(), t.to(dtype).double(), label_smoothing=smoothing)
        value = ak.cross_entropy(z, t.to(dtype), label_smoothing=smoothing)
        torch.testing.assert_close(value.double(), truth)
        torch.testing.assert_close(gradients(value, z)[0], gradients(truth, z)[0])
    y = torch.tensor([1, 2], device=engine)
    hot = torch.nn.functional.one_hot(y, 3).double()
    torch.testing.assert_close(
        ak.cross_entropy(z, hot, label_smoothing=0.1), ak.cross_entropy(z, y, label_smoothing=0.1)
    )
    sure = by_rows([[40.0, 0.0, -1.0]], engine)  # 1 - p far below half a unit of 1
    (grad,) = gradients(ak.cross_entropy(sure, torch.tensor([[1.0, 0.0, 0.0]], device=engine)), sure)
    torch.testing.assert_close(grad[0, 0].double(), -grad[0, 1:].double().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", ["logit", "prob", "js", "kl"])
def test_terms_and_weight_of_consistency(distance, engine):
    (z, other), y, _ = problem(LOSSES["trades"], 6, 10, device=engine)
    plain, terms = ak.consistency_loss(z, other, y, distance=distance, return_terms=True)
    assert terms.shape == (2, 6) and not terms.requires_grad
    torch.testing.assert_close(terms[0], ak.cross_entropy(z, y, reduction="none").detach())
    torch.testing.assert_close(plain.detach(), terms.sum(0).mean())
    weight = torch.tensor(1.0, device=engine)  # read when the kernel runs
    made = []
    for number in (0.0, 0.3, 25.0):
        weight.fill_(number)
        for w in (number, weight, weight.double(), weight.half()):
            value = ak.consistency_loss(z, other, y, distance=distance, weight=w)
            made.append((value.detach(), *gradients(value, z, other)))
        for a in made[-3:-1]:
            assert all(same_bits(x, y) for x, y in zip(a, made[-4], strict=True))
    assert not made[0][2].any()
    torch.testing.assert_close(made[8][0] - made[4][0], (25.0 - 0.3) * terms[1].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["logit", "prob", "js", "kl"])
def test_targets_and_a_weight_that_require_grad_get_theirs(distance):
    (z, other), y, t = problem(LOSSES["trades"], 3, 4, dtype=torch.float64, spread=1.0)
    soft, weight = spread(y, t, z).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = (z, other, soft, weight)

    def ours(z, other, soft, weight):
        return ak.consistency_loss(z, other, soft, distance=distance, weight=weight, label_smoothing=0.2)

    assert torch.autograd.gradcheck(ours, inputs)
    wanted = gradients(published.consistency(*inputs[:3], distance, weight, 0.2).mean(), *inputs)
    torch.testing.assert_close(gradients(ours(*inputs), *inputs), wanted)
    torch.testing.assert_close(torch.autograd.grad(ak.cross_entropy(z, soft), soft), (-z.detach().log_softmax(1) / 3,))


def test_ties_go_to_the_first_class(engine):
    z = by_rows([[1.0, 3.0, 3.0, 3.0, 3.0, 0.0]], engine)
    y = torch.tensor([2], device=engine)
    (margin,) = gradients(ak.margin_loss(z, y), z)
    assert margin[0].tolist() == [0, 1, -1, 0, 0, 0]
    wide = by_rows([[0.5] * 70], engine)
    (margin,) = gradients(ak.margin_loss(wide, torch.tensor([0], device=engine)), wide)
    assert margin[0, :3].tolist() == [-1, 1, 0] and not margin[0, 3:].any()
    assert ak.dlr_loss(z, y).item() == 0  # 0 / 1e-12
    z = by_rows([[5.0, 2.0, 2.0, 1.0, 1.0]], engine)
    (dlr,) = gradients(ak.dlr_loss(z, torch.tensor([0], device=engine)), z)
    assert dlr[0, 3] == dlr[0, 4] == 0 and dlr[0, 2] != 0  # z_(3) is the second of the equal ones


def test_close_logits_keep_the_divisor_of_targeted_dlr(engine):
    """z_(1) - (z_(3) + z_(4)) / 2 in float32, where the mean has a digit more than float32 holds."""
    z = torch.tensor([[3.9254382, 3.9254380, 3.9254370, 3.9254372, -1.0]], device=engine).requires_grad_()
    y, t = torch.tensor([4], device=engine), torch.tensor([3], device=engine)
    value = ak.dlr_loss(z, y, targets=t)
    exact = z.detach().double().requires_grad_()
    truth = published.dlr_targeted(exact, y, t).mean()
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)
    (grad,), (slope,) = gradients(value, z), gradients(truth, exact)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-6, atol=0)


def test_classes_without_probability_contribute_nothing(engine):
    z = by_rows([[1.0, -INF, 0.0, 2.0], [-INF, -INF, 0.5, -INF]], engine)
    q = by_rows([[0.0, -INF, 1.0, 1.0], [-INF, 0.0, 0.5, 0.0]], engine)
    y = torch.tensor([3, 2], device=engine)
    few = z.detach()[:1, [0, 2, 3]].double().requires_grad_()
    few_q = q.detach()[:1, [0, 2, 3]].double().requires_grad_()
    few_y, sure = torch.tensor([2], device=engine), torch.nn.functional.one_hot(y, 4).float()
    for ours, theirs, inputs, others in [
        (lambda r: ak.cross_entropy(z, y, reduction=r), published.cross_entropy(few, few_y), [z], [few]),
        (lambda r: ak.entropy(z, reduction=r), published.entropy(few), [z], [few]),
        (lambda r: ak.kl_div(z, q, reduction=r), published.kl_div(few, few_q), [z, q], [few, few_q]),
        (lambda r: ak.trades_loss(z, q, y, reduction=r), published.trades(few, few_q, few_y), [z, q], [few, few_q]),
        (lambda r: ak.mart_loss(z, q, y, reduction=r), published.mart(few, few_q, few_y), [z, q], [few, few_q]),
        (lambda r: ak.cross_entropy(z, sure, reduction=r), published.cross_entropy(few, few_y), [z], [few]),
        *(
            (
                lambda r, d=d: ak.consistency_loss(z, q, y, distance=d, reduction=r),
                published.consistency(few, few_q, few_y, d, 1.0), [z, q], [few, few_q],
            )
            for d in ("prob", "js")
        ),
        (
            lambda r: ak.consistency_loss(q, z, sure, distance="kl", reduction=r),
            published.consistency(few_q, few, few_y, "kl", 1.0), [q, z], [few_q, few],
        ),
    ]:  # fmt: skip
        value = ours("none")
        assert value.isfinite().all()
        torch.testing.assert_close(value[:1].double(), theirs, rtol=1e-5, atol=1e-6)
        for got, expected in zip(gradients(value, *inputs), gradients(theirs, *others), strict=True):
            assert got.isfinite().all() and not got[0, 1].any()
            torch.testing.assert_close(got[:1, [0, 2, 3]].double(), expected, rtol=1e-5, atol=1e-6)
    assert ak.kl_div(q, z, reduction="none")[1] == INF  # p > 0, q = 0
    lone = by_rows([[4.0, -INF, -INF]], engine)
    assert ak.margin_loss(lone, torch.tensor([0], device=engine)) == -INF
    assert gradients(ak.margin_loss(lone, torch.tensor([0], device=engine)), lone)[0].tolist() == [[-1, 1, 0]]


def exactly(name: str, z: list[Tensor], y: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss of each sample and its gradients in fp64, by the plain formula (whose gradients are finite at p = 0)."""
    z = [v.detach().double().requires_grad_() for v in z]
    operator, more = FORMULAS[name]
    value = getattr(formulas, operator)(*z, *more(y, t))
    value = formulas.loss_and_terms(value)[0]
    return value.detach(), list(torch.autograd.grad(value.sum(), z))


FORMULAS = {
    "soft": ("soft_cross_entropy", lambda y, t: (spread(y, t, FOUR), 0.1)),
    "tied logit": ("consistency_loss", lambda y, t: (y, None, 0, 0.7, None, 0.0)),
    "tied prob": ("consistency_loss", lambda y, t: (y, None, 1, 0.7, None, 0.0)),
    "tied js": ("consistency_loss", lambda y, t: (None, spread(y, t, FOUR), 2, 1.5, None, 0.3)),
    "tied kl": ("consistency_loss", lambda y, t: (y, None, 3, 0.7, None, 0.0)),
    "cross_entropy": ("cross_entropy", lambda y, t: (y,)),
    "smoothed": ("cross_entropy", lambda y, t: (y, 0.1)),
    "kl_div": ("kl_div", lambda y, t: ()),
    "trades": ("trades_loss", lambda y, t: (y, 5.0)),
    "mart": ("mart_loss", lambda y, t: (y, 5.0)),
    "entropy": ("entropy", lambda y, t: ()),
    "margin": ("margin_loss", lambda y, t: (y,)),
    "dlr": ("dlr_loss", lambda y, t: (y,)),
    "dlr_targeted": ("dlr_loss", lambda y, t: (y, t)),
    "logit_pairing": ("logit_pairing", lambda y, t: ()),
    "atlas": ("atlas_loss", lambda y, t: (y, 0, 0.7, 0, 1.3)),
}


FOUR = torch.empty(0, 4, dtype=torch.float64)  # logits of as many classes as here


def with_large(big: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Predictions that are sure by ``big`` of one class, of another, that one is wrong, of two, and of none."""
    rows = [[big, 0.25, -1.25, 0.75], [0.5, big, -2.0, 1.0], [-big, 0.25, -1.0, 0.5], [big, big, 0.5, -0.5],
            [big, -big / 8, 0.25, 1.0], [1.0, 0.25, 0.125, -0.5]]  # fmt: skip
    pairs = list(itertools.product(rows, rows))
    return [torch.tensor([pair[i] for pair in pairs], dtype=dtype, device=device) for i in (0, 1)]


@each_loss
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_logits_keep_their_digits(name, dtype, engine):
    loss, eps = LOSSES[name], torch.finfo(dtype).eps
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for big in (20.0, 100.0, 1e3, 65504.0, 1e6, 3e38):
        if big > torch.finfo(dtype).max:
            continue
        pair = with_large(big, dtype, engine)
        z = [torch.cat([*pair, pair[0].roll(1, 1), pair[1].roll(2, 1)])] if name == "atlas" else pair[: loss.inputs]
        z = [v.requires_grad_() for v in z]
        y = torch.arange(len(pair[0]), device=engine) % 4
        t = (y + 2) % 4
        if refused(dtype, lambda z=z, y=y, t=t: loss.ours(z, y, t)):
            return
        truth, slopes = exactly(name, z, y, t)
        value = loss.ours(z, y, t, reduction="none")
        grads = gradients(value, *z)
        rounded = truth.to(wide).double()  # beyond the largest number there is only inf
        fine = rounded.isfinite()
        assert torch.equal(value.double()[~fine], rounded[~fine])
        error = (value.double() - rounded)[fine].abs()
        unit = 64 * torch.finfo(wide).eps
        if name == "mart" and dtype == torch.float64:
            unit = 1e-7  # 1.0000001 - p_y, of which the plain formula has no more digits
        bound = unit * rounded[fine].abs().clamp(min=0.125)
        assert (error <= bound).all(), f"value at {big:g}: {value[fine]} for {truth[fine]}"
        for place, (got, slope) in enumerate(zip(grads, slopes, strict=True)):
            size = torch.ones(len(got), 1, dtype=torch.float64, device=engine)
            if (place, name) in [*((0, n) for n in ("kl_div", "trades", "mart", "atlas")), (1, "tied kl")]:
                # p (log ratio - KL) is what is left of two numbers of the size of KL.
                size[: len(truth)] = truth.abs().clamp(1, 1e38)[:, None]
            wanted = slope.to(dtype).double()
            fine = wanted.isfinite()
            assert torch.equal(got.double()[~fine], wanted[~fine])
            error = (got.double() - wanted).abs().where(fine, 0.0)
            bound = unit * size + 2 * eps * wanted.abs()
            assert (error <= bound).all(), f"gradient at {big:g}: off by {error.max()}"


def test_differences_beyond_the_largest_number(engine):
    """Where the result is not, though the difference of two logits is."""
    z = by_rows([[3e38, -3e38, 1e38, 0.0, 2e38]] * 8, engine)
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], device=engine)
    t = (y + 1) % 5
    for ours, (operator, *more), values in [
        (lambda r: ak.dlr_loss(z, y, reduction=r), ("dlr_loss", y), True),
        (lambda r: ak.dlr_loss(z, y, targets=t, reduction=r), ("dlr_loss", y, t), True),
        (lambda r: ak.cross_entropy(z, y * 0, label_smoothing=0.1, reduction=r), ("cross_entropy", y * 0, 0.1), True),
        (lambda r: ak.logit_pairing(z, -z.detach(), reduction=r), ("logit_pairing",), False),
    ]:
        wide = z.detach().double().requires_grad_()
        truth = getattr(formulas, operator)(wide, *([-wide.detach()] if operator == "logit_pairing" else []), *more)
        if values:
            torch.testing.assert_close(ours("none").double(), truth, rtol=1e-6, atol=1e-6)
        (got,), (wanted,) = gradients(ours("mean"), z), gradients(truth.mean(), wide)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_has_weight_zero_adds_nothing_though_it_is_infinite(dtype, engine):
    """0 * inf is 0, also in every gradient and derivative of it; NaN stays NaN."""
    z = by_rows([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, NAN, 0.0], [1.0, 2.0, -INF]], engine, dtype)
    q = by_rows([[0.0, -INF, 1.0], [0.0, -INF, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], engine, dtype)
    y = torch.tensor([0, 1, 0, 2], device=engine)
    w = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=dtype, device=engine)
    if refused(dtype, lambda: ak.kl_div(z, q, weights=w)):
        return
    value = ak.kl_div(z, q, weights=w, reduction="none")
    assert value[[0, 3]].tolist() == [0, 0] and value[1] == INF and value[2].isnan()
    to_z, to_q = gradients(value, z, q)
    assert not to_z[[0, 3]].any() and not to_q[[0, 3]].any()
    assert to_z[1].tolist() == [-INF, INF, -INF]  # the limit as q goes to 0
    assert to_q[1].isfinite().all() and to_z[2].isnan().all()
    kept = [0, 3]
    for make in (
        lambda z, q, w: ak.kl_div(z, q, weights=w),
        lambda z, q, w: ak.cross_entropy(q, y[kept] * 0 + 1, weights=w),
        lambda z, q, w: ak.mart_loss(z, q, y[kept] * 0 + 1, weights=w),
        lambda z, q, w: ak.atlas_loss(torch.cat([z, q, z]), y[kept], weights=w),
        lambda z, q, w: ak.trades_loss(z, q, y[kept] * 0, beta=0.0),
        lambda z, q, w: ak.cross_entropy(q, torch.ones_like(q), weights=w),
        lambda z, q, w: ak.consistency_loss(q, z, y[kept] * 0, distance="kl", weight=0.0),
        lambda z, q, w: ak.consistency_loss(q, z, y[kept] * 0, distance="kl", weight=w[0] * 0),
        lambda z, q, w: ak.consistency_loss(q, z, y[kept] * 0, distance="kl", weight=w.detach()[0]),
        lambda z, q, w: ak.consistency_loss(q, z, y[kept] * 0, distance="kl", weights=w),
        lambda z, q, w: ak.atlas_loss(torch.cat([z, q, q]), y[kept] * 0, local_weight=0.0, global_weight=0.0),
    ):
        inputs = [v.detach()[kept].requires_grad_() for v in (z, q, w)]
        loss = make(*inputs)
        assert loss.isfinite(), loss
        for graph in (False, True):
            found = torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=graph, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in found)


@each_loss
@pytest.mark.parametrize("classes", [4, 10, 100])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_nan_spoils_its_row_and_no_other(name, classes, bad, engine):
    loss = LOSSES[name]
    if bad == INF and name in ("margin", "dlr", "dlr_targeted"):
        pytest.skip("no softmax")
    for last, at in itertools.product(range(loss.inputs), (0, classes - 1)):
        paired = name == "logit_pairing" or (name, last) == ("tied logit", 1)  # no softmax there
        if paired and bad == INF:
            continue
        z, y, t = problem(loss, 21, classes, device=engine)
        fine = loss.ours(z, y, t, reduction="none")
        fine_grads = gradients(fine, *z)
        with torch.no_grad():
            z[last][17, at] = bad
        value = loss.ours(z, y, t, reduction="none")
        grads = gradients(value, *z)
        others = torch.arange(21, device=engine) != 17
        assert value[17].isnan()
        assert grads[last][17, at].isnan() if paired else grads[last][17].isnan().all()
        assert same_bits(value[others].detach(), fine[others].detach())
        for a, b in zip(grads, fine_grads, strict=True):
            rows = torch.arange(len(a), device=engine) % 21 != 17
            assert same_bits(a[rows], b[rows])


@each_loss
def test_an_empty_batch(name, engine):
    loss = LOSSES[name]
    z, y, t = problem(loss, 0, 10, device=engine)
    assert loss.ours(z, y, t, reduction="sum") == 0
    assert loss.ours(z, y, t).isnan()  # the mean of nothing, as in PyTorch
    value = loss.ours(z, y, t, reduction="none")
    assert value.shape == (0,) and all(g.shape == (0, 10) for g in gradients(value, *z))


# --- gradients ---


def differentiable(name: str, device: torch.device | str = "cpu"):
    """f(*inputs) and fp64 inputs; a constant part of the logits is kept out, since gradcheck would move it."""
    loss = LOSSES[name]
    z, y, t = problem(loss, 2, 4, dtype=torch.float64, spread=1.0, device=device)
    if name != "atlas":
        return (lambda *v, **o: loss.ours(v, y, t, **o)), z
    x, adv, *near = z[0].detach().split(2)
    near = torch.cat(near).requires_grad_()
    return (lambda x, near, **o: loss.ours([torch.cat([x, adv, near])], y, t, **o)), [x.requires_grad_(), near]


@each_loss
def test_gradcheck(name, device):
    f, z = differentiable(name, device)
    w = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *v: f(*v, weights=w), z)
    assert torch.autograd.gradcheck(lambda *v: f(*v[:-1], weights=v[-1], reduction="none"), [*z, w.requires_grad_()])


@each_loss
def test_gradgradcheck(name):
    f, z = differentiable(name)
    w = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *v: f(*v, weights=w), z)
    assert torch.autograd.gradgradcheck(lambda *v: f(*v, weights=w, reduction="none"), z)
    assert torch.autograd.gradgradcheck(lambda *v: f(*v[:-1], weights=v[-1]), [*z, w.requires_grad_()])


@pytest.mark.parametrize("name", [name for name in ATLAS if not name.startswith("atlas kl")])
def test_gradgradcheck_of_every_form_of_atlas(name):
    loss = ATLAS[name]
    (z,), y, t = problem(loss, 1, 3, dtype=torch.float64, spread=1.0)
    assert torch.autograd.gradgradcheck(lambda v: loss.ours([v], y, t), z)


@each_loss
def test_create_graph_gives_the_same_first_derivative(name, engine):
    loss = LOSSES[name]
    z, y, t = problem(loss, 5, 10, device=engine)
    value = loss.ours(z, y, t)
    plain = torch.autograd.grad(value, z, retain_graph=True)
    again = torch.autograd.grad(value, z, torch.full_like(value, 0.5), create_graph=True)
    assert all(g.requires_grad for g in again) or name in ("margin",)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a / 2, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.inputs == 2])
def test_only_the_side_that_needs_a_gradient_gets_one(name, engine):
    loss = LOSSES[name]
    z, y, t = problem(loss, 5, 10, device=engine)
    both = gradients(loss.ours(z, y, t), *z)
    for side in (0, 1):
        one = [v if i == side else v.detach() for i, v in enumerate(z)]
        value = loss.ours(one, y, t)
        assert same_bits(torch.autograd.grad(value, one[side], retain_graph=True)[0], both[side])
        second = torch.autograd.grad(value, one[side], create_graph=True)[0]
        torch.testing.assert_close(second.detach(), both[side], rtol=1e-4, atol=1e-6)
    assert not loss.ours([v.detach() for v in z], y, t).requires_grad
    with torch.no_grad():
        value = loss.ours(z, y, t)
    assert not value.requires_grad and same_bits(value, loss.ours(z, y, t).detach())


def test_backward_twice_and_scaled(engine):
    (z,), y, _ = problem(LOSSES["cross_entropy"], 5, 10, device=engine)
    value = ak.cross_entropy(z, y)
    first = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(value, z, retain_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(3 * value, z, retain_graph=True)[0], 3 * first)
    (value + value).backward()
    torch.testing.assert_close(z.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("margin, batch", [(9.0, 4096), (18.0, 4)])
def test_a_loss_scale_saves_small_float16_gradients(engine, margin, batch):
    """(p_y - 1) / B, or p_y - 1, is below float16's range here, and 65536 times that is not."""
    z = by_rows([[margin, 0.0]] * batch, engine, torch.float16)
    y = torch.zeros(batch, dtype=torch.int64, device=engine)
    for reduction, scale in (("mean", 65536.0), ("none", torch.full((batch,), 65536.0, device=engine))):
        loss = ak.cross_entropy(z, y, reduction=reduction) * scale
        wide = z.detach().double().requires_grad_()
        published_loss = published.cross_entropy(wide, y) * scale
        published_loss = published_loss.mean() if reduction == "mean" else published_loss.sum()
        (expected,) = torch.autograd.grad(published_loss, wide)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0].double(), expected, rtol=2e-3, atol=0)


def test_gradients_of_weights(engine):
    (z,), y, _ = problem(LOSSES["cross_entropy"], 5, 10, device=engine)
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0], device=engine, requires_grad=True)
    rows = ak.cross_entropy(z, y, reduction="none").detach()
    for reduction, expected in (("mean", rows / 5), ("sum", rows), ("none", rows)):
        torch.testing.assert_close(gradients(ak.cross_entropy(z, y, weights=w, reduction=reduction), w)[0], expected)
        tracked = gradients(ak.cross_entropy(z, y, weights=w, reduction=reduction), z)[0]
        plain = gradients(ak.cross_entropy(z, y, weights=w.detach(), reduction=reduction), z)[0]
        torch.testing.assert_close(tracked, plain)
    loss, terms = ak.atlas_loss(torch.cat([z, z, z]), y, weights=w, return_terms=True)
    torch.testing.assert_close(gradients(loss, w)[0], (terms[0] + terms[1] + terms[2]) / 5)


def test_layouts_and_label_dtypes_do_not_matter(engine):
    (p, q), y, _ = problem(LOSSES["trades"], 6, 10, device=engine)
    expected = ak.trades_loss(p, q, y)
    for view in (lambda v: v.T.contiguous().T, lambda v: torch.stack([v, v], 2)[..., 0]):
        assert same_bits(ak.trades_loss(view(p), view(q), y).detach(), expected.detach())
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert same_bits(ak.trades_loss(p, q, y.to(dtype)).detach(), expected.detach())
    strided = torch.stack([y, y], 1)[:, 0]
    assert same_bits(ak.trades_loss(p, q, strided).detach(), expected.detach())


@each_loss
def test_bits_do_not_depend_on_the_thread_count(name):
    loss, before = LOSSES[name], torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = []
            for classes in (10, 300):
                z, y, t = problem(loss, 1000, classes)
                value = loss.ours(z, y, t)
                found += [value.detach(), *gradients(value, *z)]
            made.append(found)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


# --- GAIRAT's weights ---


@pytest.mark.parametrize("steps", [2, 7, 10, 40])
@pytest.mark.parametrize("lam", [-1.0, 0.0, 2.5])
def test_gairat_weights(steps, lam, engine):
    kappa = torch.arange(steps + 1, device=engine)
    w = ak.gairat_weights(kappa, steps, lam)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.double(), published.gairat(kappa, steps, lam), rtol=1e-5, atol=1e-9)
    assert torch.equal(ak.gairat_weights(kappa.to(torch.int32), steps, lam), w)
    double = ak.gairat_weights(kappa, steps, lam, dtype=torch.float64)
    torch.testing.assert_close(double, published.gairat(kappa, steps, lam), rtol=1e-9, atol=1e-12)


def test_gairat_weights_where_all_underflow(engine):
    kappa = torch.tensor([10, 10, 9, 10], device=engine)
    w = ak.gairat_weights(kappa, 10, -1000.0)
    assert w.mean().item() == pytest.approx(1, rel=1e-5)
    assert (w[2] / w[0]).item() == pytest.approx(math.exp(2.0), rel=1e-3)
    assert ak.gairat_weights(kappa, 10, INF).tolist() == [1, 1, 1, 1]
    assert ak.gairat_weights(kappa[:0], 10).shape == (0,)


# --- what PyTorch asks of an operator ---


def operator_calls(device):
    """(operator, arguments) of each, with every optional argument once given and once not."""
    z, a, big = (torch.randn(n, 5, device=device) for n in (3, 3, 9))
    y, t = torch.tensor([0, 1, 4], device=device), torch.tensor([1, 2, 3], device=device)
    w, value, total = torch.rand(3, device=device), torch.empty(3, device=device), torch.empty((), device=device)
    g, h = torch.empty_like(z), torch.empty_like(a)
    for shared, one, two in (((w, 0.5, value, total), (g,), (g, h)), ((None, 1.0, value, None), (None,), (None, h))):
        yield OPS.cross_entropy, (z, y, 0.1, *shared, *one)
        yield OPS.kl_div, (z, a, *shared, *two)
        yield OPS.trades_loss, (z, a, y, 6.0, *shared, *two)
        yield OPS.mart_loss, (z, a, y, 6.0, *shared, *two)
        yield OPS.entropy, (z, *shared, *one)
        yield OPS.margin_loss, (z, y, *shared, *one)
        yield OPS.dlr_loss, (z, y, t if one[0] is None else None, *shared, *one)
        yield OPS.logit_pairing, (z, a, *shared, *two)
        soft, given = torch.rand(3, 5, device=device), one[0] is not None
        yield OPS.soft_cross_entropy, (z, soft, 0.1, *shared, *one)
        truth = (None, soft, 2, 0.0, torch.ones((), device=device)) if given else (y, None, 1, 0.7, None)
        both = torch.empty(2, 3, device=device) if given else None
        yield OPS.consistency_loss, (z, a, *truth, 0.1, *shared, *two, both)
        terms = None if one[0] is None else torch.empty(3, 3, device=device)
        grad = None if one[0] is None else torch.empty_like(big)
        yield OPS.atlas_loss, (big, y, 0, 1.0, 0, 1.0, *shared, grad, terms)
    yield OPS.gairat_weights, (y, 10, -1.0, torch.empty(3, device=device))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, engine):
    for operator, arguments in operator_calls(engine):
        if requires_grad and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
            arguments[0].requires_grad_()
        torch.library.opcheck(operator, arguments)


def test_compile_fullgraph(device):
    (z,), y, t = problem(LOSSES["cross_entropy"], 4, 6, device=device)
    (a,), _, _ = problem(LOSSES["cross_entropy"], 4, 6, device=device, seed=1)
    w = torch.rand(4, device=device)

    def everything(z, a, y, t, w):
        joint, terms = ak.atlas_loss(torch.cat([z, a, z + a]), y, return_terms=True, weights=w)
        return joint + terms.mean() + sum((
            ak.cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
            ak.kl_div(z, a, weights=w),
            ak.trades_loss(z, a, y),
            ak.mart_loss(z, a, y),
            ak.entropy(a, reduction="none").sum(),
            ak.margin_loss(a, y),
            ak.dlr_loss(z, y) + ak.dlr_loss(z, y, targets=t),
            ak.logit_pairing(z, a),
            ak.cross_entropy(z, a.detach().softmax(1)),
            ak.consistency_loss(z, a, y, distance="js", weight=w[0]),
            ak.consistency_loss(z, a, a.detach().softmax(1), distance="prob", return_terms=True)[0],
            ak.cross_entropy(z, y, weights=ak.gairat_weights(y, 10)),
        ))  # fmt: skip

    compiled = torch.compile(everything, fullgraph=True)
    value, expected = compiled(z, a, y, t, w), everything(z, a, y, t, w)
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(gradients(value, z, a), gradients(expected, z, a), strict=True):
        torch.testing.assert_close(got, wanted)


def test_labels_that_do_not_exist_are_safe_and_loud(engine):
    """Past the checks of the public functions, as a kernel meets them on a GPU: NaN for the row, and nothing else."""
    z = torch.randn(6, 5, device=engine)
    y = torch.tensor([0, 5, -1, 2**62, -(2**62), 1], device=engine)
    for operator, more in ((OPS.cross_entropy, (0.0,)), (OPS.margin_loss, ()), (OPS.dlr_loss, (None,))):
        value, grad = torch.empty(6, device=engine), torch.empty_like(z)
        operator(z, y, *more, None, 1.0, value, None, grad)
        assert value.isnan().tolist() == [False, True, True, True, True, False]
        assert grad[[0, 5]].isfinite().all()
    value, grad = torch.empty(6, device=engine), torch.empty_like(z)
    OPS.dlr_loss(z, y.clamp(0, 4), y, None, 1.0, value, None, grad)
    assert value[1:5].isnan().all()
    for operator in (OPS.trades_loss, OPS.mart_loss):
        operator(z, z.flip(0), y, 6.0, None, 1.0, value, None, grad, torch.empty_like(z))
        assert value.isnan().tolist() == [False, True, True, True, True, False]
    for distance in range(4):
        rest = y, None, distance, 1.0, None, 0.1 * distance, None, 1.0, value, None, grad, None, None
        OPS.consistency_loss(z, z.flip(0), *rest)
        assert value.isnan().tolist() == [False, True, True, True, True, False] and grad[[0, 5]].isfinite().all()
    OPS.atlas_loss(torch.randn(18, 5, device=engine), y, 0, 1.0, 0, 1.0, None, 1.0, value, None, None, None)
    assert value.isnan().tolist() == [False, True, True, True, True, False]


@each_loss
def test_inputs_that_depend_on_each_other_have_the_gradient_of_plain_pytorch(name, device):
    """As with weights made of the logits (focal losses); also where the graph is kept for a next derivative."""
    loss = LOSSES[name]
    (z, *_), y, t = problem(loss, 6, 5, dtype=torch.float64, spread=1.0, device=device)

    logits, weights = [z, (2 * z).tanh()][: loss.inputs], z.softmax(1)[:6, 0]
    (expected,) = torch.autograd.grad((loss.theirs(logits, y, t) * weights).sum(), z, retain_graph=True)
    for create_graph in (False, True):
        ours = loss.ours(logits, y, t, weights=weights, reduction="sum")
        (grad,) = torch.autograd.grad(ours, z, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)
