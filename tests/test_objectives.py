"""attack_cotangent: the derivative of every objective against autograd, and what it tells of an attack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import atlas_kernels as ak
from atlas_kernels import formulas
from atlas_kernels.attacks import PGD, float16
from operator_cases import refused, same_bits
from published import losses as published

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CLASSES = [2, 3, 4, 10, 17, 63, 64, 65, 100, 1000, 32768]
NEEDED = {"ce": 2, "kl": 2, "margin": 2, "dlr": 3, "dlr_targeted": 4}
OPS = torch.ops.atlas_kernels
each_objective = pytest.mark.parametrize("objective", NEEDED)


def problem(batch, classes, *, dtype=torch.float32, device="cpu", seed=0):
    """(logits, reference, labels, targets); half of the labels are right, no two logits of a row are equal."""
    g = torch.Generator().manual_seed(seed)
    z, reference = (torch.randn(batch, classes, generator=g) * 3 for _ in range(2))
    if torch.finfo(dtype).bits == 16:  # on a grid that bfloat16 has
        z, reference = (v.argsort(1).argsort(1) * 0.0625 for v in (z, reference))
    y = torch.where(torch.rand(batch, generator=g) < 0.5, z.argmax(1), torch.randint(classes, (batch,), generator=g))
    t = (y + 1 + torch.randint(classes - 1, (batch,), generator=g)) % classes
    return z.to(device, dtype), reference.to(device, dtype), y.to(device), t.to(device)


def ask(objective, z, reference, y, t, **options):
    given = {"reference": reference} if objective == "kl" else {}
    given |= {"targets": t} if objective == "dlr_targeted" else {}
    return ak.attack_cotangent(z, y, objective=objective, **given, **options)


def by_autograd(objective, z, reference, y, t) -> tuple[Tensor, Tensor]:
    """(value, cotangent) of the published loss, through a graph."""
    z = z.detach().requires_grad_()
    value = {
        "ce": lambda: published.cross_entropy(z, y),
        "kl": lambda: published.kl_div(reference, z),
        "margin": lambda: published.margin(z, y),
        "dlr": lambda: published.dlr(z, y),
        "dlr_targeted": lambda: published.dlr_targeted(z, y, t),
    }[objective]()
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def check(objective, z, reference, y, t, descend=False, ulps=16.0) -> None:
    """Errors against fp64 at most twice those of autograd in fp32, plus a few units in the last place."""
    if refused(z.dtype, lambda: ask(objective, z, reference, y, t)):
        return
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    made = ask(objective, z, reference, y, t, descend=descend, return_value=True, return_correct=True)
    assert made.value.dtype == wide and made.cotangent.dtype == z.dtype and made.correct.dtype == torch.bool
    assert torch.equal(made.correct, z.argmax(1) == y)
    exact = by_autograd(objective, z.double(), reference.double(), y, t)
    eager = by_autograd(objective, z.to(wide), reference.to(wide), y, t)
    sign = -1 if descend else 1
    for got, plain, truth in zip((made.value, made.cotangent), eager, exact, strict=True):
        units = ulps * (1 if got.dtype != torch.float64 else 1000) * torch.finfo(got.dtype).eps
        allowed = 2 * (plain.double() - truth).abs().max() + units * truth.abs().max().clamp(
            min=0.1
        )  # what is left of larger terms
        assert (sign * got.double() - truth).abs().max() <= allowed


@each_objective
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("descend", [False, True])
def test_exact_in_every_dtype(objective, dtype, descend, engine):
    for batch in (1, 33):
        check(objective, *problem(batch, 10, dtype=dtype, device=engine), descend=descend)


@each_objective
@pytest.mark.parametrize("classes", CLASSES)
def test_exact_for_any_number_of_classes(objective, classes, engine):
    if classes < NEEDED[objective]:
        pytest.skip(f"needs {NEEDED[objective]} classes")
    if classes > 1000:
        check(objective, *problem(3, classes, device=engine), ulps=64)
        return
    check(objective, *problem(19, classes, device=engine))
    check(objective, *problem(5, classes, dtype=torch.float64, device=engine))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_anything(data):
    objective = data.draw(st.sampled_from(sorted(NEEDED)))
    z, reference, y, t = problem(
        data.draw(st.integers(1, 40)), data.draw(st.integers(NEEDED[objective], 140)),
        dtype=data.draw(st.sampled_from(FLOATS)), seed=data.draw(st.integers(0, 2**31)),
    )  # fmt: skip
    if data.draw(st.booleans()):
        z, reference = z.T.contiguous().T, torch.stack([reference, reference], 1)[:, 0]
    check(objective, z, reference, y, t, descend=data.draw(st.booleans()), ulps=64)


@each_objective
def test_only_what_is_asked_for_is_made(objective, engine):
    inputs = problem(5, 10, device=engine)
    everything = ask(objective, *inputs, return_value=True, return_correct=True)
    assert ask(objective, *inputs)[1:] == (None, None)
    value = ask(objective, *inputs, return_cotangent=False, return_value=True)
    assert value.cotangent is None and value.correct is None and same_bits(value.value, everything.value)
    assert same_bits(ask(objective, *inputs).cotangent, everything.cotangent)
    correct = ask(objective, *inputs, return_cotangent=False, return_correct=True)
    assert correct.value is None and torch.equal(correct.correct, everything.correct)
    z = inputs[0].clone().requires_grad_()
    assert not any(v.requires_grad for v in ask(objective, z, *inputs[1:], return_value=True, return_correct=True))


def test_kl_needs_no_labels(engine):
    z, reference, y, _ = problem(5, 10, device=engine)
    made = ak.attack_cotangent(z, objective="kl", reference=reference, return_value=True)
    assert same_bits(made.cotangent, ask("kl", z, reference, y, None).cotangent) and made.correct is None
    torch.testing.assert_close(made.cotangent, z.softmax(1) - reference.softmax(1))


@each_objective
def test_kappa_counts_like_a_loop_in_python(objective, engine):
    """GAIRAT's code: kappa[p] += 1 for every sample whose iterate before the step is still right."""
    kappa = torch.arange(21, device=engine)
    expected = kappa.tolist()
    for step in range(4):
        z, reference, y, t = problem(21, 10, device=engine, seed=step)
        y = y.to(torch.int32)
        version = kappa._version
        made = ask(objective, z, reference, y, t, kappa=kappa, return_correct=True)
        assert kappa._version > version
        for p in range(21):
            if int(z[p].argmax()) == int(y[p]):
                expected[p] += 1
            assert bool(made.correct[p]) == (int(z[p].argmax()) == int(y[p]))
    assert kappa.tolist() == expected


