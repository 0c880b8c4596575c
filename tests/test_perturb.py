"""The l_inf perturbation operators: the same bits on every backend, exact gradients, and what PyTorch asks of an op."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends.reference.philox import philox4x32_10
from atlas_kernels.core import available_isas, force_isa
from operator_cases import SHAPES, Dispatched, apgd_step, label_start, problem, same_bits, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPS = torch.ops.atlas_kernels


def all_four(
    adv, grad, x, eps, step, radius, *, key, count=2, ids=None, active=None, descend=False, project=False, **clip
):
    """Every operator on one problem."""
    ball = {"x": x, "eps": eps} if project else {}
    step_options = {"active": active, "descend": descend, **clip}
    noise = {"key": key, "ids": ids, "draw": 3}
    return [
        ak.random_start(x, eps, **noise, **clip),
        label_start(x, grad, radius, **noise, **clip),
        ak.pgd_step(adv, grad, x, eps, step, **step_options),
        apgd_step(adv, grad, x, eps, step, **step_options),
        ak.sample_neighbours(adv, radius, count, **ball, **noise, **clip),
        ak.pgd_step_neighbours(adv, grad, x, eps, step, radius, count, project=project, **noise, **step_options),
        ak.pgd_step_neighbours(adv, grad, x, eps, step, radius, count, include_x=False, **noise, **step_options),
    ]


def check_against_reference(*args, **kwargs):
    got = all_four(*args, **kwargs)
    with ak.backend("reference"):
        expected = all_four(*args, **kwargs)
    names = "start", "label start", "step", "step of APGD", "neighbours", "both", "both without x"
    for name, a, b in zip(names, got, expected, strict=True):
        assert same_bits(a, b), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_shapes_and_dtypes(shape, dtype, device):
    adv, grad, x = problem(shape, dtype=dtype, device=device)
    check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(device), count=min(2, len(shape)))


@pytest.mark.parametrize("layouts", ["".join(p) for p in itertools.product("cl", repeat=3)])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 3)], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_bits_layouts(shape, layouts, grad_dtype, device):
    adv, grad, x = problem(shape, layouts=layouts, grad_dtype=grad_dtype, device=device)
    check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(device))


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_every_dtype_pair(dtype, grad_dtype, device):
    adv, grad, x = problem((2, 3, 9, 9), dtype=dtype, grad_dtype=grad_dtype, device=device, special=True)
    check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(device), project=True)


OPTIONS = [{"descend": True}, {"project": True}, {"count": 0}, {"count": 1}, {"count": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_options(options, device):
    adv, grad, x = problem((4, 3, 8, 9), device=device)
    check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(device), **options)


@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc"])
def test_bits_per_sample_and_per_channel(layouts, device):
    adv, grad, x = problem((4, 3, 8, 8), layouts=layouts, device=device)
    rows = [torch.rand(4, device=device) * 0.2 for _ in range(3)]
    low, high = torch.tensor([0.0, 0.1, -0.5], device=device), torch.tensor([1.0, 0.8, 2.0], device=device)
    active = torch.tensor([True, False, True, False], device=device)
    ids = torch.tensor([3, 1, 2**40, 3], device=device)
    key = ak.noise_key(device)
    clip = {"clip_min": low, "clip_max": high}
    check_against_reference(adv, grad, x, *rows, key=key, ids=ids, active=active, project=True, **clip)
    check_against_reference(adv, grad, x, *rows, key=key, active=active)
    check_against_reference(adv, grad, x, 0.1, 0.1, 0.1, key=key, clip_min=[0.0, 0.1, 0.2], clip_max=1.0)


def test_bits_where_values_are_special(device):
    for seed in range(4):
        adv, grad, x = problem((3, 3, 16, 17), special=True, seed=seed, device=device)
        check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(device), project=True)


@pytest.mark.parametrize("radius", [0.0, 2.0**-103, 2.0**-104, 1e-40, 1e30])
def test_bits_of_tiny_and_large_radii(radius, device):
    """Around zero, where the noise itself is seen: 2^-23 of a tiny radius is a denormal number, and not exact."""
    x = torch.zeros(2, 3, 16, 20, device=device)
    clip = {"clip_min": -1e38, "clip_max": 1e38}
    check_against_reference(x, x, x, radius, 0.0, radius, key=ak.noise_key(device), **clip)


def test_bits_above_the_size_where_results_are_streamed():
    """Larger than any last-level cache's half that we know of would be slow: streaming starts at half of this one's."""
    adv, grad, x = problem((24, 3, 256, 256))
    check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_bits_of_each_isa_and_thread_count(isa, threads, restored_isa_and_threads):
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    force_isa(isa)
    torch.set_num_threads(threads)
    for shape, dtype, layouts in [
        ((64, 3, 33, 31), torch.float32, "ccc"),
        ((8, 3, 32, 32), torch.float32, "ccc"),
        ((32, 3, 32, 32), torch.bfloat16, "lcl"),
        ((33, 5, 9, 9), torch.float64, "ccc"),
        ((16, 3, 24, 24), torch.float16, "lll"),
    ]:
        adv, grad, x = problem(shape, dtype=dtype, layouts=layouts, special=True)
        for project in (True, False):
            check_against_reference(adv, grad, x, 0.1, 0.03, 0.05, key=ak.noise_key(), project=project)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bits_of_anything(data):
    draw = data.draw
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 9)) for i in range(ndim))
    dtype, grad_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    layouts = "".join(draw(st.sampled_from("cl")) for _ in range(3))
    adv, grad, x = problem(shape, dtype=dtype, grad_dtype=grad_dtype, layouts=layouts, special=draw(st.booleans()))
    if ndim >= 3 and draw(st.booleans()):  # strides that the kernels do not take as they lie
        grad = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
        x = x[..., :1].expand(shape)
    number = st.floats(0, 2, width=32)
    seed = draw(st.integers(-(2**63), 2**63 - 1))
    check_against_reference(
        adv, grad, x, draw(number), draw(number), draw(number), key=torch.tensor([seed, 0]),
        count=draw(st.integers(0, 3)), descend=draw(st.booleans()), project=draw(st.booleans()),
    )  # fmt: skip


def test_a_step_is_the_textbook_step(device):
    """Against an independent statement with clamps instead of selects."""
    adv, grad, x = problem((8, 3, 32, 32), device=device)
    expected = torch.clamp(torch.max(torch.min(adv + 0.03 * grad.sign(), x + 0.1), x - 0.1), 0, 1)
    assert torch.equal(ak.pgd_step(adv, grad, x, 0.1, 0.03), expected)


def published_apgd_step(adv, old, grad, x, eps, step, share):
    """Croce & Hein 2020, algorithm 1, lines 7 and 8, with clamps."""
    inside = lambda v: torch.clamp(torch.max(torch.min(v, x + eps), x - eps), 0, 1)  # noqa: E731
    z = inside(adv + step * grad.sign())
    return inside(adv + share * (z - adv) + (1 - share) * (adv - old))


def test_a_step_of_apgd_is_the_published_step(device):
    adv, grad, x = problem((8, 3, 16, 16), device=device)
    old = adv + 0.3 * torch.randn_like(adv)
    for eps, step, share in itertools.product((0.1, 0.02), (0.2, 0.01), (1.0, 0.75, 0.0)):
        expected = published_apgd_step(adv, old, grad, x, eps, step, share)
        assert torch.equal(ak.apgd_step(adv, old, grad, x, eps, step, share), expected)
        down = ak.apgd_step(adv, old, -grad, x, eps, step, share, descend=True)
        assert torch.equal(down, expected)
    # Samples at different iterations share a batch.
    eps, step, share = (torch.linspace(low, 1.0, 8, device=device) for low in (0.02, 0.01, 0.0))
    whole = ak.apgd_step(adv, old, grad, x, eps, step, share)
    for i, (e, s, m) in enumerate(zip(*(t.tolist() for t in (eps, step, share)), strict=True)):
        one = ak.apgd_step(adv[i : i + 1], old[i : i + 1], grad[i : i + 1], x[i : i + 1], e, s, m)
        assert same_bits(whole[i : i + 1], one)


def test_a_step_of_apgd_in_place(device):
    adv, grad, x = problem((4, 3, 8, 8), device=device)
    expected = apgd_step(adv, grad, x, 0.1, 0.05)
    for name in ("adv", "old", "grad", "x"):
        given = {"adv": adv.clone(), "old": adv.flip((0, 1, 2, 3)), "grad": grad.clone(), "x": x.clone()}
        out = given[name]
        version = out._version
        assert ak.apgd_step(**given, eps=0.1, step_size=0.05, momentum=0.75, out=out) is out
        assert same_bits(out, expected) and out._version > version
    cast = to_layout(torch.empty_like(adv, dtype=torch.bfloat16), True)
    apgd_step(adv, grad, x, 0.1, 0.05, cast=cast)
    assert same_bits(cast, to_layout(expected.bfloat16(), True))


def test_without_gradient_only_momentum_moves(device):
    x = torch.full((2, 1, 2, 2), 0.5, device=device)
    grad = torch.zeros_like(x)
    grad[1] = float("nan")
    moved = ak.apgd_step(x + 0.1, x + 0.06, grad, x, 1.0, 0.5, 0.75)
    assert torch.allclose(moved, x + 0.11) and torch.equal(ak.apgd_step(x, x, grad, x, 1.0, 0.5, 0.75), x)


def test_pixels_without_gradient_do_not_move(device):
    adv, grad, x = problem((2, 3, 8, 8), device=device)
    grad[0], grad[1] = float("nan"), 0.0
    assert torch.equal(ak.pgd_step(adv, grad, x, 1.0, 0.5), adv)


def test_direction_of_a_tiny_fp64_gradient_survives(device):
    x = torch.full((1, 1, 2, 2), 0.5, device=device)
    grad = torch.full_like(x, 1e-300, dtype=torch.float64)
    assert (ak.pgd_step(x, grad, x, 0.1, 0.1) > x).all()


def test_neighbours_lie_in_their_balls(device):
    adv, _, x = problem((5, 3, 8, 8), device=device)
    z = ak.sample_neighbours(adv, 0.04, 3).view(3, *adv.shape)
    assert ((z - adv).abs() <= 0.04 + 1e-7).all() and (z >= 0).all() and (z <= 1).all()
    assert ((z - x).abs() > 0.1 + 1e-6).any()
    projected = ak.sample_neighbours(adv, 0.04, 3, x=x, eps=0.1).view(3, *adv.shape)
    assert ((projected - x).abs() <= 0.1 + 1e-7).all()


def test_in_place_and_out(device):
    adv, grad, x = problem((4, 3, 8, 8), device=device)
    expected = ak.pgd_step(adv, grad, x, 0.1, 0.03)
    for like in (adv, adv.contiguous(memory_format=torch.channels_last)):
        out = torch.empty_like(like)
        assert ak.pgd_step(adv, grad, x, 0.1, 0.03, out=out) is out and same_bits(out, expected)
    for layout in (False, True):
        moved = to_layout(adv.clone(), layout)
        version = moved._version
        ak.pgd_step(moved, grad, x, 0.1, 0.03, out=moved)
        assert same_bits(moved, expected) and moved._version > version
    start, labelled = x.clone(), x.clone()
    key = ak.noise_key(device)
    assert same_bits(ak.random_start(start, 0.1, key=key, out=start), ak.random_start(x, 0.1, key=key))
    expected = label_start(x, grad, 0.1, key=key)
    assert label_start(labelled, grad, 0.1, key=key, out=labelled) is labelled and same_bits(labelled, expected)


def test_cast_is_the_result_in_another_dtype_and_layout(device):
    adv, grad, x = problem((4, 3, 8, 8), device=device)
    for dtype, channels_last in itertools.product((torch.bfloat16, torch.float16, torch.float32), (False, True)):
        cast = to_layout(torch.empty_like(adv, dtype=dtype), channels_last)
        out = ak.pgd_step(adv, grad, x, 0.1, 0.03, cast=cast)
        assert same_bits(cast, out.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_buffer_of_the_network(dtype, channels_last, device):
    adv, grad, x = problem((3, 3, 8, 8), device=device)
    key = ak.noise_key(device)
    expected = ak.pgd_step_neighbours(adv, grad, x, 0.1, 0.03, 0.02, 2, key=key)
    buffer = to_layout(torch.empty((12, 3, 8, 8), dtype=dtype, device=device), channels_last)
    ak.pgd_step_neighbours(adv, grad, x, 0.1, 0.03, 0.02, 2, key=key, out=buffer)
    assert same_bits(buffer, to_layout(expected.to(dtype), channels_last))


def test_iterate_and_images_may_lie_in_the_buffer(device):
    adv, grad, x = problem((3, 3, 8, 8), device=device)
    key = ak.noise_key(device)
    buffer = torch.cat([x, adv, adv, adv])
    got = ak.pgd_step_neighbours(buffer[3:6], grad, buffer[:3], 0.1, 0.03, 0.02, 2, key=key, out=buffer)
    assert same_bits(got, ak.pgd_step_neighbours(adv, grad, x, 0.1, 0.03, 0.02, 2, key=key))


def test_empty_batch(device):
    adv, grad, x = problem((0, 3, 8, 8), device=device)
    for got in all_four(adv, grad, x, 0.1, 0.1, 0.1, key=ak.noise_key(device)):
        assert got.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(4, 0, 2, 2), (4, 3, 0, 2), (4, 0)])
def test_images_without_pixels(device, shape):
    adv, grad, x = (torch.empty(shape, device=device) for _ in range(3))
    for got in all_four(adv, grad, x, 0.1, 0.1, 0.1, key=ak.noise_key(device)):
        assert got.shape[1:] == shape[1:] and len(got) % 4 == 0


# --- the start from the noise of the label ---


@pytest.mark.parametrize("share", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3), (0.1, 0.5), (0.0, 1.0)], ids=str)
def test_share_and_sign_are_drawn_once_a_call(share, device):
    x, labels = torch.zeros(16, 3, 32, 32, device=device), torch.arange(16, device=device) % 2
    of_label = torch.tensor([3.0, 5.0], device=device).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    wide, shares, signs = {"clip_min": -9.0, "clip_max": 9.0}, [], set()
    for draw in range(24):
        key = torch.tensor([99, draw], device=device)
        noise = ak.label_noise_start(x, labels, of_label, 0.5, share=share, key=key, draw=draw, **wide)
        replaced = noise.abs() <= 0.5
        kept = noise[~replaced]
        assert torch.equal(kept.abs(), of_label[labels][~replaced])
        signs |= set(kept.sign().unique().tolist())
        assert kept.numel() == 0 or len(kept.sign().unique()) == 1
        found = float(replaced.float().mean())
        assert share[0] - 0.01 < found < share[1] + 0.01
        assert (replaced.flatten(1).float().mean(1) - found).abs().max() < 0.05
        shares.append(found)
        if found > 0.05:
            u = noise[replaced] / 0.5
            assert u.min() < -0.98 and u.max() > 0.98
            assert abs(u.mean()) < 5 / (3 * u.numel()) ** 0.5 and abs((u * u).mean() - 1 / 3) < 0.02
    assert signs == ({-1.0, 1.0} if share[1] < 1.0 or share[0] < 1.0 else set())
    assert max(shares) - min(shares) > 0.6 * (share[1] - share[0]) - 0.02


def test_a_label_start_is_its_documented_counter(device):
    key, x = torch.tensor([0x123456789ABCDEF0, 41], device=device), torch.zeros(3, 2, 5, 3, device=device)
    labels, of_label = torch.tensor([1, 1, 0], device=device), torch.rand(2, 2, 5, 3, device=device)
    got = ak.label_noise_start(x, labels, of_label, 0.25, share=(0.25, 0.75), key=key, draw=7, clip_min=-1.0)

    def word(c0: int, c1: int, c3: int, number: int) -> int:
        counter = tuple(torch.tensor(c) for c in (c0, c1, 7, c3))
        return int(philox4x32_10(counter, torch.tensor(0x9ABCDEF0), torch.tensor(0x12345678))[number])

    share = 1024 + (word(0, 0, 3 | 1 << 8, 0) * (3072 - 1024 + 1) >> 32)
    sign = -1 if word(0, 0, 3 | 1 << 8, 1) >= 2**31 else 1
    for sample, channel, pixel in itertools.product(range(3), range(2), range(15)):
        of_pixel = word(channel * 4 + pixel // 4, 41 + sample, 3, pixel % 4)
        u = ((of_pixel % 2**20 + 2**19) % 2**20 - 2**19) / 2**19
        noise = 0.25 * u if of_pixel >> 20 < share else float(of_label[labels[sample], channel].flatten()[pixel])
        assert float(got[sample, channel].flatten()[pixel]) == sign * noise


def test_a_label_start_is_that_of_its_sample_and_call(device):
    """Whatever batch a sample is in, and on whatever rank."""
    x, of_label = torch.rand(6, 3, 5, 5, device=device), 0.1 * torch.randn(4, 3, 5, 5, device=device)
    labels, key = torch.tensor([0, 3, 1, 1, 2, 0], device=device), torch.tensor([77, 100], device=device)
    whole = ak.label_noise_start(x, labels, of_label, 0.1, key=key)
    half = ak.label_noise_start(x[3:], labels[3:], of_label, 0.1, key=torch.tensor([77, 103], device=device))
    assert same_bits(whole[3:], half)
    order = torch.tensor([5, 2, 0], device=device)
    assert same_bits(
        whole[order], ak.label_noise_start(x[order], labels[order], of_label, 0.1, key=key, ids=100 + order)
    )
    assert not torch.equal(whole, ak.label_noise_start(x, labels, of_label, 0.1, key=key, draw=1))
    assert same_bits(to_layout(whole, True), ak.label_noise_start(to_layout(x, True), labels, of_label, 0.1, key=key))


def test_labels_that_are_no_class_read_nothing(device, monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    x, of_label = torch.rand(5, 3, 4, 4, device=device), torch.rand(2, 3, 4, 4, device=device)
    labels = torch.tensor([0, -1, 2, 2**62, 1], device=device)
    for backend in ("native", "reference"):
        with ak.backend(backend):
            start = ak.label_noise_start(x, labels, of_label, 0.1, key=torch.tensor([1, 0], device=device))
        assert start.flatten(1).isnan().all(1).tolist() == [False, True, True, True, False]
        assert not start[[0, 4]].isnan().any()


# --- gradients ---


def away_from_kinks(shape, seed=0):
    """fp64 (adv, grad, x) whose steps hit every branch, none closer to a kink than gradcheck's step."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g, dtype=torch.float64) * 1.2 - 0.1
    adv = x + 0.15 * (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1)
    grad = torch.randn(shape, generator=g, dtype=torch.float64)
    return adv, grad, x


