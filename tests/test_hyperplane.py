"""FAB's step: exact projections onto a plane inside the image range, what is made of them, the reference's bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends.reference.perturb_norms import flat
from atlas_kernels.core import available_isas, force_isa
from atlas_kernels.schema import NORMS
from operator_cases import SHAPES, problem, refused, same_bits, same_within_ulps, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
every_norm = pytest.mark.parametrize("norm", NORMS)


def case(shape, *, seed=0, device="cpu", far=1.0, **options):
    """adv, grad and x, and gaps of either sign: the range reaches most of the planes, not all."""
    adv, grad, x = problem(shape, seed=seed, device=device, **options)
    g = torch.Generator().manual_seed(seed)
    gap = torch.randn(shape[0], generator=g).to(device) * flat(grad.float()).nan_to_num(0, 0, 0).abs().sum(1)
    return adv, grad, x, 0.4 * far * gap.to(adv.dtype)


def check(adv, grad, x, gap, norm, **options):
    got = ak.hyperplane_step(adv, grad, x, gap, norm=norm, **options)
    with ak.backend("reference"):
        expected = ak.hyperplane_step(adv, grad, x, gap, norm=norm, **options)
    assert same_within_ulps(got, expected, x)
    return got


@every_norm
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 41)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_dtypes(shape, dtype, norm, device):
    inputs = case(shape, dtype=dtype, device=device)
    if not refused(dtype, lambda: ak.hyperplane_step(*inputs, norm=norm)):
        check(*inputs, norm)
        check(*case(shape, dtype=dtype, device=device, far=0.01), norm, alpha_max=1.0, overshoot=0.7)


@every_norm
@pytest.mark.parametrize("layouts", ["".join(p) for p in itertools.product("cl", repeat=3)])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 3)], ids=str)
def test_layouts_and_places(shape, layouts, norm, device):
    for grad_dtype in FLOATS:
        adv, grad, x, gap = case(shape, layouts=layouts, grad_dtype=grad_dtype, device=device)
        expected = check(adv, grad, x, gap, norm)
        for place in (adv, x, torch.empty_like(adv), to_layout(torch.empty_like(adv), layouts[1] == "l")):
            out = place.clone() if place is not adv and place is not x else place
            inputs = [out if t is place else t.clone() for t in (adv, grad, x)]
            made = ak.hyperplane_step(*inputs, gap, norm=norm, out=out)
            assert made is out and same_bits(made.contiguous(), expected.contiguous())
            adv, grad, x, gap = case(shape, layouts=layouts, grad_dtype=grad_dtype, device=device)


@every_norm
@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc"])
def test_ranges(layouts, norm, device):
    inputs = case((4, 3, 8, 8), layouts=layouts, device=device)
    check(*inputs, norm, clip_min=torch.tensor([0.0, -0.1, -0.5], device=device), clip_max=[1.0, 1.5, 2.0])
    check(*inputs, norm, clip_min=-math.inf, clip_max=math.inf)
    check(*inputs, norm, clip_max=math.inf, alpha_max=1.0)


@every_norm
def test_special_values(norm, device):
    for seed in range(3):
        adv, grad, x, gap = case((12, 3, 4, 5), special=True, seed=seed, device=device)
        check(adv, grad, x, gap, norm)
        adv, usable, x, gap = case((12, 3, 4, 5), seed=seed, device=device)
        gap[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        check(adv, usable, x, gap, norm)
        clean = check(adv, grad.nan_to_num(0, 0, 0), x, gap, norm)
        assert not clean.isnan().any()
        adv[:, 0, 0, 0], x[:, 0, 1, 1] = torch.nan, torch.nan  # has no room; from x there is no way
        assert check(adv, usable, x, gap, norm).isnan().sum() == 24
        adv, _, x, _ = case((12, 3, 4, 5), seed=seed, device=device)
        lost = ak.hyperplane_step(adv, torch.full_like(grad, torch.nan), x, gap, norm=norm)
        assert same_bits(lost, ak.hyperplane_step(adv, torch.zeros_like(grad), x, torch.zeros_like(gap), norm=norm))


@every_norm
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_every_isa_and_thread_count(dtype, norm, restored_isa_and_threads):
    inputs = case((33, 3, 17, 31), dtype=dtype, layouts="clc" if dtype == torch.float16 else "ccc")
    found = []
    for isa, threads in itertools.product(available_isas(), (1, 2, 5)):
        force_isa(isa)
        torch.set_num_threads(threads)
        found.append(ak.hyperplane_step(*inputs, norm=norm))
    assert all(same_bits(other, found[0]) for other in found[1:])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 9)) for i in range(draw(st.integers(1, 4))))
    types = {name: draw(st.sampled_from(FLOATS)) for name in ("dtype", "grad_dtype")}
    layouts = "".join(draw(st.sampled_from("cl")) for _ in range(3))
    far = draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    inputs = case(shape, layouts=layouts, seed=draw(st.integers(0, 99)), far=far, **types)
    check(
        *inputs, draw(st.sampled_from(NORMS)), alpha_max=draw(st.sampled_from([0.0, 0.1, 1.0])),
        overshoot=draw(st.sampled_from([0.0, 1.0, 1.05])),
    )  # fmt: skip


def shortest(point, normal, gap, norm):
    """The least length of a way of one sample to the plane inside [0, 1]: by trying which pixels are used up."""
    room = torch.where((normal > 0) == (gap < 0), 1 - point, point)
    m, target, least = normal.abs(), abs(float(gap)), math.inf
    for used in itertools.product((False, True), repeat=len(point)):
        used = torch.tensor(used)
        missing = target - float((m * room)[used].sum())
        free = torch.where(used, 0.0, m)
        ways = []
        if norm == "linf":
            ways = [(free > 0) * (missing / free.sum())]
        elif norm == "l2":
            ways = [free * (missing / free.square().sum())]
        else:
            ways = [torch.eye(len(m))[i] * (missing / m[i]) for i in range(len(m)) if free[i] > 0]
        for way in [*ways, torch.zeros_like(m)]:
            d = torch.where(used, torch.where(m > 0, room, 0.0), way)
            if bool((d >= -1e-12).all() & (d <= room + 1e-12).all()) and abs(float((m * d).sum()) - target) < 1e-11:
                least = min(least, float(torch.linalg.vector_norm(d, {"linf": math.inf, "l2": 2, "l1": 1}[norm])))
    return least


def projected(point, normal, gap, norm):
    return ak.hyperplane_step(point, normal, point, gap, norm=norm, alpha_max=0.0, overshoot=1.0)


@pytest.fixture
def doubles(device):
    if device.type == "cuda" or ak.backends.forced_backend() == "triton":
        pytest.skip("float64 on the CPU")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_norm
def test_projections_are_the_nearest_points(norm, doubles):
    """Beside an exact search, in every corner of the range and with pixels that do not count."""
    g = torch.Generator().manual_seed(3)
    reached = missed = 0
    for seed in range(12):
        point, normal = torch.rand(16, 5, generator=g), torch.randn(16, 5, generator=g)
        if seed % 3:
            point = torch.where(torch.rand(16, 5, generator=g) < 0.4, point.round(), point)
        if seed % 2:
            normal = torch.where(torch.rand(16, 5, generator=g) < 0.3, 0.0, normal)
        if seed % 4 == 3:
            normal = normal.sign()  # ties
        gap = torch.randn(16, generator=g) * (0.3 + seed % 3)
        d = projected(point, normal, gap, norm) - point
        up = (normal > 0) == (gap < 0)[:, None]
        room = torch.where(normal != 0, torch.where(up, 1 - point, point), 0.0)
        left = gap + (normal * d).sum(1)
        reachable = (normal.abs() * room).sum(1) >= gap.abs()
        torch.testing.assert_close(left[reachable], torch.zeros(int(reachable.sum())), rtol=0, atol=1e-12)
        torch.testing.assert_close(d[~reachable].abs(), room[~reachable], rtol=0, atol=1e-15)
        lengths = torch.linalg.vector_norm(d, {"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)
        for i in range(16):
            if reachable[i]:
                assert float(lengths[i]) == pytest.approx(shortest(point[i], normal[i], gap[i], norm), abs=1e-11)
        reached, missed = reached + int(reachable.sum()), missed + int((~reachable).sum())
    assert reached > 50 and missed > 20


@every_norm
def test_projections_of_corner_cases(norm, device):
    point = torch.tensor([[0.0, 1.0, 0.5]] * 5, device=device)
    normal = torch.tensor([[0.0] * 3, [1.0, -2.0, 3.0], [-1.0, 2.0, 0.0], [1e-30, 0.0, 0.0], [0.0, 0.0, 1e-38]])
    gap = torch.tensor([0.3, 0.0, -0.7, -2e-31, -3e-39])
    found = projected(point, normal.to(device), gap.to(device), norm)
    # No gradient; on the plane; no pixel has room; gradients and gaps of any size.
    expected = [[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [0.2, 1.0, 0.5], [0.0, 1.0, 0.8]]
    torch.testing.assert_close(found.cpu(), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "near"), [("linf", [2 / 3, 2 / 3]), ("l2", [0.7, 0.6]), ("l1", [0.75, 0.5])])
def test_ways_by_hand(norm, near, device):
    """To the plane 2 a + b = 2 from (0.5, 0.5), and to 2 a + b = 2.9 from (0.8, 0.3), where the range ends at a = 1."""
    normal = torch.tensor([[2.0, 1.0]] * 2, device=device)
    point, gap = torch.tensor([[0.5, 0.5], [0.8, 0.3]], device=device), torch.tensor([-0.5, -1.0], device=device)
    torch.testing.assert_close(projected(point, normal, gap, norm).cpu(), torch.tensor([near, [1.0, 0.9]]))


@every_norm
def test_step_is_made_of_two_projections(norm, doubles):
    adv, grad, x, gap = case((6, 3, 4, 4), dtype=torch.float64)
    gap = gap * 0.1
    from_x = gap + (grad * (x - adv)).flatten(1).sum(1)
    ways = projected(adv, grad, gap, norm) - adv, projected(x, grad, from_x, norm) - x
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    a, b = (torch.linalg.vector_norm(d.flatten(1), order, dim=1) for d in ways)
    for most in (0.1, 1.0):
        alpha = (a / (a + b)).clamp_max(most).view(-1, 1, 1, 1)
        expected = ((1 - alpha) * (adv + 1.05 * ways[0]) + alpha * (x + 1.05 * ways[1])).clamp(0, 1)
        found = ak.hyperplane_step(adv, grad, x, gap, norm=norm, alpha_max=most)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@every_norm
def test_scale_of_the_gradient_does_not_matter(norm, doubles):
    adv, grad, x, gap = case((6, 3, 4, 4), dtype=torch.float64)
    expected = ak.hyperplane_step(adv, grad, x, gap, norm=norm)
    for scale in (2.0**-900, 2.0**900):
        assert same_bits(ak.hyperplane_step(adv, grad * scale, x, gap * scale, norm=norm), expected)
    single = [t.float() for t in (adv, x)]
    close = ak.hyperplane_step(single[0], grad * 2.0**-900, single[1], gap * 2.0**-900, norm=norm)
    torch.testing.assert_close(close.double(), expected, rtol=0, atol=1e-5)


@every_norm
def test_compile_and_opcheck(norm, device):
    adv, grad, x, gap = case((3, 3, 4, 4), device=device)
    args = (adv, grad, x, gap, NORMS.index(norm), 0.1, 1.05, 0.0, None, 1.0, None, torch.empty_like(adv))
    torch.library.opcheck(torch.ops.atlas_kernels.hyperplane_step, args)


def test_a_constant_for_autograd(device):
    adv, grad, x, gap = case((3, 3, 4, 4), device=device)
    assert not ak.hyperplane_step(adv.requires_grad_(), grad, x.requires_grad_(), gap).requires_grad
