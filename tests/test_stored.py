"""FGSM-PGI's stored perturbations: the reference's bits, the published update, what is not to be written."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends.reference import stored as plain
from atlas_kernels.core import available_isas, force_isa
from operator_cases import SHAPES, problem, refused, same_bits, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPS = torch.ops.atlas_kernels


def case(shape, *, store=torch.float32, layouts="cccc", extra=3, seed=0, device="cpu", **options):
    """Images x, their gradient, the stored perturbations and momentum, and the index of each image's row in these.

    store: type of both, but for momentum beside float16. layouts: those of x, the gradient, the store and the results.
    """
    _, grad, x = problem(shape, layouts="c" + layouts[1] + layouts[0], seed=seed, device=device, **options)
    g = torch.Generator().manual_seed(seed)
    count = shape[0] + extra
    d = 0.1 * (2 * torch.rand(count, *shape[1:], generator=g) - 1)
    m = torch.randn(count, *shape[1:], generator=g) / x[:1].numel()
    types = store, torch.float32 if store == torch.float16 else store  # which momentum may not be
    d, m = (to_layout(t.to(device, dtype), layouts[2] == "l") for t, dtype in zip((d, m), types, strict=True))
    return x, grad, d, m, torch.randperm(count, generator=g)[: shape[0]].to(device)


def run(x, grad, stored, momentum, index, eps=0.1, *, out_dtype=None, layouts="cccc", **options):
    """Start and step, with the store after it."""
    stored, momentum = stored.clone(), momentum.clone()
    clip = {name: options[name] for name in ("clip_min", "clip_max") if name in options}
    starts, outs = (to_layout(torch.empty_like(x, dtype=out_dtype), layouts[3] == "l") for _ in "12")
    return {
        "start": ak.stored_start(x, stored, index, out=starts, **clip),
        "step": ak.stored_step(x, grad, stored, momentum, index, eps, out=outs, **options),
        "stored": stored,
        "momentum": momentum,
    }


def check(*inputs, **options):
    got = run(*inputs, **options)
    with ak.backend("reference"):
        expected = run(*inputs, **options)
    for name, t in got.items():
        if name in ("stored", "momentum") and inputs[0].dtype == torch.float64:  # whose sums are rounded too
            torch.testing.assert_close(t, expected[name], rtol=1e-12, atol=0, equal_nan=True)
        else:
            assert same_bits(t, expected[name]), name


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 41), (9, 3, 16, 24)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_shapes_and_dtypes(shape, dtype, device):
    inputs = case(shape, dtype=dtype, device=device)
    if not refused(dtype, lambda: run(*inputs)):
        check(*inputs)
        check(*case(shape, dtype=dtype, store=torch.bfloat16, device=device), step_size=0.03, decay=0.9)


@pytest.mark.parametrize("layouts", ["".join(p) for p in itertools.product("cl", repeat=4)])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 3)], ids=str)
def test_bits_of_layouts(shape, layouts, device):
    for store, out_dtype in itertools.product((torch.float32, torch.float16), (torch.float32, torch.bfloat16)):
        inputs = case(shape, layouts=layouts, store=store, grad_dtype=torch.bfloat16, device=device)
        check(*inputs, layouts=layouts, out_dtype=out_dtype)


@pytest.mark.parametrize("layouts", ["cccc", "llll", "clcl"])
def test_bits_per_sample_and_per_channel(layouts, device):
    eps, step = (torch.rand(4, device=device) * 0.2 for _ in "12")
    clip = {"clip_min": torch.tensor([0.0, -0.1, 0.3], device=device), "clip_max": [1.0, 0.8, 2.0]}
    inputs = case((4, 3, 5, 8), layouts=layouts, device=device)
    check(*inputs, eps, step_size=step, **clip)
    check(*inputs, eps, layouts=layouts, clip_min=-float("inf"), clip_max=float("inf"))


def test_bits_of_special_values(device):
    for seed in range(3):
        x, grad, d, m, index = case((4, 3, 4, 5), special=True, seed=seed, device=device)
        check(x, grad, d, m, index)
        usable = torch.randn_like(grad)
        check(x, usable, d, m, index)
        d[index[0]], m[index[1]], d[index[2]] = torch.nan, torch.inf, -0.0
        check(x, usable, d, m, index)
        check(x, usable, d, m, index, 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_every_isa_and_thread_count(dtype, restored_isa_and_threads):
    inputs, found = case((33, 3, 33, 31), dtype=dtype, layouts="clcc"), []
    for isa, threads in itertools.product(available_isas(), (1, 2, 5)):
        force_isa(isa)
        torch.set_num_threads(threads)
        found.append(run(*inputs))
    for other in found[1:]:
        assert all(same_bits(t, other[name]) for name, t in found[0].items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bits_of_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 9)) for i in range(draw(st.integers(1, 5))))
    layouts = "".join(draw(st.sampled_from("cl")) for _ in range(4))
    types = {name: draw(st.sampled_from(FLOATS)) for name in ("dtype", "grad_dtype", "store")}
    inputs = case(shape, layouts=layouts, extra=draw(st.integers(0, 4)), seed=draw(st.integers(0, 99)), **types)
    number = st.sampled_from([0.0, 1e-6, 0.03, 1.0])
    check(
        *inputs, draw(number), step_size=draw(st.none() | number), decay=draw(st.sampled_from([0.0, 0.3, 1.0])),
        layouts=layouts, out_dtype=draw(st.sampled_from(FLOATS)),
    )  # fmt: skip


def published(x, grad, stored, momentum, index, eps, decay):
    """The update as its authors write it: what is kept, and the adversary."""
    delta = stored[index]
    m = grad / torch.norm(grad, p=1) + momentum[index] * decay
    kept = torch.clamp(delta + eps * torch.sign(m), -eps, eps)
    kept = torch.clamp(kept, -x, 1 - x)
    delta = torch.clamp(delta + eps * torch.sign(grad), -eps, eps)
    delta = torch.clamp(delta, -x, 1 - x)
    stored[index], momentum[index] = kept, m
    return x + delta


def test_the_published_update_thrice(device):
    x, grad, d, m, index = case((8, 3, 6, 6), dtype=torch.float64, store=torch.float64, device=device)
    if refused(x.dtype, lambda: run(x, grad, d, m, index)):
        return
    theirs = d.clone(), m.clone()
    for _ in range(3):
        torch.testing.assert_close(ak.stored_start(x, d, index), (x + theirs[0][index]).clamp(0, 1), rtol=0, atol=1e-12)
        adv = ak.stored_step(x, grad, d, m, index, 0.1)
        torch.testing.assert_close(adv, published(x, grad, *theirs, index, 0.1, 0.3), rtol=0, atol=1e-12)
        torch.testing.assert_close(d, theirs[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(m, theirs[1], rtol=1e-12, atol=0)
        grad = grad.roll(1, 0) * 0.7
    assert (m[index].sign() != grad.sign()).any(), "momentum never mattered"


def test_the_step_goes_on_from_what_is_stored_not_from_the_clipped_start(device):
    x, d = torch.zeros(1, 1, 1, 2, device=device), torch.full((1, 1, 1, 2), -0.1, device=device)
    grad, m, index = torch.ones_like(x), torch.zeros_like(d), torch.tensor([0], device=device)
    assert torch.equal(ak.stored_start(x, d, index), x)
    assert torch.equal(ak.stored_step(x, grad, d, m, index, 0.1), x), "from the start it would be 0.1"


def test_only_the_rows_of_the_batch_are_written(device):
    x, grad, d, m, index = case((4, 3, 4, 4), extra=5, device=device)
    before = d.clone(), m.clone()
    ak.stored_step(x, grad, d, m, index, 0.1)
    others = torch.ones(9, dtype=torch.bool, device=device).index_fill_(0, index, False)
    for store, was in zip((d, m), before, strict=True):
        assert torch.equal(store[others], was[others])
        assert (store[index] != was[index]).flatten(1).any(1).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_norm_leaves_the_store_as_it_is(value, device):
    x, grad, d, m, index = case((4, 3, 4, 4), store=torch.float64, device=device)
    before = d.clone(), m.clone()
    grad = torch.zeros_like(grad) if value == 0 else grad.index_fill(0, torch.tensor([1], device=device), value)
    adv = ak.stored_step(x, grad, d, m, index, 0.1)
    assert adv.isfinite().all() and torch.equal(d, before[0]) and torch.equal(m, before[1])


def test_rows_outside_the_store_are_neither_read_nor_written(device, monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    x, grad, d, m, _ = case((5, 3, 4, 4), extra=-2, device=device)
    index = torch.tensor([2, -1, 0, 3, 2**62], device=device)
    check(x, grad, d, m, index)
    adv, start = ak.stored_step(x, grad, d, m, index, 0.1), ak.stored_start(x, d, index)
    for found in (adv, start):
        assert found.isnan().flatten(1).all(1).tolist() == [False, True, False, True, True]
    check(x, grad, d[:0], m[:0], index)


def test_in_place_of_x_and_of_the_gradient(device):
    for layouts in ("cccc", "llcl", "lccl"):
        x, grad, d, m, index = case((4, 3, 4, 4), layouts=layouts, device=device)
        expected = run(x, grad, d, m, index)
        place = x.clone()
        assert torch.equal(ak.stored_start(place, d, index, out=place), expected["start"])
        for which in ("x", "grad"):
            given, stored = {"x": x, "grad": grad, which: (place := (x, grad)[which == "grad"].clone())}, d.clone()
            found = ak.stored_step(*given.values(), stored, m.clone(), index, 0.1, out=place)
            assert found is place and torch.equal(found, expected["step"]) and torch.equal(stored, expected["stored"])


def test_a_double_gradient_keeps_its_direction_in_float32(device):
    x, grad, d, m, index = case((4, 3, 4, 4), device=device)
    expected = run(x, grad, d, m, index)
    for factor in (1e-300, 1e300):
        for name, t in run(x, grad.double() * factor, d, m, index).items():
            torch.testing.assert_close(t, expected[name])


def test_empty_batches(device):
    x, grad, d, m, index = case((0, 3, 4, 4), device=device)
    before = d.clone()
    assert ak.stored_step(x, grad, d, m, index, 0.1).shape == x.shape and torch.equal(d, before)


def test_the_start_has_the_gradient_of_its_clips():
    x, _, d, _, index = case((3, 2, 3, 3), dtype=torch.float64, store=torch.float64)
    x, d = (0.02 + 0.96 * x).requires_grad_(), d.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d: ak.stored_start(x, d, index), (x, d))
    with pytest.raises(ValueError, match="out= does not work"):
        ak.stored_start(x, d, index, out=torch.empty_like(x))
    with torch.no_grad():
        assert same_bits(ak.stored_start(x, d, index), plain.start(x, d, index, (0.0, None, 1.0, None)))


def test_the_step_is_a_constant_and_counts_as_a_write():
    x, grad, d, m, index = case((3, 2, 3, 3))
    version = d._version, m._version
    assert not ak.stored_step(x.requires_grad_(), grad, d, m, index, 0.1).requires_grad
    assert d._version > version[0] and m._version > version[1]


def test_compiles_whole():
    x, grad, d, m, index = case((3, 3, 4, 4))
    expected = run(x, grad, d, m, index)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, grad, d, m, index):
        return ak.stored_start(x, d, index), ak.stored_step(x, grad, d, m, index, 0.1)

    start, adv = both(x, grad, d, m, index)
    assert same_bits(start, expected["start"]) and same_bits(adv, expected["step"])
    assert same_bits(d, expected["stored"]) and same_bits(m, expected["momentum"])


def test_opcheck():
    x, grad, d, m, index = case((3, 3, 4, 4))
    bounds = 0.0, None, 1.0, None
    torch.library.opcheck(OPS.stored_start, (x, d, index, *bounds, torch.empty_like(x)))
    torch.library.opcheck(
        OPS.stored_step, (x, grad, d, m, index, 0.1, None, 0.1, None, 0.3, *bounds, torch.empty_like(x))
    )


def test_a_graph_of_the_step_writes_the_store(device):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    x, grad, d, m, index = case((8, 3, 8, 8), device=device)
    expected = run(x, grad, d, m, index)
    out, saved = torch.empty_like(x), (d.clone(), m.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ak.stored_step(x, grad, d, m, index, 0.1, out=out)
    d.copy_(saved[0]), m.copy_(saved[1])
    graph.replay()
    assert same_bits(out, expected["step"]) and same_bits(d, expected["stored"])