@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_pgd_step_gradients(descend, masked):
    adv, grad, x = away_from_kinks((3, 2, 3, 3))
    active = torch.tensor([True, False, True]) if masked else None
    eps, step = torch.tensor([0.1, 0.12, 0.07]).double(), torch.tensor([0.03, 0.05, 0.2]).double()

    def step_of(adv, x, eps, step):
        return ak.pgd_step(adv, grad, x, eps, step, active=active, descend=descend)

    inputs = [t.requires_grad_() for t in (adv, x, eps, step)]
    assert torch.autograd.gradcheck(step_of, inputs)
    assert torch.autograd.gradgradcheck(step_of, inputs)


def test_apgd_step_gradients():
    adv, grad, x = away_from_kinks((3, 2, 3, 3))
    old, active = adv + 0.1 * away_from_kinks((3, 2, 3, 3), 1)[1], torch.tensor([True, False, True])
    rows = [torch.tensor(v).double() for v in ([0.1, 0.12, 0.07], [0.03, 0.05, 0.2], [0.75, 0.5, 0.9])]

    def step_of(adv, old, x, eps, step, share):
        return ak.apgd_step(adv, old, grad, x, eps, step, share, active=active, descend=True)

    inputs = [t.requires_grad_() for t in (adv, old, x, *rows)]
    assert torch.autograd.gradcheck(step_of, inputs)
    assert torch.autograd.gradgradcheck(step_of, inputs)


