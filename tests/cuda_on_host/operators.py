"""The operators on the CUDA kernels, which g++ compiled for the CPU: tests/test_cuda_on_host.py runs this file in a
process of its own, under sanitizers. The reference backend says what is right, to the bit."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
import test_batch_norm as batch_norm
import test_hyperplane as hyperplane
import test_nuclear_norm as nuclear
import test_pairwise as pairwise
import test_stored as stored
from atlas_kernels.core import core
from atlas_kernels.schema import NORMS
from operator_cases import SHAPES, apgd_step, label_start, problem, same_bits, same_within_ulps, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["".join(p) for p in itertools.product("cl", repeat=3)]
PATH = os.environ["ATLAS_CUDA_ON_HOST"]


@pytest.fixture(scope="module", autouse=True)
def library():
    """CPU tensors go to the kernels under test, as if they were on CUDA device 0."""
    core().load_cuda(PATH)
    core().on_cuda(0)
    yield ctypes.CDLL(PATH)
    core().on_cuda(-1)


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same tensor one element further in memory than any allocator would put it."""
    strides = t.stride()
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, strides).copy_(t)


def check(adv, grad, x, eps=0.1, step=0.03, radius=0.05, *, key, count=2, out_dtype=None, out_layout="c", **options):
    """All four operators, into results of every kind, against the reference."""
    noise = {"key": key, "ids": options.pop("ids", None), "draw": 3}
    stepping = {name: options.pop(name) for name in ("active", "descend") if name in options}
    project = options.pop("project", False)
    ball = {"x": x, "eps": eps} if project else {}

    def run():
        cast = to_layout(torch.empty_like(adv, dtype=out_dtype or adv.dtype), out_layout == "l")
        many = torch.empty((count + 2) * adv.shape[0], *adv.shape[1:], dtype=out_dtype or adv.dtype)
        many = to_layout(many, out_layout == "l")
        moved = adv.clone()
        return {
            "start": ak.random_start(x, radius, **noise, **options),
            "label start": label_start(x, grad, radius, **noise, **options),
            "step": ak.pgd_step(adv, grad, x, eps, step, cast=cast, **stepping, **options),
            "cast": cast,
            "step in place": ak.pgd_step(moved, grad, x, eps, step, out=moved, **stepping, **options),
            "step of APGD": apgd_step(adv, grad, x, eps, step, **stepping, **options),
            "neighbours": ak.sample_neighbours(adv, radius, count, **ball, **noise, **options),
            "both": ak.pgd_step_neighbours(
                adv, grad, x, eps, step, radius, count, project=project, out=many, **noise, **stepping, **options
            ),
            "both without x": ak.pgd_step_neighbours(
                adv, grad, x, eps, step, radius, count, include_x=False, **noise, **stepping, **options
            ),
        }

    got = run()
    with ak.backend("reference"):
        expected = run()
    for name, t in got.items():
        assert same_bits(t, expected[name]), name


