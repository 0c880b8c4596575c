"""Compactness over all pairs: against its definition in float64, exact gradients, and the memory of one batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends import BackendUnavailable, unavailable_reason
from atlas_kernels.backends.door import DoorError
from atlas_kernels.core import available_isas, force_isa
from operator_cases import Dispatched, same_bits

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DISTANCES = ["l1", "squared"]
SIZES = [(1, 1), (1, 65), (2, 7), (3, 1), (5, 64), (33, 65), (64, 130), (130, 7), (129, 200)]
OP = torch.ops.atlas_kernels.compactness.default


def features(batch, size, *, dtype=torch.float32, classes=3, device="cpu", seed=0):
    """(h, h_adv, labels): half of the features are 0 as after a ReLU, so there are ties."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, size, generator=g).relu()
    h_adv = torch.where(torch.rand(batch, size, generator=g) < 0.3, h, torch.randn(batch, size, generator=g).relu())
    labels = torch.randint(classes, (batch,), generator=g) - 1
    return h.to(device, dtype), h_adv.to(device, dtype), labels.to(device)


def broadcast(h, h_adv, labels, *, scale=0.99, distance="l1", detach=True, reduction="mean"):
    """The formula, with everything in memory and in the dtype of ``h``."""
    pair_weights = torch.tensor([1 - 1 / scale, 1], dtype=h.dtype, device=h.device)
    weights = pair_weights[(labels[:, None] == labels[None]).long()]
    difference = h_adv[:, None] - (h.detach() if detach else h)[None]
    distances = difference.abs() if distance == "l1" else difference.square()
    rows = (weights[..., None] * distances).sum((1, 2)) / (h.shape[1] * max(h.shape[0], 1))
    return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()


def with_gradients(loss, h, h_adv, labels, dtype, **options):
    """Loss and gradients by h and h_adv (in their dtype), computed in ``dtype``; h's is None where it is detached."""
    h, h_adv = (t.detach().clone().requires_grad_() for t in (h, h_adv))
    value = loss(h.to(dtype), h_adv.to(dtype), labels, **options)
    cotangent = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return value.detach(), *torch.autograd.grad(value, (h, h_adv), cotangent, allow_unused=True)