@pytest.mark.parametrize("project", [False, True])
def test_sample_neighbours_gradients(project):
    adv, _, x = away_from_kinks((3, 2, 3, 3))
    eps, radius = torch.tensor([0.1, 0.12, 0.07]).double(), torch.tensor([0.05, 0.2, 0.1]).double()
    key = torch.tensor([11, 0])

    def sample(adv, radius, x, eps):
        return ak.sample_neighbours(adv, radius, 2, key=key, **({"x": x, "eps": eps} if project else {}))

    inputs = [t.requires_grad_() for t in (adv, radius, x, eps)]
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


def test_random_start_and_fused_gradients():
    adv, grad, x = away_from_kinks((2, 2, 3, 3))
    eps, radius = torch.tensor([0.1, 0.12]).double(), torch.tensor([0.05, 0.2]).double()
    key = torch.tensor([5, 0])

    def labelled(x, eps, noise):
        return ak.label_noise_start(x, torch.tensor([2, 0]), noise, eps, key=key)

    inputs = [t.requires_grad_() for t in (x, eps, 0.1 * torch.randn(3, 2, 3, 3).double())]
    assert torch.autograd.gradcheck(labelled, inputs)
    assert torch.autograd.gradgradcheck(labelled, inputs)
    inputs = inputs[:2]
    assert torch.autograd.gradcheck(lambda x, eps: ak.random_start(x, eps, key=key), inputs)
    assert torch.autograd.gradgradcheck(lambda x, eps: ak.random_start(x, eps, key=key), inputs)

    def fused(adv, x, eps, radius):
        return ak.pgd_step_neighbours(adv, grad, x, eps, 0.05, radius, 2, project=True, key=key)

    inputs = [t.requires_grad_() for t in (adv, x, eps, radius)]
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_path_gives_the_same_bits(dtype, device):
    adv, grad, x = problem((3, 3, 8, 8), dtype=dtype, device=device)
    key = ak.noise_key(device)
    plain = all_four(adv, grad, x, 0.1, 0.03, 0.05, key=key)
    tracked = all_four(adv.requires_grad_(), grad, x.requires_grad_(), 0.1, 0.03, 0.05, key=key)
    for a, b in zip(plain, tracked, strict=True):
        assert b.requires_grad and same_bits(a, b.detach())