KEY = torch.tensor([-(2**62) - 12345, 2**33 + 7])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 3, 8, 12), (130, 1, 4, 4), (3, 3, 2, 2)], ids=str)
def test_shapes_and_dtypes(shape, dtype):
    for project in (False, True):
        check(*problem(shape, dtype=dtype, special=True), key=KEY, project=project)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 3), (2, 4, 4, 4), (3, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_layout", ["c", "l"])
def test_layouts(shape, out_layout, out_dtype):
    for layouts in LAYOUTS:
        inputs = problem(shape, layouts=layouts, special=True)
        check(*inputs, key=KEY, out_dtype=out_dtype, out_layout=out_layout, project=out_layout == "l")


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtype_pairs(dtype, grad_dtype):
    for layouts, out_dtype in itertools.product(("ccc", "clc", "lll"), FLOATS):
        inputs = problem((2, 3, 4, 6), dtype=dtype, grad_dtype=grad_dtype, layouts=layouts, special=True)
        check(*inputs, key=KEY, out_dtype=out_dtype, count=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiny_fp64_gradients(dtype):
    """Far below the smallest fp32 number: their direction counts all the same."""
    for layouts in ("ccc", "clc"):
        adv, grad, x = problem((2, 3, 4, 4), dtype=dtype, grad_dtype=torch.float64, layouts=layouts)
        check(adv, grad * 1e-300, x, key=KEY)


@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc", "llc"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (4, 3, 3, 3), (3, 5, 2, 2)], ids=str)
def test_per_sample_and_per_channel(shape, layouts):
    batch, channels = shape[:2]
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        adv, grad, x = problem(shape, layouts=layouts, dtype=dtype)
        rows = [torch.rand(batch, generator=g) * 0.2 for _ in range(3)]
        low, high = torch.rand(channels, generator=g) * 0.3, 1 - torch.rand(channels, generator=g) * 0.3
        active = torch.rand(batch, generator=g) < 0.5
        ids = torch.randint(-(2**62), 2**62, (batch,), generator=g)
        for options in itertools.product(
            ({}, {"active": active}), ({}, {"ids": ids}), ({}, {"clip_min": low}, {"clip_min": low, "clip_max": high})
        ):
            merged = {name: value for part in options for name, value in part.items()}
            check(adv, grad, x, *rows, key=KEY, descend=bool(active[0]), project=bool(active[1]), **merged)
            check(adv, grad, x, key=KEY, **merged)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layouts", ["ccc", "lll", "cll"])
def test_unaligned(layouts, dtype):
    inputs = problem((3, 3, 4, 4), layouts=layouts, dtype=dtype)
    for mask in itertools.product((False, True), repeat=3):
        check(*(unaligned(t) if shift else t for t, shift in zip(inputs, mask, strict=True)), key=KEY)


@pytest.mark.parametrize("layouts", ["ccc", "lll"])
def test_apgd_per_sample(layouts):
    """The kernel of the usual case, and what an unaligned iterate before, a cast or a bf16 gradient make of it."""
    adv, grad, x = problem((33, 3, 8, 12), layouts=layouts, special=True)
    old, rows, active = adv.flip(0), [torch.rand(33) * size for size in (0.2, 0.2, 1.0)], torch.rand(33) < 0.7
    for before, slope, options in itertools.product(
        (old, unaligned(old), old.contiguous()), (grad, grad.bfloat16()), ({}, {"active": active, "descend": True})
    ):
        cast = torch.empty(adv.shape, dtype=torch.bfloat16)
        for results in ({}, {"cast": cast}):
            got = ak.apgd_step(adv, before, slope, x, *rows, **options, **results)
            narrow = cast.clone()
            with ak.backend("reference"):
                assert same_bits(got, ak.apgd_step(adv, before, slope, x, *rows, **options, **results))
            assert not results or same_bits(narrow, cast)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_anything(data):
    draw = data.draw
    ndim = draw(st.integers(1, 5))
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 7)) for i in range(ndim))
    inputs = problem(
        shape, dtype=draw(st.sampled_from(FLOATS)), grad_dtype=draw(st.sampled_from(FLOATS)),
        layouts=draw(st.sampled_from(LAYOUTS)), special=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    if shape[0] and draw(st.booleans()):
        inputs = tuple(map(unaligned, inputs))
    numbers, extreme = [0.0, 1e-45, 0.03, 0.1, 2.0], draw(st.booleans())
    number = st.sampled_from([*numbers, *([float("inf")] if extreme else [])])
    finite = st.sampled_from([*numbers, *([1e30] if extreme else [])])  # a radius of noise
    key = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), 0])
    check(
        *inputs, draw(number), draw(number), draw(finite), key=key,
        count=draw(st.integers(0, 3)), descend=draw(st.booleans()), project=draw(st.booleans()),
        out_dtype=draw(st.sampled_from(FLOATS)), out_layout=draw(st.sampled_from("cl")),
    )  # fmt: skip


