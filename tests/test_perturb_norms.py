"""Starts, steps and projections in l2 and l1: against the reference, against independent statements, and as attacks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.core import available_isas, force_isa
from operator_cases import SHAPES, apgd_step, problem, same_bits, same_within_ulps, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPS = torch.ops.atlas_kernels
RADII = {"l2": (0.6, 0.4), "l1": (4.0, 2.0)}  # eps and step that use every branch at the shapes below
both_norms = pytest.mark.parametrize("norm", RADII)


def every_result(adv, grad, x, eps, step, norm, *, key, ids=None, active=None, descend=False, **clip):
    noise = {"key": key, "ids": ids, "draw": 3}
    out = {
        "start": ak.random_start(x, eps, norm=norm, **noise, **clip),
        "step": ak.pgd_step(adv, grad, x, eps, step, norm=norm, active=active, descend=descend, **clip),
        "step of APGD": apgd_step(adv, grad, x, eps, step, norm=norm, active=active, descend=descend, **clip),
        "project": ak.project(adv, x, eps, norm=norm, **clip),
        "project linf": ak.project(adv, x, eps, **clip),
    }
    for sparsity in (0.5, None) if norm == "l1" else ():
        out[f"step, {sparsity}"] = ak.pgd_step(
            adv, grad, x, eps, step, norm=norm, sparsity=sparsity, active=active, descend=descend, **clip
        )
    return out


def check_against_reference(adv, grad, x, *args, **kwargs):
    got = every_result(adv, grad, x, *args, **kwargs)
    with ak.backend("reference"):
        expected = every_result(adv, grad, x, *args, **kwargs)
    for name, t in got.items():
        assert same_within_ulps(t, expected[name], x), name
    assert same_bits(got["project linf"], expected["project linf"])


@both_norms
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 41)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_dtypes(shape, dtype, norm, device):
    adv, grad, x = problem(shape, dtype=dtype, device=device)
    check_against_reference(adv, grad, x, *RADII[norm], norm, key=ak.noise_key(device))


@both_norms
@pytest.mark.parametrize("layouts", ["".join(p) for p in itertools.product("cl", repeat=3)])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 3)], ids=str)
def test_layouts(shape, layouts, norm, device):
    for grad_dtype in FLOATS:
        adv, grad, x = problem(shape, layouts=layouts, grad_dtype=grad_dtype, device=device)
        check_against_reference(adv, grad, x, *RADII[norm], norm, key=ak.noise_key(device))


@both_norms
@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc"])
def test_per_sample_and_per_channel(layouts, norm, device):
    adv, grad, x = problem((4, 3, 8, 8), layouts=layouts, device=device)
    eps, step = (torch.rand(4, device=device) * 2 * r for r in RADII[norm])
    clip = {"clip_min": torch.tensor([0.0, -0.1, -0.5], device=device), "clip_max": [1.0, 1.5, 2.0]}
    active = torch.tensor([True, False, True, False], device=device)
    ids, key = torch.tensor([3, 1, 2**40, 3], device=device), ak.noise_key(device)
    check_against_reference(adv, grad, x, eps, step, norm, key=key, ids=ids, active=active, descend=True, **clip)
    check_against_reference(adv, grad, x, eps, step, norm, key=key, active=active)
    moved = ak.pgd_step(adv, grad, x, eps, step, norm=norm, active=active)
    assert torch.equal(moved[~active], adv[~active]) and not torch.equal(moved[active], adv[active])


@both_norms
def test_special_values(norm, device):
    for seed in range(3):
        adv, grad, x = problem((12, 3, 4, 5), special=True, seed=seed, device=device)
        for t, clean in ((grad, range(0, 8)), (adv, range(0, 6)), (x, range(0, 6))):  # not all samples are lost
            t[clean.start : clean.stop] = problem((12, 3, 4, 5), device=device)[1][: clean.stop].abs().clamp(0, 1)
        check_against_reference(adv, grad, x, *RADII[norm], norm, key=ak.noise_key(device))


@both_norms
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_every_isa_and_thread_count(dtype, norm, restored_isa_and_threads):
    adv, grad, x = problem((33, 3, 33, 31), dtype=dtype, layouts="clc" if dtype == torch.float16 else "ccc")
    found = []
    for isa, threads in itertools.product(available_isas(), (1, 2, 5)):
        force_isa(isa)
        torch.set_num_threads(threads)
        found.append(every_result(adv, grad, x, 3 * RADII[norm][0], 2.0, norm, key=torch.tensor([1, 2])))
    for other in found[1:]:
        assert all(same_bits(t, other[name]) for name, t in found[0].items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 9)) for i in range(draw(st.integers(1, 4))))
    layouts = "".join(draw(st.sampled_from("cl")) for _ in range(3))
    dtype, grad_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    adv, grad, x = problem(shape, dtype=dtype, grad_dtype=grad_dtype, layouts=layouts, seed=draw(st.integers(0, 99)))
    number = st.sampled_from([0.0, 1e-6, 0.3, 1.0, 7.0, 1e4])
    check_against_reference(
        adv, grad, x, draw(number), draw(number), draw(st.sampled_from(["l2", "l1"])),
        key=torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), 0]), descend=draw(st.booleans()),
    )  # fmt: skip


# --- independent statements ---


def length(d, norm):
    return torch.linalg.vector_norm(d.double().flatten(1), ord=int(norm[1]), dim=1)


def test_l2_step_is_the_published_step(device):
    """Rice et al. 2020, attack_pgd: normalise, renorm the difference, clip to the range."""
    adv, grad, x = problem((8, 3, 16, 16), device=device)
    unit = grad / (grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10)
    d = (adv + 0.9 * unit - x).flatten(1).renorm(2, 0, 1.0).view_as(x)
    assert torch.allclose(ak.pgd_step(adv, grad, x, 1.0, 0.9, norm="l2"), (x + d).clamp(0, 1), rtol=0, atol=2e-7)


def test_l2_step_of_apgd_is_the_published_step(device):
    """Croce & Hein 2020, algorithm 1, where the authors' code divides by lengths."""
    adv, grad, x = problem((8, 3, 16, 16), device=device)
    old = adv + 0.05 * torch.randn_like(adv)
    size = lambda t: t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # noqa: E731

    def inside(v, eps):
        d = v - x
        return (x + d / (size(d) + 1e-12) * size(d).clamp(max=eps)).clamp(0, 1)

    for eps, step, share in itertools.product((0.5, 3.0), (1.0, 0.1), (1.0, 0.75)):
        z = inside(adv + step * grad / (size(grad) + 1e-12), eps)
        expected = inside(adv + (z - adv) * share + (adv - old) * (1 - share), eps)
        got = ak.apgd_step(adv, old, grad, x, eps, step, share, norm="l2")
        assert torch.allclose(got, expected, rtol=0, atol=4e-7) and length(got - x, "l2").max() <= eps + 1e-6
        assert same_bits(got, ak.apgd_step(adv, old, -grad, x, eps, step, share, norm="l2", descend=True))