def test_the_first_of_equal_logits_is_the_prediction(engine):
    for classes in (5, 70):
        z = torch.zeros(2, classes, device=engine)
        z[:, [1, 3]] = 2.0
        y = torch.tensor([1, 3], device=engine)
        assert ak.attack_cotangent(z, y, return_correct=True).correct.tolist() == [True, False]
        assert ak.attack_cotangent(z, y, objective="margin").cotangent[:, :4].tolist() == [[0, -1, 0, 1], [0, 1, 0, -1]]


@each_objective
def test_a_nan_spoils_its_row_and_no_other(objective, engine):
    for classes in (10, 100):
        z, reference, y, t = problem(21, classes, device=engine)
        fine = ask(objective, z, reference, y, t, return_value=True, return_correct=True)
        others = torch.arange(21, device=engine) != 17
        z[17, 3] = torch.nan
        for label in (y[17].item(), 3):
            y[17], t[17] = label, (label + 1) % classes
            made = ask(objective, z, reference, y, t, return_value=True, return_correct=True)
            assert made.value[17].isnan() and made.cotangent[17].isnan().all() and not made.correct[17]
            for got, expected in zip(made, fine, strict=True):
                assert torch.equal(got[others], expected[others])


def test_a_sure_prediction_still_has_a_direction(engine):
    z = torch.tensor([[1e4, 0.0, -1e4], [40.0, 0.0, 0.0]], device=engine)
    y = torch.tensor([0, 0], device=engine)
    made = ak.attack_cotangent(z, y, return_value=True)
    assert made.cotangent[0].tolist() == [0, 0, 0] and made.value[0] == 0
    p = torch.exp(torch.tensor(-40.0, device=engine))
    torch.testing.assert_close(made.cotangent[1], torch.stack([-2 * p, p, p]), rtol=1e-6, atol=0)
    torch.testing.assert_close(made.value[1], 2 * p, rtol=1e-6, atol=0)


@pytest.mark.parametrize("big", [20.0, 1e3, 65504.0, 1e6, 3e38])
def test_large_logits_keep_their_digits(big, engine):
    sure = torch.tensor([[big, 0.25, -1.25, 0.75], [0.5, -1.0, big, 1.0]], device=engine)
    unsure = torch.tensor([[1.0, 0.25, 0.125, -0.5], [-1.0, 0.5, 0.25, 0.0]], device=engine)
    y, t = torch.tensor([1, 2], device=engine), torch.tensor([2, 0], device=engine)
    for objective in NEEDED:
        for z, reference in ((sure, unsure), (unsure, sure), (sure, sure.flip(0))):
            made = ask(objective, z, reference, y, t, return_value=True)
            wide = z.double().requires_grad_()
            value = {
                "ce": formulas.cross_entropy(wide, y),
                "kl": formulas.kl_div(reference.double(), wide),
                "margin": formulas.margin_loss(wide, y),
                "dlr": formulas.dlr_loss(wide, y),
                "dlr_targeted": formulas.dlr_loss(wide, y, t),
            }[objective]
            (cotangent,) = torch.autograd.grad(value.sum(), wide)
            torch.testing.assert_close(made.value.double(), value.detach(), rtol=2e-6, atol=2e-7)
            torch.testing.assert_close(made.cotangent.double(), cotangent, rtol=2e-6, atol=2e-7)