def test_labels_that_are_no_class_read_nothing(monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    labels = torch.tensor([0, -1, 2, 2**62, 1])
    for last in (False, True):
        x, noise = (to_layout(torch.rand(n, 3, 4, 4), last) for n in (5, 2))
        for images in (x, unaligned(x), x.double()):
            start = ak.label_noise_start(images, labels, noise, 0.1, key=KEY)
            with ak.backend("reference"):
                assert same_bits(start, ak.label_noise_start(images, labels, noise, 0.1, key=KEY))
            assert start.flatten(1).isnan().all(1).tolist() == [False, True, True, True, False]


def check_augment(images, index, shift=False, **options):
    options = {"key": KEY, "draw": 2, **options}
    with ak.backend("reference"):
        expected = ak.augment(images, index, **options)
    out = unaligned(expected) if shift else torch.empty_like(expected)
    assert same_bits(ak.augment(images, index, out=out, **options), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layouts", ["cc", "cl", "lc", "ll"])
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (3, 1, 28, 28), (5, 2, 7, 9), (2, 3, 1, 1), (3, 5, 4, 6)], ids=str)
def test_augment(shape, layouts, dtype, monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    g = torch.Generator().manual_seed(2)
    images = to_layout(torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), layouts[0] == "l")
    index = torch.tensor([shape[0] - 1, 0, -1, 1, 1, shape[0], 2**62])
    last = {"dtype": dtype, "channels_last": layouts[1] == "l"}
    per_channel = {"mean": torch.rand(shape[1]).tolist(), "std": torch.rand(shape[1]) + 0.1}
    for options in ({}, {"std": 0.3}, per_channel, {"padding": 1, "crop": 1}, {"padding": 30, "crop": (40, 17)}):
        for shift in (False, True):
            check_augment(images, index, shift, **options, **last)
    check_augment(images, index, ids=torch.arange(7) - 2**40, flip=False, **last)
    check_augment(images, index, padding=0, flip=False, **last)
    check_augment(images[:0], index, **last)
    check_augment(images[:, :, :0], index, crop=2, **last)
    check_augment(images, index[:0], **last)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_augment_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(1, most)) for most in (4, 6, 9, 40))
    padding = draw(st.integers(0, 9))
    crop = tuple(draw(st.integers(1, side + 2 * padding)) for side in shape[2:])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(shape[3]))
    index = torch.tensor(draw(st.lists(st.integers(0, shape[0] - 1), max_size=6)), dtype=torch.int64)
    check_augment(
        to_layout(images, draw(st.booleans())), index, draw(st.booleans()), padding=padding, crop=crop,
        flip=draw(st.booleans()), key=torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), 0]),
        dtype=draw(st.sampled_from(FLOATS)), channels_last=draw(st.booleans()), mean=draw(st.sampled_from([0.0, 0.5])),
    )  # fmt: skip


def check_norms(adv, grad, x, norm, eps, step, *, key=KEY, out_dtype=None, out_layout="c", ids=None, **options):
    """Start, step and projections in l2 and l1, on one block a sample."""
    clip = {name: options[name] for name in ("clip_min", "clip_max") if name in options}

    def run():
        cast = to_layout(torch.empty_like(adv, dtype=out_dtype or adv.dtype), out_layout == "l")
        moved, inside, start = adv.clone(), adv.clone(), x.clone()
        return {
            "start": ak.random_start(start, eps, norm=norm, key=key, ids=ids, draw=3, out=start, **clip),
            "step": ak.pgd_step(adv, grad, x, eps, step, norm=norm, cast=cast, **options),
            "cast": cast,
            "step in place": ak.pgd_step(moved, grad, x, eps, step, norm=norm, out=moved, **options),
            "step of APGD": apgd_step(adv, grad, x, eps, step, norm=norm, **options),
            "project": ak.project(inside, x, eps, norm=norm, out=inside, **clip),
            "project linf": ak.project(adv, x, eps, **clip),
        } | {
            f"step, {sparsity}": ak.pgd_step(adv, grad, x, eps, step, norm=norm, sparsity=sparsity, **options)
            for sparsity in ((0.5, None) if norm == "l1" else ())
        }

    got = run()
    with ak.backend("reference"):
        expected = run()
    for name, t in got.items():
        assert same_within_ulps(t, expected[name], x.to(t.dtype)), name