def nearest_in_l1_ball_and_box(v, x, eps, low, high):
    """By plain bisection in fp64 on the multiplier of the ball."""
    v, x = v.double(), x.double()
    below, above = torch.zeros(len(v)).double(), (v - x).abs().flatten(1).amax(1)

    def at(multiplier):
        d = (v - x).sign() * ((v - x).abs() - multiplier.view(-1, *[1] * (v.ndim - 1))).clamp(min=0)
        return (x + d).clamp(low, high)

    for _ in range(200):
        middle = (below + above) / 2
        outside = length(at(middle) - x, "l1") > eps
        below, above = torch.where(outside, middle, below), torch.where(outside, above, middle)
    return torch.where((length(v.clamp(low, high) - x, "l1") <= eps).view(-1, 1, 1, 1), v.clamp(low, high), at(above))


@pytest.mark.parametrize("spread", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("eps", [0.01, 1.0, 12.0, 60.0])
def test_l1_projection_is_the_nearest_point_of_ball_and_range(eps, spread):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(16, 3, 9, 9, generator=g)
    x[0], x[1], x[2, 0] = 0.0, 1.0, 0.0
    v = x + spread * torch.randn(x.shape, generator=g) ** 3
    v[3, 1] = x[3, 1] + 0.25  # ties
    for dtype in (torch.float32, torch.float64):
        check_l1_projection(v.to(dtype), x.to(dtype), eps)


def check_l1_projection(v, x, eps):
    """To the rounding of the distances: lambda is one of them."""
    got, expected = ak.project(v, x, eps, norm="l1"), nearest_in_l1_ball_and_box(v, x, eps, 0.0, 1.0)
    unit = torch.finfo(v.dtype).eps * (v - x).abs().flatten(1).amax(1).clamp(min=1).double()
    assert ((got - expected).abs().flatten(1).amax(1) <= 2 * unit).all()
    assert (length(got - x, "l1") <= eps + x[0].numel() * unit).all() and got.min() >= 0 and got.max() <= 1


def test_l1_projection_where_newton_does_not_go_straight():
    """Distances over many orders of magnitude, rooms that cut some of them off: the search is bracketed and ends."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(400, 1, 5, 13, generator=g) ** 8
    v = x + 10 ** (8 * torch.rand(x.shape, generator=g) - 6)
    for eps, dtype in itertools.product((1e-5, 1e-2, 3.0), (torch.float32, torch.float64)):
        check_l1_projection(v.to(dtype), x.to(dtype), eps)


@both_norms
def test_steps_end_on_the_sphere_or_inside(norm, device):
    adv, grad, x = problem((6, 3, 16, 16), device=device)
    wide = {"clip_min": -9.0, "clip_max": 9.0}
    eps = torch.tensor([0.0, 1e-3, 0.1, 1.0, 1e3, math.inf], device=device)
    moved = ak.pgd_step(adv, grad, x, eps, 2.0, norm=norm, sparsity=None, **wide)
    away, unbound = length(moved - x, norm), length(adv + 2 * grad / length(grad, norm).view(-1, 1, 1, 1) - x, norm)
    assert torch.allclose(away, torch.minimum(eps.double(), unbound), rtol=1e-4)
    assert torch.equal(moved[0], x[0])


# --- points far away ---


def nearest_exactly(v, x, eps, low, high):
    """The nearest point of l1 ball and range to one sample, as a way from x, in fractions. Distances are rounded."""
    ways = []
    for distance, clean in zip((v - x).flatten().tolist(), x.flatten().tolist(), strict=True):
        d, b = Fraction(distance), Fraction(clean)
        ways.append((abs(d), max(Fraction(0), high - b if d > 0 else b - low), 1 if d > 0 else -1))

    def kept(multiplier):
        return sum(min(max(m - multiplier, 0), room) for m, room, _ in ways)

    multiplier = Fraction(0)
    if kept(multiplier) > eps:
        knots = sorted({0, *(m for m, _, _ in ways), *(max(0, m - room) for m, room, _ in ways)})
        end = next(i for i, knot in enumerate(knots) if kept(knot) <= eps)
        before, after = knots[end - 1], knots[end]
        multiplier = before + (kept(before) - eps) * (after - before) / (kept(before) - kept(after))
    return [float(sign * min(max(m - multiplier, 0), room)) for m, room, sign in ways]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e2, 1e4, 1e6, 1e8, 1e20, 3e38])
def test_l1_projection_of_points_far_away(far, dtype, device):
    """Where one unit in the last place of the distance is more than the ball, and ties decide."""
    g = torch.Generator().manual_seed(0)
    far = far**8 if dtype == torch.float64 and far > 1e8 else far
    x = torch.rand(4, 1, 4, 5, generator=g).to(device, dtype)
    v = x + 0.1
    v.view(4, -1)[:3, 4:16] = far * torch.linspace(1 - 1e-6, 1, 12, dtype=dtype, device=device)
    v.view(4, -1)[1, 8:] = far
    v[2] = -v[2]
    for eps in (0.0, 1e-3, 1.0, 7.0):
        got = ak.project(v, x, eps, norm="l1")
        unit = torch.finfo(dtype).eps
        assert got.min() >= 0 and got.max() <= 1
        assert (length(got - x, "l1") <= eps + x[0].numel() * unit).all(), eps
        expected = [nearest_exactly(a, b, Fraction(eps), 0, 1) for a, b in zip(v, x, strict=True)]
        way = torch.tensor(expected, dtype=torch.float64, device=device).view_as(x)
        assert (got.double() - x.double() - way).abs().max() <= max(1.0, 0.1 * eps) * unit, eps
        with ak.backend("reference"):
            assert same_within_ulps(got, ak.project(v, x, eps, norm="l1"), x)
    per_sample = torch.tensor([0.0, 0.5, 1e30, 2.0], device=device, dtype=dtype)
    whole = ak.project(v, x, per_sample, norm="l1")
    for i, eps in enumerate(per_sample.tolist()):
        assert same_bits(whole[i : i + 1], ak.project(v[i : i + 1], x[i : i + 1], eps, norm="l1"))


@both_norms
def test_fp64_distances_whose_squares_leave_the_range(norm, device):
    x = torch.full((2, 1, 2, 3), 0.5, dtype=torch.float64, device=device)
    v = x.clone()
    v[0] += torch.tensor([1e200, -1e200, 0.0], device=device, dtype=torch.float64)
    v[1] += torch.tensor([1e308, 1e308, 1e308], device=device, dtype=torch.float64)
    wide = {"clip_min": -math.inf, "clip_max": math.inf}
    for eps in (1.0, 1e-5, 1e100):
        got = ak.project(v, x, eps, norm=norm, **wide)
        # Equal distances of equal shares, or of all but what fp64 can tell from nothing.
        assert (length(got - x, norm) <= eps * (1 + 1e-12) + 1e-15).all(), eps
        expected = eps / 2 if norm == "l2" else eps / 4
        assert torch.allclose(got[0, 0, :, 0] - 0.5, torch.full_like(got[0, 0, :, 0], expected), rtol=1e-12, atol=1e-15)
        with ak.backend("reference"):
            assert same_within_ulps(got, ak.project(v, x, eps, norm=norm, **wide), x)


@both_norms
def test_starts_in_huge_balls(norm, device):
    x, key = torch.rand(3, 2, 4, 4, device=device), torch.tensor([1, 0], device=device)
    for eps in (0.0, 1e30, 1e38):
        start = ak.random_start(x, eps, norm=norm, key=key)
        assert start.isfinite().all() and start.min() >= 0 and start.max() <= 1
        assert eps or torch.equal(start, x)


# --- sparse steps ---


def slide(adv, grad, step, largest, low=0.0, high=1.0):
    """Entry by entry, the largest first, until the step is used up; for gradients without ties."""
    moved = adv.double().flatten(1).clone()
    for row, slopes in zip(moved, grad.double().flatten(1), strict=True):
        left = step
        for i in slopes.abs().argsort(descending=True).tolist():
            room = float(high - row[i] if slopes[i] > 0 else row[i] - low)
            way = min(step / largest, max(room, 0.0), left) if slopes[i] != 0 else 0.0
            row[i] += way * float(slopes[i].sign())
            left -= way
    return moved.view_as(adv)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(5, 3, 9, 9), (4, 10), (3, 1, 1, 1)], ids=str)
def test_sparse_steps_are_the_published_ones(shape, sparsity, device):
    """SLIDE: equal shares for all at or above the quantile; where the range is in the way, for the next ones."""
    adv, grad, x = problem(shape, device=device)
    adv.flatten()[::3], adv.flatten()[1::5] = 0.0, 1.0
    entries = adv[0].numel()
    largest = int((torch.arange(entries) >= sparsity * (entries - 1)).sum())
    for step, dtype in itertools.product((0.0, 0.3, 4.0, 1e3), (torch.float32, torch.float64)):
        point, slope = adv.to(dtype), grad.to(dtype)
        options = {"norm": "l1", "sparsity": sparsity}
        up = ak.pgd_step(point, slope, point, math.inf, step, **options)
        assert torch.allclose(up.double(), slide(point, slope, step, largest), rtol=0, atol=3e-7)
        down = ak.pgd_step(point, slope, point, math.inf, step, descend=True, **options)
        assert torch.equal(down, ak.pgd_step(point, -slope, point, math.inf, step, **options))
    free = ak.pgd_step(adv, grad, adv, math.inf, 2.0, clip_min=-9.0, clip_max=9.0, **options)
    nonzero = (grad.flatten(1) != 0).sum(1).clamp(max=largest)
    assert torch.equal((free != adv).flatten(1).sum(1), nonzero)


@pytest.mark.parametrize("shape", [(6, 3, 9, 9), (5, 10), (3, 1, 1, 1)], ids=str)
def test_l1_steps_of_apgd_are_the_published_ones(shape, device):
    """Entry by entry: all from the threshold on, ties with it among them, none that is 0; then the nearest point."""
    adv, grad, x = problem(shape, device=device)
    if adv[0].numel() > 1:
        grad[0], grad[1] = torch.full_like(grad[0], -2.0), 0.0
        grad[2].view(-1)[::2] = 0.0  # fewer than move
        grad[3].view(-1)[:8] = torch.tensor([5.0, 5.0, -5.0, 7.0, 5.0, 1e-30, -5.0, 0.0])
    entries = adv[0].numel()
    counts = torch.tensor([1, 3, entries, 3, 2, entries // 2][: len(adv)], device=device).clamp(1, entries)
    for step, eps in itertools.product((0.0, 0.3, 12.0), (0.5, 4.0)):
        moved = adv.double().flatten(1)
        for row, slopes, count in zip(moved, grad.double().flatten(1), counts.tolist(), strict=True):
            chosen = (slopes.abs() >= slopes.abs().sort(descending=True).values[count - 1]) & (slopes != 0)
            row += step * slopes.sign() * chosen / max(1, int(chosen.sum()))
        expected = moved.view(shape)
        if adv.ndim == 4:
            expected = nearest_in_l1_ball_and_box(expected, x, eps, 0.0, 1.0)
            got = ak.apgd_step(adv, x, grad, x, eps, step, 0.5, norm="l1", largest=counts)
            assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6)
            assert length(got - x, "l1").max() <= eps + 1e-5
        else:
            wide = {"clip_min": -99.0, "clip_max": 99.0}
            got = ak.apgd_step(adv, x, grad, x, math.inf, step, 0.5, norm="l1", largest=counts, **wide)
            assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6)
        down = ak.apgd_step(adv, adv, -grad, x, eps, step, 1.0, norm="l1", largest=counts, descend=True)
        assert adv.ndim != 4 or same_bits(down, got)
    one = ak.apgd_step(adv, x, grad, x, 1.0, 0.3, 1.0, norm="l1", largest=1)
    assert same_bits(one, ak.apgd_step(adv, x, grad, x, 1.0, 0.3, 1.0, norm="l1", largest=torch.ones_like(counts)))


def test_sparse_steps_share_the_last_place_among_ties(device):
    x = torch.full((1, 2, 2, 3), 0.5, device=device)
    grad = torch.tensor([3.0, -3.0, 3.0, 9.0, 1.0, 0.0, -3.0, 0.5, 0.0, 0.0, 0.0, 0.0], device=device).view_as(x)
    # Two whole shares for two of them: the largest has one, the other is divided by four.
    moved = ak.pgd_step(x, grad, x, 9.0, 0.4, norm="l1", sparsity=10 / 11) - x
    expected = torch.tensor([0.05, -0.05, 0.05, 0.2, 0.0, 0.0, -0.05, 0.0, 0.0, 0.0, 0.0, 0.0], device=device)
    assert torch.allclose(moved.flatten(), expected, rtol=0, atol=1e-7)
    ones = torch.rand(2, 3, 8, 8, device=device)
    for dtype in FLOATS:  # many ties
        grad = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 8).round().to(device, dtype)
        step = {"norm": "l1", "sparsity": 0.8}
        got = ak.pgd_step(ones, grad, ones, 5.0, 3.0, **step)
        flipped = ak.pgd_step(ones.flip(-1), grad.flip(-1), ones.flip(-1), 5.0, 3.0, **step)
        assert torch.allclose(got, flipped.flip(-1), rtol=0, atol=1e-6)  # no entry is first
        last = ak.pgd_step(to_layout(ones, True), to_layout(grad, True), ones, 5.0, 3.0, **step)
        assert same_within_ulps(last, got, ones)
        with ak.backend("reference"):
            assert same_within_ulps(got, ak.pgd_step(ones, grad, ones, 5.0, 3.0, **step), ones)


def test_sparse_steps_that_cannot_move(device):
    """All entries blocked; a gradient that is zero or not finite; samples that are not active."""
    x, inf, nan = torch.ones(5, 1, 4, 4, device=device), math.inf, math.nan
    grad = torch.rand(5, 1, 4, 4, device=device) + 0.1
    assert torch.equal(ak.pgd_step(x, grad, x, 1.0, 0.5, norm="l1"), x)
    point = x * 0.5
    grad[0], grad[1, 0, 0, 0], grad[2, 0, 3, 3] = 0.0, nan, inf
    active = torch.tensor([True, True, True, False, True], device=device)
    moved = ak.pgd_step(point, grad, point, 1.0, 0.5, norm="l1", active=active)
    assert torch.equal(moved[:4], point[:4]) and not torch.equal(moved[4], point[4])
    outside = point.clone()
    outside[4, 0, 0] = 1.5  # no way up, and no way wasted on it
    moved = ak.pgd_step(outside, grad, point, inf, 0.5, norm="l1", clip_max=1.0)
    assert torch.allclose((moved - outside)[4, 0, 1:].sum(), torch.tensor(0.5, device=device))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, "0.9", True, 99])
def test_sparsity_is_checked(wrong):
    adv, grad, x = problem((2, 3, 4, 4))
    for call in (lambda: ak.pgd_step(adv, grad, x, 1.0, 1.0, norm="l1", sparsity=wrong), lambda: ak.PGD(1.0, norm="l1", sparsity=wrong)):  # fmt: skip  # noqa: E501
        with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\], or None"):
            call()


# --- gradients of any size ---


@both_norms
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_size_of_the_gradient_does_not_matter(dtype, norm, device):
    """Powers of two are exact, so the bits are the same: from subnormal to just finite."""
    adv, grad, x = problem((4, 3, 16, 16), device=device)
    grad = grad.bfloat16().half().float()
    expected = ak.pgd_step(adv, grad, x, *RADII[norm], norm=norm)
    powers = {torch.float16: (-4, 4), torch.float64: (-1000, 1000)}.get(dtype, (-100, 120))
    for power in powers:
        scaled = torch.ldexp(grad.double(), torch.tensor(float(power), device=device).double())
        got = ak.pgd_step(adv, scaled.to(dtype), x, *RADII[norm], norm=norm)
        tolerance = 0 if dtype == torch.float32 else 4e-3 if dtype == torch.bfloat16 else 3e-7
        assert (got - expected).abs().max() <= tolerance, power
    subnormal = ak.pgd_step(adv, (grad * 0 + 1e-45), x, *RADII[norm], norm=norm)
    assert torch.allclose(subnormal, ak.pgd_step(adv, torch.ones_like(grad), x, *RADII[norm], norm=norm), atol=1e-6)


@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_move_nothing(dtype, norm, device):
    adv, grad, x = problem((4, 3, 8, 8), dtype=dtype, device=device)
    grad[0], grad[1, 1, 1, 1], grad[2, 0, 0, 0] = 0.0, float("nan"), float("inf")
    moved = ak.pgd_step(adv, grad, x, 100.0, 0.5, norm=norm)
    assert torch.equal(moved[:3], adv[:3]) and not torch.equal(moved[3], adv[3])
    moved = ak.apgd_step(adv, adv, grad, x, 100.0, 0.5, 0.75, norm=norm, largest=9)
    assert torch.equal(moved[:3], adv[:3]) and not torch.equal(moved[3], adv[3])
    old = adv - 0.01
    moved = ak.apgd_step(adv, old, grad, x, 100.0, 0.5, 0.75, norm=norm, largest=9)
    carried = (adv + 0.0025).clamp(0, 1) if norm == "l2" else adv
    assert torch.allclose(moved[:3], carried[:3], rtol=0, atol=1e-7)


@both_norms
def test_a_pixel_that_is_no_number_does_not_move_the_others(norm, device):
    adv, grad, x = problem((3, 3, 8, 8), device=device)
    adv[0, 0, 0, 0], adv[1, 0, 0, 0] = float("nan"), float("inf")
    got = ak.project(adv, x, 0.01, norm=norm)
    assert got[0, 0, 0, 0].isnan() and got[1, 0, 0, 0] == 1.0
    assert torch.equal(got[:2].flatten(1)[:, 1:], adv[:2].flatten(1)[:, 1:])
    assert length(got[2:] - x[2:], norm) <= 0.0100001


@both_norms
def test_empty_batches_and_single_pixels(norm, device):
    key = ak.noise_key(device)
    for shape, name in itertools.product([(0, 3, 8, 8), (2, 0, 4, 4), (2, 3, 0, 5)], ["native", "reference"]):
        with ak.backend(name):
            results = every_result(*problem(shape, device=device), 1.0, 1.0, norm, key=key)
        assert all(t.shape == shape for t in results.values())
    x = torch.tensor([[0.5], [0.5]], device=device)
    grad = torch.tensor([[-3.0], [1e-20]], device=device)
    assert torch.allclose(ak.pgd_step(x, grad, x, 0.2, 0.3, norm=norm), x + 0.2 * grad.sign())


def test_in_place_out_and_cast(device):
    for norm, (shape, layout) in itertools.product(RADII, [((4, 3, 8, 8), False), ((4, 3, 8, 8), True)]):
        adv, grad, x = problem(shape, device=device)
        adv = to_layout(adv, layout)
        cast = to_layout(torch.empty_like(x, dtype=torch.bfloat16), not layout)
        expected = ak.pgd_step(adv, grad, x, *RADII[norm], norm=norm, cast=cast)
        assert same_bits(cast, expected.bfloat16())
        moved, inside, start, key = adv.clone(), adv.clone(), x.clone(), ak.noise_key(device)
        version = moved._version
        assert ak.pgd_step(moved, grad, x, *RADII[norm], norm=norm, out=moved) is moved and same_bits(moved, expected)
        assert moved._version > version
        ak.project(inside, x, 0.1, norm=norm, out=inside)
        assert same_bits(inside, ak.project(adv, x, 0.1, norm=norm))
        ak.random_start(start, 0.1, norm=norm, key=key, out=start)
        assert same_bits(start, ak.random_start(x, 0.1, norm=norm, key=key))


# --- random starts ---

WIDE = {"clip_min": -1e9, "clip_max": 1e9}


@both_norms
def test_starts_are_uniform_in_the_ball(norm):
    """Moments of 20,000 points, each to five standard errors."""
    count, eps, p = 20_000, 3.0, int(norm[1])
    shape = (3, 5) if norm == "l2" else (2, 7)  # planes that do not end on a group of four pixels
    d = ak.random_start(torch.zeros(count, *shape), eps, norm=norm, key=torch.tensor([5, 0]), **WIDE)
    d = d.double().flatten(1)
    dims = d.shape[1]

    def close(values, mean):
        assert abs(values.mean() - mean) < 5 * values.std() / math.sqrt(values.numel())

    away = length(d, norm)
    assert (away <= eps * (1 + 1e-6)).all()
    for i in range(dims):
        close(d[:, i], 0.0)
        close(d[:, i] * d[:, (i + 1) % dims], 0.0)
        close(d[:, i].abs() ** p, eps**p / (dims + p) if norm == "l2" else eps / (dims + 1))
    close(away**p, eps**p * dims / (dims + p))
    rank = (away / eps) ** dims  # uniform
    close(rank, 1 / 2)
    close(rank**2, 1 / 3)
    assert torch.histc(rank, 10, 0, 1).sub(count / 10).abs().max() < 5 * math.sqrt(count * 0.09)
    # The direction: fourth moments tell a normal number, or a Laplace one, from any other.
    unit = d / away[:, None]
    fourth = 3 / (dims * (dims + 2)) if norm == "l2" else 24 / math.prod(range(dims, dims + 4))
    close(unit[:, 0] ** 4, fourth)


@both_norms
def test_starts_belong_to_their_samples(norm, device):
    """Whatever the batch, its order, or the memory format."""
    x = torch.rand(6, 3, 5, 5, device=device)
    key = torch.tensor([9, 100], device=device)
    whole = ak.random_start(x, 1.0, norm=norm, key=key)
    order = torch.tensor([4, 0, 5, 1], device=device)
    assert same_bits(ak.random_start(x[order], 1.0, norm=norm, key=key, ids=100 + order), whole[order])
    second = key + torch.tensor([0, 3], device=device)
    assert same_bits(ak.random_start(x[3:], 1.0, norm=norm, key=second), whole[3:])
    assert same_bits(ak.random_start(to_layout(x, True), 1.0, norm=norm, key=key), to_layout(whole, True))
    assert not torch.equal(ak.random_start(x, 1.0, norm=norm, key=key, draw=1), whole)


# --- gradients ---


def away_from_kinks(shape):
    g = torch.Generator().manual_seed(3)
    x = 0.1 + 0.8 * torch.rand(shape, generator=g, dtype=torch.float64)
    adv = x + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
    return adv, torch.randn(shape, generator=g, dtype=torch.float64), x


@both_norms
def test_gradients(norm):
    adv, grad, x = away_from_kinks((4, 2, 3, 2))
    grad[3] = 0.0
    eps = torch.tensor([0.3, 0.5, 50.0, 0.6], dtype=torch.float64) * RADII[norm][0]
    step = torch.tensor([0.3, 0.9, 0.2, 0.4], dtype=torch.float64)
    active, key = torch.tensor([True, True, True, True]), torch.tensor([11, 0])
    inputs = [t.requires_grad_() for t in (adv, x, eps, step)]

    def stepped(adv, x, eps, step, sparsity=None):
        return ak.pgd_step(adv, grad, x, eps, step, norm=norm, sparsity=sparsity, active=active, descend=True)

    def carried(way, adv, x, eps, step):
        rest = {"largest": 5, "descend": True, "active": active}
        return ak.apgd_step(adv, adv - way, grad, x, eps, step, 0.6, norm=norm, **rest)

    for function, arguments in (
        (stepped, inputs),
        (partial(stepped, sparsity=0.7), inputs),
        (partial(carried, 0.1 * grad), inputs),
        (lambda v, x, eps: ak.project(v, x, eps, norm=norm), inputs[:3]),
        (lambda x, eps: ak.random_start(x, eps, norm=norm, key=key), inputs[1:3]),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@both_norms
def test_linf_projection_gradients_and_equal_points(norm):
    adv, _, x = away_from_kinks((2, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda v, x: ak.project(v, x, 0.1), [adv.requires_grad_(), x.requires_grad_()])
    # At x itself the distance has no gradient; the projection has.
    point = x.detach().clone().requires_grad_()
    ak.project(point, x.detach(), 1.0, norm=norm).sum().backward()
    assert torch.equal(point.grad, torch.ones_like(point))


@both_norms
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_with_gradients_are_the_results(dtype, norm, device):
    adv, grad, x = problem((3, 3, 8, 8), dtype=dtype, device=device)
    key = ak.noise_key(device)
    plain = every_result(adv, grad, x, *RADII[norm], norm, key=key)
    tracked = every_result(adv.requires_grad_(), grad, x.requires_grad_(), *RADII[norm], norm, key=key)
    for name, t in tracked.items():
        assert t.requires_grad and same_within_ulps(t.detach(), plain[name], x.detach())


# --- what PyTorch asks of an operator ---


@both_norms
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, norm, device):
    adv, grad, x = problem((2, 3, 4, 4), device=device)
    for t in (adv, grad, x) if requires_grad else ():
        t.requires_grad_()
    number, rows, key = int(norm == "l1") + 1, torch.rand(2, device=device), ak.noise_key(device)
    clip = (0.0, None, 1.0, torch.rand(3, device=device))
    noise = (key, torch.arange(2, device=device), 1)
    out, active = torch.empty(2, 3, 4, 4, device=device), torch.tensor([True, False], device=device)
    torch.library.opcheck(OPS.random_start_norm.default, (x, number, 0.1, None, *clip, *noise, out))
    torch.library.opcheck(
        OPS.pgd_step_norm.default,
        (adv, grad, x, number, 0.0, rows, 0.1, None, *clip, True, active, out, out.bfloat16(), 3 * (norm == "l1")),
    )
    counts = torch.tensor([3, 40], device=device)
    numbers, results = (0.0, rows, 0.1, None, 0.75, None), (out, out.bfloat16())
    torch.library.opcheck(
        OPS.apgd_step_norm.default,
        (adv, adv.flip(0), grad, x, number, *numbers, *clip, True, active, *results, counts),
    )
    torch.library.opcheck(OPS.project.default, (adv, x, number, 0.0, rows, *clip, out))


@both_norms
def test_compile_fullgraph(norm, device):
    adv, grad, x = problem((2, 3, 8, 8), device=device)
    key = ak.noise_key(device)

    def everything(adv, grad, x, key):
        return [t * 2 for t in every_result(adv, grad, x, *RADII[norm], norm, key=key).values()]

    compiled = torch.compile(everything, fullgraph=True)
    for a, b in zip(compiled(adv, grad, x, key), everything(adv, grad, x, key), strict=True):
        assert same_bits(a, b)
    adv.requires_grad_()
    loss = lambda adv: (ak.pgd_step(adv, grad, x, *RADII[norm], norm=norm) ** 2).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(loss(adv), adv)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(adv), adv)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_door(device):
    """Whoever calls the operator itself must not make a kernel read or write outside of a tensor."""
    adv, grad, x = problem((2, 3, 4, 4), device=device)
    clip, out = (0.0, None, 1.0, None), torch.empty_like(adv)
    for number in (-1, 3):
        with pytest.raises(RuntimeError, match=f"norm is {number}"):
            OPS.project(adv, x, number, 0.1, None, *clip, out)
    with pytest.raises(RuntimeError, match="norm is 0"):
        OPS.pgd_step_norm(adv, grad, x, 0, 0.1, None, 0.1, None, *clip, False, None, out, None, 0)
    for largest in (-1, 49, 2**62):
        with pytest.raises(RuntimeError, match=f"largest is {largest}, expected 0 to 48"):
            OPS.pgd_step_norm(adv, grad, x, 2, 0.1, None, 0.1, None, *clip, False, None, out, None, largest)
    rest = 0.1, None, 0.1, None, 0.75, None, *clip, False, None, out, None
    with pytest.raises(RuntimeError, match="norm is 0"):
        OPS.apgd_step_norm(adv, adv, grad, x, 0, *rest, None)
    with pytest.raises(RuntimeError, match="largest must be given in l1"):
        OPS.apgd_step_norm(adv, adv, grad, x, 2, *rest, None)
    with pytest.raises(RuntimeError, match="largest is torch.int64 .3."):
        OPS.apgd_step_norm(adv, adv, grad, x, 2, *rest, torch.arange(3, device=device))
    OPS.apgd_step_norm(adv, adv, grad, x, 2, *rest, torch.tensor([-(2**62), 2**62], device=device))
    assert torch.equal(
        out, ak.apgd_step(adv, adv, grad, x, 0.1, 0.1, 1.0, norm="l1", largest=torch.tensor([1, 48]).to(device))
    )
    with pytest.raises(RuntimeError, match="grad is"):
        OPS.pgd_step_norm(adv, grad[:1], x, 1, 0.1, None, 0.1, None, *clip, False, None, out, None, 0)
    with pytest.raises(RuntimeError, match="eps is"):
        OPS.project(adv, x, 1, 0.1, torch.ones(1, device=device), *clip, out)
    with pytest.raises(ValueError, match="out shares memory with x"):
        ak.project(adv[:1], x[:1], 0.1, norm="l2", out=x.flatten()[16:64].view(1, 3, 4, 4))


# --- attacks ---


def plain_attack(model, x, y, eps, steps, step, norm, start):
    """PGD as people write it; l1 with the independent projection."""
    adv = start.clone()
    for _ in range(steps):
        leaf = adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        adv = adv + step * grad / length(grad, norm).view(-1, 1, 1, 1)
        if norm == "l2":
            shrink = (eps / length(adv - x, norm)).clamp(max=1).view(-1, 1, 1, 1)
            adv = (x + (adv - x) * shrink).clamp(0, 1)
        else:
            adv = nearest_in_l1_ball_and_box(adv, x, eps, 0.0, 1.0)
    return adv


@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.5), ("l1", 12.0)])
@pytest.mark.parametrize("random", [False, True])
def test_attacks(norm, eps, random):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    model = model.double()
    x, y, key = torch.rand(20, 3, 8, 8).double(), torch.randint(5, (20,)), torch.tensor([3, 0])
    attack = ak.PGD(eps, 2.5 * eps / 5, steps=5, norm=norm, random_start=random, sparsity=None)
    adv = attack(model, x, y, key=key)
    start = ak.random_start(x, eps, norm=norm, key=key) if random else x
    expected = plain_attack(model, x, y, eps, 5, 2.5 * eps / 5, norm, start)
    assert torch.allclose(adv, expected, rtol=0, atol=1e-9)
    last = attack.last_gradient(model, x, y, key=key)
    assert torch.equal(adv, ak.pgd_step(last.adv, last.grad, x, eps, 0.5 * eps, norm=norm, sparsity=None))
    one = ak.FGSM(eps, norm=norm, sparsity=None)(model, x, y)
    assert torch.allclose(one, plain_attack(model, x, y, eps, 1, eps, norm, x), rtol=0, atol=1e-9)
    towards = ak.PGD(eps, steps=5, norm=norm, targeted=True)(model, x, y, key=key)
    assert torch.nn.functional.cross_entropy(model(towards), y) < torch.nn.functional.cross_entropy(model(x), y)


def test_sparse_attacks():
    """l1 steps by default: from 2 eps down to eps / 20, sparse; by keep="best", restarts and last_gradient too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    model = model.double()
    x, y, key, eps = torch.rand(9, 3, 8, 8).double(), torch.randint(5, (9,)), torch.tensor([3, 0]), 5.0
    attack = ak.PGD(eps, steps=4, norm="l1", sparsity=0.97)
    iterates = [ak.random_start(x, eps, norm="l1", key=key)]
    for size in (10.0, 7.5625, 2.6875, 0.25):
        leaf = iterates[-1].clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        moved = slide(iterates[-1], grad, size, 192 - math.ceil(0.97 * 191))
        iterates.append(nearest_in_l1_ball_and_box(moved, x, eps, 0.0, 1.0))
    assert torch.allclose(attack(model, x, y, key=key), iterates[-1], rtol=0, atol=1e-9)
    last = attack.last_gradient(model, x, y, key=key)
    assert torch.allclose(last.adv, iterates[-2], rtol=0, atol=1e-9) and attack.effective_step_size == 0.25
    per_sample = replace(attack, eps=torch.full((9,), eps).double())
    assert torch.allclose(per_sample(model, x, y, key=key), iterates[-1], rtol=0, atol=1e-9)
    losses = [torch.nn.functional.cross_entropy(model(adv), y, reduction="none") for adv in iterates]
    best = replace(attack, keep="best").run(model, x, y, key=key)
    assert torch.allclose(best.objective, torch.stack(losses).amax(0), rtol=1e-9)
    one = ak.FGSM(eps, norm="l1")(model, x, y)
    assert ((one - x).abs() > 1e-12).flatten(1).sum(1).min() >= 2 and length(one - x, "l1").max() <= eps + 1e-9


def test_attacks_name_their_norms():
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', 'l1', got 'L_2'; did you mean 'l2'"):
        ak.PGD(1.0, norm="L_2")
    with pytest.raises(ValueError, match="eps=1 covers all of"):
        ak.PGD(1.0)
    with pytest.raises(ValueError, match="eps must be finite"):
        ak.FGSM(math.inf, norm="l2")