def test_an_empty_batch(engine):
    for objective in NEEDED:
        made = ask(objective, *problem(0, 10, device=engine), return_value=True, return_correct=True)
        assert made.cotangent.shape == (0, 10) and made.value.shape == made.correct.shape == (0,)


def test_bits_do_not_depend_on_the_thread_count():
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append([
                v for objective in NEEDED for classes in (10, 300)
                for v in ask(objective, *problem(1000, classes), return_value=True)[::2]
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def test_opcheck(engine):
    z, reference, y, t = problem(3, 5, device=engine)
    outs = (
        torch.empty_like(z),
        torch.empty(3, dtype=torch.bool, device=engine),
        y.clone(),
        torch.empty(3, device=engine),
    )
    for code in range(5):
        for needs_grad in (False, True):
            logits = z.clone().requires_grad_(needs_grad)
            torch.library.opcheck(OPS.attack_cotangent, (logits, y, t, reference, code, False, *outs))
    torch.library.opcheck(OPS.attack_cotangent, (z, None, None, reference, 1, True, outs[0], None, None, None))


def test_compile_fullgraph(device):
    z, reference, y, t = problem(4, 10, device=device)

    def everything(z, y):
        kappa = torch.zeros_like(y)
        first = ak.attack_cotangent(z * 2, y, kappa=kappa, return_value=True, return_correct=True)
        return [*first, kappa, *(ask(o, z, reference, y, t).cotangent for o in NEEDED)]

    for a, b in zip(torch.compile(everything, fullgraph=True)(z, y), everything(z, y), strict=True):
        torch.testing.assert_close(a, b)


def test_labels_that_do_not_exist_are_safe(engine):
    """Past the checks of the public functions, as a kernel meets them on a GPU."""
    for classes in (5, 100):
        z, reference, _, t = problem(6, classes, device=engine)
        y = torch.tensor([0, classes, -1, 2**62, -(2**62), 1], device=engine)
        outside = [False, True, True, True, True, False]
        for code in (0, 2, 3, 4):
            outs = (
                torch.empty_like(z),
                torch.empty(6, dtype=torch.bool, device=engine),
                y * 0,
                torch.empty(6, device=engine),
            )
            OPS.attack_cotangent(z, y, (t + (t == y)) % classes, None, code, False, *outs)
            assert outs[3].isnan().tolist() == outside and outs[0][[0, 5]].isfinite().all()
            assert not outs[1][1:5].any() and not outs[2][1:5].any()
        OPS.attack_cotangent(z, t, y, None, 4, False, *outs)
        assert outs[3][1:5].isnan().all()


@pytest.mark.parametrize("objective", ["margin", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_climbs_the_objective(objective, targeted, device):
    """Against a loop with a loss graph and PyTorch's sign and clamps."""
    torch.manual_seed(0)
    weight = torch.randn(48, 5, dtype=torch.float64, device=device)
    model = lambda x: torch.tanh(x.flatten(1) @ weight) * 3  # noqa: E731
    x = torch.rand(8, 3, 4, 4, dtype=torch.float64, device=device)
    y = (model(x).argmax(1) + targeted) % 5
    attack = PGD(
        0.1, 0.03, 4, random_start=False, objective=objective, targeted=targeted, keep="best", attack_mode="keep"
    )
    result = attack.run(model, x, y)
    loss, sign = getattr(published, objective), -1 if targeted else 1
    iterates = [x]
    for _ in range(4):
        leaf = iterates[-1].clone().requires_grad_()
        (grad,) = torch.autograd.grad(sign * loss(model(leaf), y).sum(), leaf)
        iterates.append((x + (iterates[-1] + 0.03 * grad.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1))
    values = torch.stack([sign * loss(model(v), y) for v in iterates])
    torch.testing.assert_close(result.objective, values.max(0).values)
    torch.testing.assert_close(result.adv, torch.stack(iterates)[values.argmax(0), torch.arange(8, device=device)])
    assert torch.equal(result.fooled, (model(result.adv).argmax(1) == y) == targeted)


def test_kl_reference_of_another_dtype_is_not_rounded(device):
    """A bfloat16 network and float32 reference logits."""
    weight = torch.randn(48, 5, dtype=torch.bfloat16, device=device)
    x = torch.rand(4, 3, 4, 4, device=device)
    seen = []

    def model(v):
        z = v.flatten(1).bfloat16() @ weight
        z.register_hook(lambda g: seen.append((z.detach(), g)))
        return z

    reference = torch.randn(4, 5, device=device)
    PGD(0.1, steps=1, objective="kl", attack_mode="keep")(model, x, reference_logits=reference)
    ((z, cotangent),) = seen
    wanted = (z.float().softmax(1) - F.softmax(reference, 1)).bfloat16()
    torch.testing.assert_close(cotangent, wanted * float16.LIFT)