@pytest.mark.parametrize(("norm", "eps", "step"), [("l2", 0.6, 0.4), ("l1", 4.0, 2.0), ("l1", 0.1, 2.0)])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 8, 12), (2, 3, 33, 31), (1, 3, 32, 64)], ids=str)
def test_norms(shape, norm, eps, step):
    for dtype, layouts in itertools.product(FLOATS, ("ccc", "lll", "clc")):
        adv, grad, x = problem(shape, dtype=dtype, layouts=layouts)
        check_norms(adv, grad, x, norm, eps, step, out_dtype=torch.bfloat16, out_layout=layouts[1])


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_norms_with_everything(norm):
    g = torch.Generator().manual_seed(1)
    for layouts, special in itertools.product(("ccc", "lll", "clc", "llc"), (False, True)):
        adv, grad, x = map(unaligned, problem((5, 3, 4, 4), layouts=layouts, special=special))
        eps, step = torch.rand(5, generator=g), torch.rand(5, generator=g)
        low, high = torch.rand(3, generator=g) * -0.3, 1 + torch.rand(3, generator=g) * 0.3
        ids, active = torch.randint(-(2**62), 2**62, (5,), generator=g), torch.rand(5, generator=g) < 0.7
        options = {"active": active, "descend": True, "clip_min": low, "clip_max": high}
        check_norms(adv, grad, x, norm, eps, step, ids=ids, **options)
        check_norms(*problem((0, 3, 4, 4)), norm, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e6, 3e38])
def test_l1_projection_of_points_far_away(far, dtype):
    v, _, x = problem((2, 1, 4, 5), dtype=dtype)
    v.view(2, -1)[0, 4:16] = far * torch.linspace(1 - 1e-6, 1, 12, dtype=dtype)
    v.view(2, -1)[1, 8:] = -far
    got = ak.project(v, x, 1.0, norm="l1")
    with ak.backend("reference"):
        assert same_within_ulps(got, ak.project(v, x, 1.0, norm="l1"), x)


def test_nothing_is_launched_for_nothing(library):
    adv, grad, x = problem((2, 3, 4, 4))
    ak.pgd_step(adv, grad, x, 0.1, 0.03)
    before = ran(library)
    check(*problem((0, 3, 4, 4)), key=KEY)
    assert ran(library) == before


@pytest.mark.parametrize("device", [0, 1])
def test_device_of_the_call_and_back(library, device):
    core().on_cuda(device)
    check(*problem((2, 3, 4, 4)), key=KEY)
    assert library.on_host_launched_on() == device and library.on_host_device() == 0
    core().on_cuda(0)


def test_errors_are_reported_and_cleared(library):
    adv, grad, x = problem((2, 3, 4, 4))
    core().on_cuda(7)
    with pytest.raises(RuntimeError, match="invalid device"):
        ak.pgd_step(adv, grad, x, 0.1, 0.03)
    core().on_cuda(0)
    assert library.on_host_last_error() == 0 and library.on_host_device() == 0