def check(h, h_adv, labels, **options):
    """Not more than twice as far from float64 as plain PyTorch in the compute type, or a few roundings away."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    exact = with_gradients(broadcast, h.double(), h_adv.double(), labels, torch.float64, **options)
    eager = with_gradients(broadcast, h, h_adv, labels, wide, **options)
    ours = with_gradients(ak.compactness, h, h_adv, labels, h.dtype, **options)
    # How large the terms are that a sum is made of: they may cancel, since weights may be negative.
    terms = broadcast(h.double(), h_adv.double(), torch.zeros_like(labels), **options).abs()
    terms = terms * max(1.0, abs(1 - 1 / options.get("scale", 0.99)))
    for what, a, b, c in zip(("loss", "gradient by h", "gradient by h_adv"), ours, eager, exact, strict=True):
        if c is None:
            assert a is None, what
            continue
        assert a.dtype == (wide if what == "loss" else h.dtype) and a.shape == c.shape, what
        size = terms.max() if what == "loss" else c.abs().max()
        rounding = torch.finfo(a.dtype).eps * (4 if wide == torch.float32 else 256)  # float64 has no better judge
        bound = 2 * (b.double() - c).abs().max() + rounding * size + torch.finfo(a.dtype).tiny
        assert (a.double() - c).abs().max() <= bound, what


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size, dtype, distance, device):
    check(*features(*size, dtype=dtype, device=device), distance=distance)
    check(*features(*size, dtype=dtype, device=device), distance=distance, detach=False, reduction="sum")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [0.99, 1.0, 0.01, 0.5, 3.0, -2.0])
def test_scales(scale, distance, device):
    for classes in (1, 2, 30):
        inputs = features(40, 33, classes=classes, device=device)
        check(*inputs, scale=scale, distance=distance, detach=False)
        check(*inputs, scale=scale, distance=distance, reduction="none")


def test_the_published_formula(device):
    """By hand: two classes, so w = [[1, w], [w, 1]] with w = 1 - 1/0.99."""
    h, h_adv = torch.tensor([[[1.0, 2.0], [0.0, 5.0]], [[2.0, 0.0], [0.5, 5.0]]], device=device)
    w = 1 - 1 / 0.99
    expected = ((3.0 + w * 7.0) + (w * 3.5 + 0.5)) / 2 / 4
    got = ak.compactness(h, h_adv, torch.tensor([7, -3], device=device))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_one_class_has_weights_1(device):
    h, h_adv, _ = features(9, 20, dtype=torch.float64, device=device)
    got = ak.compactness(h, h_adv, torch.full((9,), 4, device=device))
    assert torch.allclose(got, (h_adv[:, None] - h[None]).abs().mean())


def test_an_empty_batch_has_no_pairs(device):
    for distance in DISTANCES:
        h, h_adv, labels = features(0, 5, device=device)
        h_adv.requires_grad_()
        loss = ak.compactness(h, h_adv, labels, distance=distance)
        assert loss.item() == 0.0 and torch.autograd.grad(loss, h_adv)[0].shape == (0, 5)
        assert ak.compactness(h, h_adv, labels, reduction="none").shape == (0,)


def test_ties_have_gradient_0(device):
    h = torch.tensor([[0.0, -0.0, 1.5, 1e-45]], device=device).expand(70, 4).contiguous()
    h_adv = torch.tensor([[-0.0, 0.0, 1.5, 1e-45]], device=device).expand(70, 4).contiguous().requires_grad_()
    loss = ak.compactness(h, h_adv, torch.arange(70, device=device) % 3)
    assert loss.item() == 0.0 and not torch.autograd.grad(loss, h_adv)[0].any()


def test_the_smallest_difference_has_a_sign(device):
    h, h_adv = torch.zeros(1, 3, device=device), torch.tensor([[1e-45, -1e-45, 0.0]], device=device, requires_grad=True)
    grad = torch.autograd.grad(ak.compactness(h, h_adv, torch.zeros(1, dtype=torch.int64, device=device)), h_adv)[0]
    assert (grad * 3).tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_features(special, distance, device):
    for side in (0, 1):
        for row in (3, 68):
            inputs = features(70, 40, dtype=torch.float64, device=device)
            inputs[side][row, 37] = special
            options = {"distance": distance, "detach": False}
            ours = with_gradients(ak.compactness, *inputs, torch.float64, **options)
            plain = with_gradients(broadcast, *inputs, torch.float64, **options)
            assert not ours[0].isfinite()
            for a, b in zip(ours, plain, strict=True):
                assert torch.allclose(a, b, equal_nan=True)


def test_gradients_of_16_bit_features_do_not_vanish(device):
    """1/(B k) is below the smallest normal float16: it meets the scaled cotangent before it is rounded."""
    h, h_adv, labels = features(128, 512, dtype=torch.float16, device=device)
    h_adv.requires_grad_()
    (grad,) = torch.autograd.grad(ak.compactness(h, h_adv, labels), h_adv, torch.tensor(65536.0, device=device))
    exact = with_gradients(broadcast, h.double(), h_adv.double(), labels, torch.float64)[2] * (65536 / 0.5)
    assert torch.allclose(grad.double(), exact, rtol=1e-3, atol=1e-6)


def test_strides(device):
    h, h_adv, labels = features(20, 24, device=device)
    expected = ak.compactness(h, h_adv, labels)
    wide = torch.stack([labels, labels], 1)
    assert same_bits(ak.compactness(h.t().contiguous().t(), h_adv.t().contiguous().t(), wide[:, 0]), expected)
    one = h[:1].expand(20, 24)
    assert same_bits(ak.compactness(one, h_adv, labels), ak.compactness(one.contiguous(), h_adv, labels))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_each_isa_and_the_same_bits_for_any_number_of_threads(isa, distance, restored_isa_and_threads):
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    force_isa(isa)
    for size, dtype in (((130, 300), torch.float32), ((65, 130), torch.float64), ((130, 65), torch.bfloat16)):
        inputs = features(*size, dtype=dtype)
        torch.set_num_threads(1)
        check(*inputs, distance=distance, detach=False)
        alone = with_gradients(ak.compactness, *inputs, dtype, distance=distance, detach=False)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            together = with_gradients(ak.compactness, *inputs, dtype, distance=distance, detach=False)
            assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_anything(data):
    draw = data.draw
    batch, size = draw(st.integers(0, 70)), draw(st.integers(1, 140))
    dtype, classes, seed = draw(st.sampled_from(FLOATS)), draw(st.integers(1, 12)), draw(st.integers(0, 99))
    inputs = features(batch, size, dtype=dtype, classes=classes, seed=seed)
    scale = draw(st.floats(0.01, 100) | st.floats(-100, -0.01))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    detach = reduction == "none" or draw(st.booleans())
    options = {"scale": scale, "distance": draw(st.sampled_from(DISTANCES)), "detach": detach, "reduction": reduction}
    with ak.backend(draw(st.sampled_from(["native", "reference"]))):
        if batch:
            check(*inputs, **options)
        else:
            assert not ak.compactness(*inputs, **options).any()


# --- gradients ---


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("detach", [False, True])
def test_gradients_twice(detach, distance, backend):
    g = torch.Generator().manual_seed(0)
    h, h_adv = (torch.randn(5, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.tensor([0, 1, 0, 2, 1])
    for reduction in ("mean", "sum", "none"):
        inputs = (h_adv,) if detach or reduction == "none" else (h, h_adv)

        def loss(*inputs, reduction=reduction):
            clean = inputs[0] if len(inputs) == 2 else h
            return ak.compactness(
                clean, inputs[-1], labels, scale=0.7, distance=distance, detach=len(inputs) == 1, reduction=reduction
            )

        with ak.backend(backend):
            assert torch.autograd.gradcheck(loss, inputs)
            assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_second_derivatives_are_those_of_the_formula(distance, device):
    h, h_adv, labels = features(12, 9, dtype=torch.float64, device=device)
    h.requires_grad_(), h_adv.requires_grad_()

    def twice(loss):
        first = torch.autograd.grad(
            loss(h, h_adv, labels, distance=distance, detach=False), (h, h_adv), create_graph=True
        )
        return *first, *torch.autograd.grad(first[0].pow(2).sum() + first[1].pow(3).sum(), (h, h_adv))

    for a, b in zip(twice(ak.compactness), twice(broadcast), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_first_derivatives_with_a_graph_are_those_without(distance, device):
    """Features far from 0, where sums of them have few digits left for what separates them."""
    h, h_adv, labels = features(12, 9, dtype=torch.float32, device=device)
    h, h_adv = (h + 1e5).requires_grad_(), (h_adv + 1e5).requires_grad_()
    loss = ak.compactness(h, h_adv, labels, distance=distance, detach=False)
    with_graph = torch.autograd.grad(loss, (h, h_adv), create_graph=True)
    for a, b in zip(with_graph, torch.autograd.grad(loss, (h, h_adv)), strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_detach_leaves_the_clean_features_alone(device):
    h, h_adv, labels = features(6, 8, device=device)
    h.requires_grad_(), h_adv.requires_grad_()
    ak.compactness(h, h_adv, labels).backward()
    assert h.grad is None and h_adv.grad is not None
    assert not ak.compactness(h, h_adv.detach(), labels).requires_grad


def test_the_graph_can_be_walked_again(device):
    h, h_adv, labels = features(6, 8, device=device)
    loss = ak.compactness(h, h_adv.requires_grad_(), labels)
    first = torch.autograd.grad(loss, h_adv, retain_graph=True)[0]
    assert same_bits(torch.autograd.grad(loss, h_adv)[0], first)


# --- memory ---


@pytest.mark.parametrize(("detach", "limit"), [(True, 3), (False, 5)])
def test_memory_is_that_of_a_few_batches(detach, limit):
    """The peak, in units of one batch of features, the gradients themselves included. Distances alone would be 16."""
    batch, size = 2048, 128
    h, h_adv = (torch.ones(batch, size, requires_grad=True) for _ in range(2))
    labels = torch.arange(batch) % 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ak.compactness(h, h_adv, labels, detach=detach).backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert 1 < max(itertools.accumulate(sizes)) / (4 * batch * size) < limit


# --- what PyTorch asks of an operator ---


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_opcheck(squared, requires_grad, device):
    h, h_adv, labels = features(5, 6, device=device)
    h.requires_grad_(requires_grad), h_adv.requires_grad_(requires_grad)
    value, total, grad, adv_grad = (torch.empty(s, device=device) for s in ((5,), (), (5, 6), (5, 6)))
    torch.library.opcheck(OP, (h, h_adv, labels, 0.99, squared, 0.1, value, total, grad, adv_grad))
    torch.library.opcheck(OP, (h, h_adv, labels, 0.99, squared, 0.1, None, total, None, None))


@pytest.mark.parametrize("distance", DISTANCES)
def test_compile_fullgraph(distance, device):
    h, h_adv, labels = features(8, 20, device=device)
    h.requires_grad_(), h_adv.requires_grad_()

    def loss(h, h_adv, labels):
        return ak.compactness(h, h_adv * 2, labels, distance=distance, detach=False) * 3

    compiled = torch.compile(loss, fullgraph=True)
    for f in (compiled, loss):
        h.grad = h_adv.grad = None
        f(h, h_adv, labels).backward()
        if f is compiled:
            expected = h.grad, h_adv.grad
    assert torch.allclose(h.grad, expected[0]) and torch.allclose(h_adv.grad, expected[1])
    with torch.no_grad():
        assert torch.allclose(compiled(h, h_adv, labels), loss(h, h_adv, labels))


def test_inference_mode_and_dispatch_modes():
    inputs = features(4, 5)
    with Dispatched() as seen:
        expected = ak.compactness(*inputs)
    assert "atlas_kernels.compactness.default" in seen.names
    with torch.inference_mode():
        assert same_bits(ak.compactness(*inputs).clone(), expected)


# --- what must not pass ---


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_nothing_wrong_passes_the_door(data):
    """One argument of a valid call is spoilt: the operator itself, called past the public checks, must refuse."""
    h, h_adv, labels = features(4, 6)
    args = dict(h=h, h_adv=h_adv, labels=labels, scale=0.99, squared=False, factor=1.0, value=torch.full((4,), 7.0),
                total=torch.full((), 7.0), grad=torch.full((4, 6), 7.0), adv_grad=torch.full((4, 6), 7.0))  # fmt: skip
    written = [t for name, t in args.items() if name in ("value", "total", "grad", "adv_grad")]
    name = data.draw(st.sampled_from([n for n, a in args.items() if isinstance(a, torch.Tensor)]))
    good = args[name]
    spoils = {
        "dtype": lambda: good.to(torch.complex64),
        "integers": lambda: good.to(torch.int32),
        "double": lambda: good.double(),
        "more rows": lambda: torch.cat([good.view(-1, *good.shape[1:])] * 2),
        "strides": lambda: torch.stack([good, good], -1)[..., 0],
        "device": lambda: good.to("meta"),
        "an input": lambda: h[0, 0] if good.ndim == 0 else h[0, :4] if good.ndim == 1 else h,
    }
    if name in ("h", "h_adv"):
        del spoils["an input"]
    if good.ndim == 0:
        del spoils["strides"]
    args[name] = spoils[data.draw(st.sampled_from(sorted(spoils)))]()
    with pytest.raises((DoorError, ValueError, RuntimeError, NotImplementedError)):
        OP(*args.values())
    assert all((t == 7.0).all() for t in written)


def test_triton_has_no_kernels_and_says_so(monkeypatch):
    if reason := unavailable_reason("triton", "cpu"):
        assert "TRITON_INTERPRET" in reason or "not installed" in reason
        monkeypatch.setattr("atlas_kernels.backends.triton.unavailable_reason", lambda _: None)
    with ak.backend("triton"), pytest.raises(BackendUnavailable, match="triton backend has no pairwise kernels: use"):
        ak.compactness(*features(3, 4))