def test_per_channel_bounds_mask_gradients(device):
    adv, grad, x = problem((2, 3, 4, 4), device=device)
    adv.requires_grad_()
    high = torch.tensor([1.0, -1.0, 1.0], device=device)
    ak.pgd_step(adv, grad, x, 10.0, 0.0, clip_min=-9.0, clip_max=high).sum().backward()
    assert torch.equal(adv.grad, torch.tensor([1.0, 0.0, 1.0], device=device).view(1, 3, 1, 1).expand_as(adv))


# --- what PyTorch asks of an operator ---


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    adv, grad, x = problem((2, 3, 4, 4), device=device)
    for t in (adv, grad, x) if requires_grad else ():
        t.requires_grad_()
    rows, key = torch.rand(2, device=device), ak.noise_key(device)
    clip = (0.0, None, 1.0, torch.rand(3, device=device))
    noise = (key, torch.arange(2, device=device), 1)
    out, many = torch.empty(2, 3, 4, 4, device=device), torch.empty(6, 3, 4, 4, device=device)
    active = torch.tensor([True, False], device=device)
    torch.library.opcheck(OPS.random_start.default, (x, 0.1, None, *clip, *noise, out))
    torch.library.opcheck(
        OPS.label_noise_start.default, (x, active.long(), grad, 0.0, rows, 400, 2000, *clip, *noise, out)
    )
    torch.library.opcheck(
        OPS.pgd_step.default, (adv, grad, x, 0.0, rows, 0.1, None, *clip, True, active, out, out.bfloat16())
    )
    torch.library.opcheck(
        OPS.apgd_step.default,
        (adv, adv.flip(0), grad, x, 0.0, rows, 0.1, None, 0.0, rows, *clip, True, active, out, out.bfloat16()),
    )
    torch.library.opcheck(OPS.sample_neighbours.default, (adv, 0.0, rows, 3, x, 0.1, None, *clip, *noise, many))
    torch.library.opcheck(
        OPS.pgd_step_neighbours.default,
        (adv, grad, x, 0.1, None, 0.1, None, 0.1, None, 1, False, True, *clip, False, None, *noise, many),
    )