def test_places_in_batches_beyond_32_bits(library):
    """Where units lie, against Python's integers."""
    library.on_host_locate.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p]
    numbers, at = random.Random(0), (ctypes.c_int64 * 5)()
    sizes = [(2**21, 3, 224 * 224), (1, 1, 2**36), (3, 7, 2**31 + 1), (2**33, 1, 1), (5, 2**20, 49), (2, 2**30, 2**20)]
    for (batch, channels, pixels), plane_major in itertools.product(sizes, (False, True)):
        groups = -(-pixels // 4)
        units = batch * channels * groups
        for unit in [0, units - 1, units // 2, *(numbers.randrange(units) for _ in range(200))]:
            sample, rest = divmod(unit, channels * groups)
            channel, group = divmod(rest, groups) if plane_major else divmod(rest, channels)[::-1]
            library.on_host_locate(batch, channels, pixels, plane_major, unit, at)
            assert list(at) == [
                sample, channel, min(4, pixels - 4 * group), (sample * channels + channel) * pixels + 4 * group,
                (sample * pixels + 4 * group) * channels + channel,
            ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("special", [False, True])
def test_reductions(library, dtype, special):
    """Sums are of whole numbers, so exact in any order."""
    x = torch.randint(-1000, 1000, (5, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    if special:
        x[0, 17], x[1, :], x[2, 40:60], x[3, 95] = torch.nan, torch.nan, -torch.inf, torch.inf
        x[4, :32] = torch.tensor([0.0, -0.0] * 16)
    got = torch.empty(5, 96, 11, dtype=dtype)
    library.test_reduce.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_bool]
    assert library.test_reduce(x.data_ptr(), got.data_ptr(), 5, dtype == torch.float64) == 0
    ordered = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    expected = [x.flip(1)]
    for size in (8, 32, 96):
        groups, finite = x.view(5, -1, size), ordered.view(5, -1, size)
        expected += [part.repeat_interleave(size, 1) for part in (groups.sum(2), finite.amax(2) + 0.0)]
    lane, largest = torch.arange(96), ordered.amax(1, keepdim=True)
    first = torch.where(x == largest, lane, 96).amin(1, keepdim=True)
    expected += [
        x[:, lane - lane % 32 + 3],
        x[:, torch.where(lane % 8 < 6, lane + 2, lane)],
        first.expand(5, 96),
        torch.full((5, 96), 95 * 48),
    ]
    for i, t in enumerate(expected):
        assert same_bits(got[..., i], t.to(dtype)), i


@pytest.mark.parametrize("distance", pairwise.DISTANCES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [*pairwise.SIZES, (16, 32), (17, 33), (300, 3)], ids=str)
def test_compactness(size, dtype, distance):
    h, h_adv, labels = pairwise.features(*size, dtype=dtype)
    pairwise.check(unaligned(h), unaligned(h_adv), labels, distance=distance)
    pairwise.check(h, h_adv, labels, distance=distance, detach=False, scale=-2.0)
    pairwise.check(h, h_adv, labels, distance=distance, reduction="none")


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_compactness_of_special_features(special):
    for distance in pairwise.DISTANCES:
        pairwise.test_special_features(special, distance, "cpu")


def test_compactness_of_nothing():
    pairwise.test_an_empty_batch_has_no_pairs("cpu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 132, 2, 2), (130, 8), (2, 3, 2, 3, 4), (1, 2, 40, 52)], ids=str)
def test_batch_norm(shape, dtype):
    """The operator itself, on aligned tensors and others, against the reference in float64."""
    for last, shift, training in itertools.product((False, True), (False, True), (False, True)):
        p = batch_norm.problem(shape, dtype=dtype, last=last)
        batch_norm.check_operator(
            p, unaligned if shift else torch.clone, training=training, parameters=training == last
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 3, 8, 12), (2, 3, 33, 31)], ids=str)
def test_stored(shape, dtype, monkeypatch):
    """Aligned tensors and others, in every layout; rows that the store lacks."""
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    for layouts, store in itertools.product(("cccc", "llll", "clcl", "lclc"), (torch.float32, torch.bfloat16)):
        x, grad, d, m, index = stored.case(shape, dtype=dtype, store=store, layouts=layouts, special=layouts[0] == "l")
        stored.check(x, grad, d, m, index, layouts=layouts)
        x, grad, d, m = map(unaligned, (x, grad, d, m))
        index[shape[0] // 2] = -1 if layouts[0] == "l" else 2**62
        stored.check(x, grad, d, m, index, layouts=layouts, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("layouts", ["cccc", "llll", "clcl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stored_with_everything(dtype, layouts):
    for grad_dtype in FLOATS:
        made = partial(stored.case, dtype=dtype, layouts=layouts, grad_dtype=grad_dtype)
        *inputs, index = made((4, 3, 5, 8))
        rows, clip = [torch.rand(4) for _ in "12"], {"clip_min": torch.rand(3) - 1, "clip_max": [1.0, 0.8, 2.0]}
        stored.check(*inputs, index, rows[0], step_size=rows[1], **clip)
        stored.check(*map(unaligned, inputs), index)
        stored.check(*made((0, 3, 4, 4)))


def test_stored_by_a_gradient_in_double_precision():
    """Of float32 images; the public function would round it before."""
    x, grad, *store, index = stored.case((4, 3, 5, 8))
    outcomes = []
    for g in (grad, grad.double()):
        rows, out = [t.clone() for t in store], torch.empty_like(x)
        stored.OPS.stored_step(x, g, *rows, index, 0.1, None, 0.1, None, 0.3, 0.0, None, 1.0, None, out)
        outcomes.append([out, *rows])
    for single, double in zip(*outcomes, strict=True):
        torch.testing.assert_close(double, single, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", nuclear.KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(1, 2), (3, 2), (2, 3), (40, 10), (9, 33), (35, 33)], ids=str)
def test_nuclear_norm(size, dtype, kind):
    if size == (35, 33) and dtype != torch.float32:
        return  # more pairs than warps: once is enough
    with ak.backend("native"):
        nuclear.check(unaligned(nuclear.matrix(*size, kind, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nuclear_norm_of_special_matrices(dtype):
    for size in ((6, 4), (4, 6)):
        nuclear.test_directions_of_nothing_get_nothing(dtype, size, "cpu")
    for special in (float("nan"), float("-inf")):
        nuclear.test_a_number_that_is_none_spoils_all(special, (6, 4), "cpu")


def test_nuclear_norm_of_nothing_and_of_any_size():
    nuclear.test_an_empty_batch_has_norm_0("cpu")
    nuclear.test_entries_of_any_size((6, 4), "cpu")


def ran(library) -> set[int]:
    """Where the kernels that ran lie in memory."""
    library.on_host_ran.restype, library.on_host_ran.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    return set(itertools.takewhile(bool, map(library.on_host_ran, itertools.count())))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 8, 12), (2, 3, 33, 31), (1, 3, 32, 64)], ids=str)
def test_hyperplane(shape, norm):
    """Every kernel: in vectors of one plane, of three, and pixel by pixel."""
    for dtype, layouts in itertools.product(FLOATS, ("ccc", "lll", "clc")):
        adv, grad, x, gap = hyperplane.case(shape, dtype=dtype, layouts=layouts)
        hyperplane.check(adv, grad, x, gap, norm)
        hyperplane.check(*map(unaligned, (adv, grad, x)), gap, norm, alpha_max=1.0)
        hyperplane.check(adv, grad, x, 0.01 * gap, norm, overshoot=0.5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc", "llc"])
def test_hyperplane_with_everything(layouts, norm):
    hyperplane.test_ranges(layouts, norm, "cpu")
    for special, grad_dtype in itertools.product((False, True), FLOATS):
        inputs = hyperplane.case((5, 3, 4, 4), layouts=layouts, special=special, grad_dtype=grad_dtype)
        hyperplane.check(*inputs, norm)
    hyperplane.check(*hyperplane.case((0, 3, 4, 4), layouts=layouts), norm)


def test_zzz_every_kernel_ran(library, request):
    """The tests above have run every kernel of the library. This test must be the last."""
    assert request.node is request.session.items[-1], "tests below this one are not counted: move it to the end"
    listing = subprocess.run(["nm", "-C", PATH], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2) for line in listing.splitlines() if line[0] != " "]
    address = {name: int(value, 16) for value, kind, name in symbols if kind in "tT"}
    moved = ctypes.cast(library.on_host_ran, ctypes.c_void_p).value - address["on_host_ran"]
    kernels = {name for name in address if "_kernel<" in name}
    assert kernels
    assert not {name for name in kernels if address[name] + moved not in ran(library)}
