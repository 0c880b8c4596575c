"""The nuclear norm: against singular values in float64, up to the bounds that its docstring gives."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends.door import DoorError
from atlas_kernels.core import available_isas, force_isa
from atlas_kernels.nuclear_norm import by_products
from operator_cases import Dispatched, same_bits

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(1, 2), (2, 2), (3, 2), (2, 3), (7, 9), (8, 8), (64, 10), (10, 64), (130, 17), (5, 1000), (33, 33)]
KINDS = ["full", "graded", "low", "equal"]
OP = torch.ops.atlas_kernels.nuclear_norm.default


def matrix(batch, classes, kind="full", *, dtype=torch.float32, device="cpu", seed=0):
    """Of full rank; with singular values of every size; of rank 1, as are whole numbers; with all of them equal."""
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(batch, classes, generator=g, dtype=torch.float64)
    if kind == "graded":
        d *= torch.logspace(0, -4, classes, dtype=torch.float64)
    if kind == "low":
        d = torch.randint(-3, 4, (batch, 1), generator=g).double() @ torch.ones(1, classes, dtype=torch.float64)
    if kind == "equal":
        side = max(batch, classes)
        d = torch.linalg.qr(torch.randn(side, side, generator=g, dtype=torch.float64))[0][:batch, :classes]
    return d.to(dtype).to(device).contiguous()


def by_svd(d):
    """Norm and gradient from PyTorch's singular values in float64, and how far ``d`` goes down: s_1 / s_r."""
    wide = torch.finfo(torch.float64 if d.dtype == torch.float64 else torch.float32)
    u, s, v = torch.linalg.svd(d.double(), full_matrices=False)
    counts = s > max(d.shape) * wide.eps * s[:1]
    condition = float(s[0] / s[counts].min()) if counts.any() else 1.0
    return (s * counts).sum(), (u * counts) @ v, condition


def with_gradient(d, cotangent=1.0):
    d = d.detach().clone().requires_grad_()
    value = ak.nuclear_norm(d)
    (grad,) = torch.autograd.grad(value, d, torch.full_like(value, cotangent))
    return value.detach(), grad


def check(d, *, squared=False):
    """Within the bounds of the docstring, and the roundings of the two results and of the judge, which is LAPACK."""
    value, grad = with_gradient(d)
    true_value, true_grad, condition = by_svd(d)
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    assert value.dtype == wide and grad.dtype == d.dtype and grad.shape == d.shape
    count, unit = min(d.shape), 2.0**-53
    cosine = max(d.shape) * 2.0**-52 if wide == torch.float64 else 2.0**-36
    error = count * cosine + 64 * count * unit * condition ** (2 if squared else 1)
    assert (value.double() - true_value).abs() <= true_value * (64 * count * unit + torch.finfo(wide).eps / 2)
    assert (grad.double() - true_grad).abs().max() <= error + torch.finfo(d.dtype).eps / 2 + torch.finfo(wide).eps / 2
    assert torch.linalg.matrix_norm(grad.double(), ord=2) <= 1 + error + count * torch.finfo(d.dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size, dtype, kind, device):
    d = matrix(*size, kind, dtype=dtype, device=device)
    check(d, squared=min(size) > 32 and d.is_cpu and dtype != torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(33, 40), (128, 100), (64, 100)], ids=str)
def test_every_way_to_many_vectors(size, dtype, kind, device):
    """The kernel at any size; what takes its place on each device."""
    d = matrix(*size, kind, dtype=dtype, device=device)
    check(d, squared=d.is_cpu and dtype != torch.float64)
    with ak.backend("native"):
        check(d)
    value, grad = by_products(d)
    true_value, true_grad, condition = by_svd(d)
    assert (value - true_value).abs() <= 1e-13 * true_value
    assert (grad - true_grad).abs().max() <= 1e-13 * condition


def test_products_read_nothing_back():
    """Tensors without values: whoever asked for one would fail."""
    value, grad = by_products(torch.empty(50, 40, device="meta"))
    assert value.shape == () and grad.shape == (50, 40)
    value, grad = with_gradient(torch.empty(50, 40, device="meta"))
    assert value.dtype == grad.dtype == torch.float32


@pytest.mark.parametrize("size", [(2, 1000), (1000, 2), (300, 1000)], ids=str)
def test_up_to_a_thousand_classes(size, device):
    check(matrix(*size, device=device), squared=True)


def test_the_norm_by_hand(device):
    d = torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]], device=device)
    value, grad = with_gradient(d, 2.0)
    assert value.item() == 7.0
    assert grad.tolist() == [[2.0, 0.0], [0.0, -2.0], [0.0, 0.0]]