def test_compile_fullgraph(device):
    adv, grad, x = problem((2, 3, 8, 8), device=device)
    key = ak.noise_key(device)

    def everything(adv, grad, x, key):
        return [t * 2 for t in all_four(adv, grad, x, 0.1, 0.03, 0.05, key=key)]

    compiled = torch.compile(everything, fullgraph=True)
    for a, b in zip(compiled(adv, grad, x, key), everything(adv, grad, x, key), strict=True):
        assert same_bits(a, b)


def test_compile_fullgraph_with_gradients_and_fresh_noise(device):
    adv, grad, x = problem((2, 3, 8, 8), device=device)

    def loss(adv):
        moved = ak.pgd_step(adv, grad, x, 0.1, 0.03)
        return (ak.sample_neighbours(moved, 0.05, 2, key=key) ** 2).sum()

    key = ak.noise_key(device)
    expected = torch.autograd.grad(loss(adv.requires_grad_()), adv)[0]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(adv), adv)[0]
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)

    start = torch.compile(lambda x: ak.random_start(x, 0.1), fullgraph=True)
    torch.manual_seed(1)
    first, second = start(x), start(x)
    assert not torch.equal(first, second)


def test_dispatch_modes_and_subclasses_see_the_operator():
    adv, grad, x = problem((2, 3, 4, 4))
    with Dispatched() as seen:
        ak.pgd_step(adv, grad, x, 0.1, 0.03)
    assert "atlas_kernels.pgd_step.default" in seen.names
    parameter = torch.nn.Parameter(adv)
    with torch.no_grad():
        assert same_bits(ak.pgd_step(parameter, grad, x, 0.1, 0.03), ak.pgd_step(adv, grad, x, 0.1, 0.03))


def test_inference_mode():
    adv, grad, x = problem((2, 3, 4, 4))
    expected = ak.pgd_step(adv, grad, x, 0.1, 0.03)
    with torch.inference_mode():
        inside = ak.pgd_step(adv.clone(), grad, x, 0.1, 0.03)
    assert same_bits(inside.clone(), expected)