@pytest.mark.parametrize("size", [(6, 4), (4, 6), (60, 40)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_directions_of_nothing_get_nothing(dtype, size, device):
    value, grad = with_gradient(torch.zeros(size, dtype=dtype, device=device))
    assert value.item() == 0.0 and not grad.any()
    d = torch.zeros(size, dtype=dtype, device=device)
    d[1] = 2.0
    value, grad = with_gradient(d)
    assert value.item() == pytest.approx(2 * size[1] ** 0.5, rel=1e-6)
    assert torch.allclose(grad[1].double(), torch.full((size[1],), size[1] ** -0.5, dtype=torch.float64), rtol=5e-3)
    grad[1] = 0.0
    assert grad.abs().max() <= 1e-15  # of LAPACK's; ours are 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8, 6), (6, 8), (70, 50)], ids=str)
def test_what_counts_as_0(size, dtype, device):
    """Singular values on both sides of the bound, which lie on a diagonal, so that no rounding moves them."""
    least = max(size) * (2.0**-52 if dtype == torch.float64 else 2.0**-23)
    lengths = torch.tensor([-1.0, 0.5, 0.5, 1.125 * least, 0.4375 * least, 1e-5 * least], dtype=torch.float64)
    d = torch.zeros(size, dtype=dtype, device=device)
    d[torch.arange(6), (torch.arange(6) + 1) % 6] = lengths.to(dtype).to(device)
    expected = torch.zeros(size, dtype=torch.float64)
    expected[torch.arange(4), (torch.arange(4) + 1) % 6] = lengths[:4].sign()
    makers = [with_gradient, by_products]
    for backend in ("native", "reference", None):
        for make in makers if backend is None else makers[:1]:
            with ak.backend(backend) if backend else nullcontext():
                value, grad = make(d)
            assert value.item() == pytest.approx(2.0 + 1.125 * least, rel=1e-6)
            assert torch.allclose(grad.double().cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(6, 4), (4, 6), (60, 40)], ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_spoils_all(special, size, device):
    for dtype in FLOATS:
        d = matrix(*size, dtype=dtype, device=device)
        d[-1, 1] = special
        for t in (*with_gradient(d), *by_products(d), *of_formula(d)):
            assert t.isnan().all()


def of_formula(d):
    d = d.detach().clone().requires_grad_()
    value = ak.nuclear_norm(d)
    (grad,) = torch.autograd.grad(value, d, create_graph=True)
    return value.detach(), grad.detach()


@pytest.mark.parametrize("size", [(6, 4), (40, 60)], ids=str)
def test_entries_of_any_size(size, device):
    """Squares of these leave what a number can hold."""
    for dtype, exponents in ((torch.float32, (-149, -120, 110)), (torch.float64, (-1074, -900, 1000))):
        whole = torch.randint(1, 9, size, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected, slope, _ = by_svd(whole)
        for exponent in exponents:
            d = torch.ldexp(whole, torch.tensor(exponent)).to(device)
            for value, grad in (with_gradient(d), by_products(d)):
                scaled = torch.ldexp(value.double().cpu(), torch.tensor(-exponent))
                assert scaled.item() == pytest.approx(expected.item(), rel=1e-6, abs=1.0 if exponent < -1000 else 0.6)
                assert torch.allclose(grad.double().cpu(), slope, rtol=0, atol=1e-6)


def test_an_empty_batch_has_norm_0(device):
    value, grad = with_gradient(torch.empty(0, 5, device=device))
    assert value.item() == 0.0 and grad.shape == (0, 5)


def test_strides(device):
    d = matrix(20, 9, device=device)
    expected = with_gradient(d)
    for same in (d.t().contiguous().t(), torch.stack([d, d], -1)[..., 0]):
        assert all(same_bits(a, b) for a, b in zip(with_gradient(same), expected, strict=True))


def test_a_difference_of_logits_gets_a_gradient_on_both_sides(device):
    z, other = (matrix(64, 10, seed=seed, device=device).requires_grad_() for seed in (1, 2))
    a, b = torch.autograd.grad(4.5 / 64 * ak.nuclear_norm(z - other), (z, other))
    assert same_bits(a, -b) and torch.allclose(a.double(), 4.5 / 64 * by_svd((z - other).detach())[1], atol=1e-7)


def test_gradients_in_float16_do_not_vanish(device):
    """A scaled cotangent meets the gradient before it is rounded."""
    d = matrix(6, 4, dtype=torch.float16, device=device) * 1e-3
    d[:, 3] = 0
    d[0, 0] += 1e-6
    _, grad = with_gradient(d, 65536.0)
    assert torch.allclose(grad.double() / 65536, by_svd(d)[1], rtol=1e-3, atol=2**-25)


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_bits_of_each_isa(isa, restored_isa_and_threads):
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    cases = [matrix(*size, dtype=dtype) for size in SIZES for dtype in (torch.float32, torch.float64)]
    force_isa("baseline")
    with ak.backend("native"):
        expected = [with_gradient(d) for d in cases]
        force_isa(isa)
        torch.set_num_threads(3)
        for d, made in zip(cases, expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(with_gradient(d), made, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_anything(data):
    draw = data.draw
    size = draw(st.integers(1, 40)), draw(st.integers(2, 40))
    d = matrix(*size, draw(st.sampled_from(KINDS)), dtype=draw(st.sampled_from(FLOATS)), seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        d[draw(st.integers(0, size[0] - 1)) :] = 0
    with ak.backend(draw(st.sampled_from(["native", "reference"]))):
        check(d)


# --- gradients ---


@pytest.mark.parametrize("size", [(6, 4), (3, 5), (4, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_twice(backend, size):
    d = matrix(*size, dtype=torch.float64).requires_grad_()
    with ak.backend(backend):
        assert torch.autograd.gradcheck(ak.nuclear_norm, d)
        assert torch.autograd.gradgradcheck(ak.nuclear_norm, d)


@pytest.mark.parametrize("size", [(33, 40), (40, 33)], ids=str)
def test_gradients_of_many_vectors(size, device):
    d = matrix(*size, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(ak.nuclear_norm, d, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_first_derivatives_with_a_graph_are_those_without(kind, device):
    for size in ((12, 9), (50, 40)):
        d = matrix(*size, kind, device=device)
        assert torch.allclose(of_formula(d)[1], with_gradient(d)[1], rtol=0, atol=2e-3 if kind == "graded" else 1e-5)


def test_the_graph_can_be_walked_again(device):
    d = matrix(6, 8, device=device).requires_grad_()
    value = ak.nuclear_norm(d)
    first = torch.autograd.grad(value, d, retain_graph=True)[0]
    assert same_bits(torch.autograd.grad(value, d)[0], first)


# --- what PyTorch asks of an operator ---


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    d = matrix(5, 6, device=device).requires_grad_(requires_grad)
    torch.library.opcheck(OP, (d, torch.empty((), device=device), torch.empty(5, 6, device=device)))
    torch.library.opcheck(OP, (d, torch.empty((), device=device), None))


@pytest.mark.parametrize(("size", "backend"), [((8, 5), "inductor"), ((36, 40), "aot_eager")], ids=str)
def test_compile_fullgraph(size, backend, device):
    d = matrix(*size, device=device).requires_grad_()

    def loss(d):
        return ak.nuclear_norm(d * 2) * 3

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert torch.allclose(torch.autograd.grad(compiled(d), d)[0], torch.autograd.grad(loss(d), d)[0])
    with torch.no_grad():
        assert torch.allclose(compiled(d), loss(d))


def test_inference_mode_and_dispatch_modes():
    d = matrix(4, 5)
    with Dispatched() as seen:
        expected = ak.nuclear_norm(d)
    assert "atlas_kernels.nuclear_norm.default" in seen.names
    with torch.inference_mode():
        assert same_bits(ak.nuclear_norm(d).clone(), expected)


# --- what must not pass ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_wrong_passes_the_door(data):
    """One argument of a valid call is spoilt: the operator itself, called past the public checks, must refuse."""
    args = dict(d=matrix(4, 6), value=torch.full((), 7.0), grad=torch.full((4, 6), 7.0))
    written = [args["value"], args["grad"]]
    name = data.draw(st.sampled_from(list(args)))
    good = args[name]
    spoils = {
        "dtype": lambda: good.to(torch.complex64),
        "integers": lambda: good.to(torch.int32),
        "double": lambda: good.double(),
        "more rows": lambda: torch.cat([good.view(-1, *good.shape[1:])] * 2),
        "strides": lambda: torch.stack([good, good], -1)[..., 0],
        "device": lambda: good.to("meta"),
        "flat": lambda: good.reshape(-1),
    }
    if good.ndim == 0:
        del spoils["strides"]
    args[name] = spoils[data.draw(st.sampled_from(sorted(spoils)))]()
    with pytest.raises((DoorError, ValueError, RuntimeError, NotImplementedError)):
        OP(*args.values())
    assert all((t == 7.0).all() for t in written)
