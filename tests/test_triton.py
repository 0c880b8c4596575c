"""The Triton kernels, three ways: in Triton's interpreter on the CPU (a second pytest on this file, see
``test_in_the_interpreter``), compiled ahead of time for GPUs that need not be there, and on CUDA where there is one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
import test_hyperplane as hyperplane
import test_nuclear_norm as nuclear
import test_stored as stored
from atlas_kernels.backends import BackendUnavailable, triton, unavailable_reason
from atlas_kernels.backends.door import DoorError
from operator_cases import SHAPES, apgd_step, label_start, problem, same_bits, same_within_ulps, to_layout

pytest.importorskip("triton", reason="Triton is not installed")
from atlas_kernels.backends.triton.hyperplane import VARIANTS as PLANE_VARIANTS
from atlas_kernels.backends.triton.nuclear_norm import VARIANTS as MATRIX_VARIANTS
from atlas_kernels.backends.triton.perturb import TILE, VARIANTS
from atlas_kernels.backends.triton.perturb_norms import VARIANTS as NORM_VARIANTS
from atlas_kernels.backends.triton.stored import VARIANTS as STORED_VARIANTS

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [SINGLE, HALF, BRAIN]


def runs(test):
    """A test that launches kernels: on a GPU, and in the interpreter."""
    absent = not INTERPRETED and not torch.cuda.is_available()
    test = pytest.mark.skipif(absent, reason="no CUDA device; runs in test_in_the_interpreter too")(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def patch_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of ``triton.language`` at the start of a launch, and again in each
    call of one function by another, where they are replaced already: that took a third of its time."""
    from triton.runtime import interpreter

    patch, execute, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)

    def launch(*args, **kwargs):
        patched.clear()
        execute(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


if INTERPRETED:
    patch_once_a_launch()


def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``t`` in ``dtype``, as it is stored here: Triton's interpreter truncates to bfloat16 where a GPU rounds."""
    if INTERPRETED and dtype == BRAIN and t.dtype == SINGLE:
        return (t.view(torch.int32) >> 16).to(torch.int16).view(BRAIN)
    return t.to(dtype)


def all_four(backend, adv, grad, x, eps=0.1, step=0.03, radius=0.05, *, count=2, project=False, key=(7, 5), ids=None,
             draw=3, active=None, descend=False, **clip):  # fmt: skip
    ball = {"x": x, "eps": eps} if project else {}
    step_options = {"active": active, "descend": descend, **clip}
    noise = {"key": torch.tensor(key, device=adv.device), "ids": ids, "draw": draw}
    both = {"project": project, **noise, **step_options}
    with ak.backend(backend):
        return {
            "start": ak.random_start(x, eps, **noise, **clip),
            "label start": label_start(x, grad, radius, **noise, **clip),
            "step": ak.pgd_step(adv, grad, x, eps, step, **step_options),
            "step of APGD": apgd_step(adv, grad, x, eps, step, **step_options),
            "neighbours": ak.sample_neighbours(adv, radius, count, **ball, **noise, **clip),
            "both": ak.pgd_step_neighbours(adv, grad, x, eps, step, radius, count, **both),
            "both without x": ak.pgd_step_neighbours(adv, grad, x, eps, step, radius, count, include_x=False, **both),
        }


def check_against_reference(adv, grad, x, *args, **kwargs):
    got = all_four("triton", adv, grad, x, *args, **kwargs)
    wide = SINGLE if INTERPRETED and adv.dtype == BRAIN else adv.dtype
    expected = all_four("reference", adv.to(wide), grad, x.to(wide), *args, **kwargs)
    for name, t in expected.items():
        assert same_bits(got[name], rounded(t, adv.dtype)), name


# --- the same bits as the reference -----------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 1, 1), (1, 2, 37, 41), (2, 40, 5, 5), (1, 300, 2, 2)], ids=str)
def test_bits_shapes(shape):
    check_against_reference(*problem(shape, device=DEVICE), count=1)


@runs
@pytest.mark.parametrize(
    ("shape", "layouts"),
    [((2, 3, 8, 8), "".join(p)) for p in itertools.product("cl", repeat=3)] + [((1, 18, 7, 3), "clc")],
)
def test_bits_layouts(shape, layouts):
    check_against_reference(*problem(shape, layouts=layouts, grad_dtype=BRAIN, device=DEVICE))


@runs
@pytest.mark.parametrize("grad_dtype", [*DTYPES, DOUBLE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_dtype_pair(dtype, grad_dtype):
    adv, grad, x = problem((2, 3, 9, 9), dtype=dtype, grad_dtype=grad_dtype, device=DEVICE, special=True)
    grad[0] *= 1e-30 if grad_dtype != DOUBLE else 1e-300  # its sign counts, however small
    check_against_reference(adv, grad, x, project=True)


@runs
@pytest.mark.parametrize("options", [{"descend": True}, {"project": True}, {"count": 0}, {"count": 5}], ids=str)
def test_bits_options(options):
    check_against_reference(*problem((3, 3, 8, 9), special=True, device=DEVICE), **options)


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("size", [0.0, 1.1e-40, float("inf")])
def test_bits_of_extreme_steps(size, descend):
    """-0 stays -0, denormals are not flushed, and infinity times no gradient is NaN."""
    adv, grad, x = problem((2, 3, 4, 4), special=True, device=DEVICE)
    adv[0], x[0] = -0.0, -0.0
    noise = min(size, torch.finfo(torch.float32).max)  # infinite noise is refused
    check_against_reference(adv, grad, x, noise, size, noise, descend=descend)


@runs
@pytest.mark.parametrize("layouts", ["ccc", "lll", "clc"])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_bits_per_sample_and_per_channel(dtype, layouts):
    problem_ = problem((4, 3, 5, 8), dtype=dtype, layouts=layouts, device=DEVICE)
    rows = [torch.rand(4, device=DEVICE) * 0.2 for _ in range(3)]
    clip = {
        "clip_min": torch.tensor([0.0, 0.1, -0.5], device=DEVICE),
        "clip_max": torch.tensor([1.0, 0.8, 2.0], device=DEVICE),
    }
    active = torch.tensor([True, False, True, False], device=DEVICE)
    ids = torch.tensor([3, 1, 2**40 + 9, -4], device=DEVICE)
    check_against_reference(*problem_, *rows, ids=ids, active=active, project=True, **clip)
    check_against_reference(*problem_, *rows, active=active)
    check_against_reference(*problem_, **clip)


@runs
@pytest.mark.parametrize("alone", ["eps", "step", "radius", "active"])
def test_bits_of_each_per_sample_argument_alone(alone):
    rows = torch.tensor([True, False, True]) if alone == "active" else torch.tensor([0.02, 0.2, 0.1])
    check_against_reference(*problem((3, 3, 8, 8), device=DEVICE), **{alone: rows.to(DEVICE)}, project=True)


@runs
@pytest.mark.parametrize(
    ("key", "draw"), [((-1, 0), 2**31), ((2**63 - 1, 2**31 - 1), 2**32 - 1), ((-(2**63), -3), 1), ((1, 2**32 - 1), 0)]
)
def test_bits_at_the_ends_of_the_counter(key, draw):
    check_against_reference(*problem((3, 2, 3, 3), device=DEVICE), key=key, draw=draw, count=1)


@runs
def test_labels_that_are_no_class_read_nothing(monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    x, noise = torch.rand(4, 3, 4, 4, device=DEVICE), torch.rand(2, 3, 4, 4, device=DEVICE)
    labels = torch.tensor([0, -1, 2, 2**62], device=DEVICE)
    with ak.backend("triton"):
        start = ak.label_noise_start(x, labels, noise, 0.1, key=torch.tensor([1, 0], device=DEVICE))
    assert start.flatten(1).isnan().all(1).tolist() == [False, True, True, True] and not start[0].isnan().any()


@runs
def test_bits_of_more_than_a_tile():
    """Whole tiles, and a tail that ends neither on a tile nor on an access."""
    for numel in (TILE - 1, TILE, 2 * TILE + 17):
        check_against_reference(*problem((1, numel), special=True, device=DEVICE))


@runs
def test_bits_of_unaligned_memory():
    adv, grad, x = (
        torch.empty(t.numel() + 1, device=DEVICE)[1:].view_as(t).copy_(t) for t in problem((2, 3, 8, 8), device=DEVICE)
    )
    check_against_reference(adv, grad, x)


@runs
def test_bits_in_place():
    adv, grad, x = problem((3, 3, 8, 8), device=DEVICE)
    key = torch.tensor([1, 2], device=DEVICE)
    expected = all_four("reference", adv, grad, x, key=(1, 2), draw=0)
    with ak.backend("reference"):
        one = ak.sample_neighbours(adv, 0.05, 1, key=key)
    with ak.backend("triton"):
        clean, moved, around = x.clone(), adv.clone(), adv.clone()
        assert ak.random_start(clean, 0.1, key=key, out=clean) is clean and same_bits(clean, expected["start"])
        assert ak.pgd_step(moved, grad, x, 0.1, 0.03, out=moved) is moved and same_bits(moved, expected["step"])
        assert same_bits(ak.sample_neighbours(around, 0.05, 1, key=key, out=around), one)
        buffer = torch.cat([x, adv, adv, adv])
        ak.pgd_step_neighbours(buffer[3:6], grad, buffer[:3], 0.1, 0.03, 0.05, 2, key=key, out=buffer)
    assert same_bits(buffer, expected["both"])


@runs
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE], ids=str)
def test_bits_of_the_network_dtype_and_layout(dtype, last):
    adv, grad, x = problem((3, 3, 8, 8), grad_dtype=BRAIN, layouts="clc", special=True, device=DEVICE)
    cast = to_layout(torch.empty_like(adv, dtype=dtype), last)
    buffer = to_layout(torch.empty((12, 3, 8, 8), dtype=dtype, device=DEVICE), last)
    expected = all_four("reference", adv, grad, x, key=(1, 2), draw=0)
    with ak.backend("triton"):
        step = ak.pgd_step(adv, grad, x, 0.1, 0.03, cast=cast)
        key = torch.tensor([1, 2], device=DEVICE)
        ak.pgd_step_neighbours(adv, grad, x, 0.1, 0.03, 0.05, 2, key=key, out=buffer)
    assert same_bits(step, expected["step"])
    assert same_bits(cast, rounded(expected["step"], dtype))
    assert same_bits(buffer, rounded(expected["both"], dtype))
    assert cast.is_contiguous() != last and buffer.is_contiguous() != last


@runs
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_bits_of_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(0 if i == 0 else 1, 7)) for i in range(draw(st.integers(1, 4))))
    dtype, grad_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([*DTYPES, DOUBLE]))
    layouts = "".join(draw(st.sampled_from("cl")) for _ in range(3))
    how = {"layouts": layouts, "special": draw(st.booleans()), "device": DEVICE}
    numbers = [draw(st.floats(0, 2, width=32)) for _ in range(3)]
    check_against_reference(
        *problem(shape, dtype=dtype, grad_dtype=grad_dtype, **how), *numbers,
        count=draw(st.integers(0, 3)), descend=draw(st.booleans()), project=draw(st.booleans()),
        key=(draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 2**33))),
    )  # fmt: skip


def norms_on(backend, adv, grad, x, norm, eps, step, **options):
    clip = {name: options[name] for name in ("clip_min", "clip_max") if name in options}
    noise = {"key": torch.tensor([7, 5], device=adv.device), "ids": options.pop("ids", None), "draw": 3}
    with ak.backend(backend):
        cast, moved = to_layout(torch.empty_like(adv, dtype=HALF), True), adv.clone()
        return {
            "start": ak.random_start(x, eps, norm=norm, **noise, **clip),
            "step": ak.pgd_step(adv, grad, x, eps, step, norm=norm, cast=cast, **options),
            "cast": cast,
            "step in place": ak.pgd_step(moved, grad, x, eps, step, norm=norm, out=moved, **options),
            "step of APGD": apgd_step(adv, grad, x, eps, step, norm=norm, **options),
            "project": ak.project(adv, x, eps, norm=norm, **clip),
            "project linf": ak.project(adv, x, 0.05, **clip),
        } | {
            f"step, {sparsity}": ak.pgd_step(adv, grad, x, eps, step, norm=norm, sparsity=sparsity, **options)
            for sparsity in ((0.5, None) if norm == "l1" else ())
        }


def check_norms(adv, grad, x, *args, **options):
    got, expected = (norms_on(name, adv, grad, x, *args, **options) for name in ("triton", "reference"))
    for name, t in got.items():
        assert same_within_ulps(t, expected[name], x.to(t.dtype)), name


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize(("norm", "eps", "step"), [("l2", 0.6, 0.4), ("l1", 4.0, 2.0), ("l1", 0.1, 2.0)])
@pytest.mark.parametrize(
    ("shape", "dtype", "grad_dtype"),
    [((1, 3, 19, 23), SINGLE, SINGLE), ((3,), SINGLE, BRAIN), ((2, 3, 4, 4), HALF, SINGLE)],
)
def test_norms(shape, dtype, grad_dtype, norm, eps, step):
    check_norms(*problem(shape, dtype=dtype, grad_dtype=grad_dtype, device=DEVICE), norm, eps, step, descend=True)


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("layouts", ["ccc", "clc"])
def test_norms_per_sample_and_per_channel(layouts, norm):
    adv, grad, x = problem((5, 3, 5, 8), layouts=layouts, device=DEVICE)
    grad[1], grad[2, 0, 0, 0], adv[3, 0, 0, 0] = 0.0, float("nan"), float("inf")
    grad[4] *= 2.0**120
    eps, step = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE)
    clip = {"clip_min": torch.tensor([0.0, -0.1, -0.5], device=DEVICE), "clip_max": 1.5}
    active = torch.tensor([False, True, True, True, True], device=DEVICE)
    ids = torch.tensor([3, 1, 2**40 + 9, -4, 0], device=DEVICE)
    check_norms(adv, grad, x, norm, eps, step, active=active, ids=ids, **clip)


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("far", [1e6, 3e38])
def test_l1_projection_of_points_far_away(far):
    v, _, x = problem((2, 1, 4, 5), device=DEVICE)
    v.view(2, -1)[0, 4:16] = far * torch.linspace(1 - 1e-6, 1, 12, device=DEVICE)
    v.view(2, -1)[1, 8:] = -far
    with ak.backend("triton"):
        got = ak.project(v, x, 1.0, norm="l1")
    with ak.backend("reference"):
        assert same_within_ulps(got, ak.project(v, x, 1.0, norm="l1"), x)
    assert ((got - x).double().abs().flatten(1).sum(1) <= 1 + 1e-6).all()


@runs
def test_norms_refuse_what_they_do_not_compute():
    adv, grad, x = problem((2, 3, 4, 4), device=DEVICE)
    with ak.backend("triton"):
        with pytest.raises(BackendUnavailable, match="got float64"):
            ak.project(adv.double(), x.double(), 0.1, norm="l2")
        with pytest.raises(DoorError, match="largest is 49"):
            bounds, out = (0.0, None, 1.0, None), torch.empty_like(adv)
            torch.ops.atlas_kernels.pgd_step_norm(
                adv, grad, x, 2, 0.1, None, 0.1, None, *bounds, False, None, out, None, 49
            )
        with pytest.raises(DoorError, match="norm is 3"):
            torch.ops.atlas_kernels.project(adv, x, 3, 0.1, None, 0.0, None, 1.0, None, torch.empty_like(adv))
        assert ak.project(adv[:0], x[:0], 0.1, norm="l1").shape == (0, 3, 4, 4)


@runs
@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE], ids=str)
@pytest.mark.parametrize("size", [(9, 3), (2, 70), (5, 5)], ids=str)
def test_the_nuclear_norm(size, dtype):
    with ak.backend("triton"):
        for kind in ("full", "low") if dtype == SINGLE else ("full",):
            nuclear.check(nuclear.matrix(*size, kind, dtype=dtype, device=DEVICE))


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_the_nuclear_norm_of_special_matrices():
    for value in (0.0, torch.nan, torch.inf):
        d = torch.zeros(4, 3, device=DEVICE)
        d[2, 1] = value
        with ak.backend("triton"):
            norm, grad = nuclear.with_gradient(d)
        assert same_bits(torch.stack([norm, *grad.flatten()]), torch.full((13,), value - value, device=DEVICE))
    with ak.backend("triton"):
        norm, grad = nuclear.with_gradient(torch.empty(0, 3, device=DEVICE))
    assert norm.item() == 0.0 and grad.shape == (0, 3)


@runs
def test_empty_batch():
    for got in all_four("triton", *problem((0, 3, 8, 8), device=DEVICE)).values():
        assert got.shape == (0, 3, 8, 8)
    adv, _, _ = problem((2, 3, 8, 8), device=DEVICE)
    with ak.backend("triton"):
        assert ak.sample_neighbours(adv, 0.1, 0).shape == (0, 3, 8, 8)


@runs
def test_double_precision_is_refused():
    with pytest.raises(BackendUnavailable, match=r"got float64: convert them with .float\(\), or use backend"):
        all_four("triton", *problem((2, 3, 8, 8), dtype=DOUBLE, device=DEVICE))


@runs
def test_the_door():
    """Whoever calls the operator itself must not make the kernel read or write outside of a tensor."""
    adv, grad, x = problem((2, 3, 8, 8), device=DEVICE)
    out, key = torch.empty_like(adv), torch.tensor([1, 2], device=DEVICE)
    clip, step = (0.0, None, 1.0, None), torch.ops.atlas_kernels.pgd_step
    short = torch.ones(1, device=DEVICE)
    with ak.backend("triton"):
        for wrong in (grad[:1], grad.double()[..., :4].half(), grad[..., :1].expand_as(grad)):
            with pytest.raises(DoorError, match="grad is"):
                step(adv, wrong, x, 0.1, None, 0.1, None, *clip, False, None, out, None)
        with pytest.raises(DoorError, match="eps is"):
            step(adv, grad, x, 0.1, short, 0.1, None, *clip, False, None, out, None)
        with pytest.raises(DoorError, match="out is"):
            torch.ops.atlas_kernels.sample_neighbours(adv, 0.1, None, 2, None, 0.0, None, *clip, key, None, 0, out)
        with pytest.raises(DoorError, match="key is"):
            torch.ops.atlas_kernels.random_start(x, 0.1, None, *clip, key[:1], None, 0, out)
        with pytest.raises(ValueError, match="out shares memory with x"):
            ak.pgd_step(adv[:1], grad[:1], x[:1], 0.1, 0.1, out=x.flatten()[64:256].view(1, 3, 8, 8))


# --- without a GPU ----------------------------------------------------------------------------------------------------


@compiles
def test_in_the_interpreter():
    """Every comparison of this file on the CPU; TRITON_INTERPRET must be set before Triton is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 60, f"the comparisons did not run:\n{result.stdout[-2000:]}"


def tool_output(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia

    command = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(variant, capability) -> PTX, machine code and resource usage, compiled from scratch."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))

        def build(variant: str, capability: int) -> tuple[str, str, str]:
            of_stems = VARIANTS, NORM_VARIANTS, STORED_VARIANTS, MATRIX_VARIANTS, PLANE_VARIANTS
            variants = {name: make for stem in of_stems for name, make in stem.items()}
            assert len(variants) == sum(map(len, of_stems)), "two stems have a variant of one name"
            kernel = triton.compile_ahead(variants[variant](), capability)
            cubin = folder / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            usage = tool_output("cuobjdump", "-res-usage", cubin)
            return kernel.asm["ptx"], tool_output("nvdisasm", "-c", cubin), usage

        yield build


@runs
@pytest.mark.parametrize("layouts", ["cccc", "llll", "clcl", "lccc"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 40, 41), (2, 40, 5, 5)], ids=str)
def test_bits_of_stored_perturbations(shape, layouts):
    for dtype, store, special in ((SINGLE, SINGLE, True), (SINGLE, HALF, False), (HALF, SINGLE, False)):
        inputs = stored.case(shape, dtype=dtype, store=store, layouts=layouts, special=special, device=DEVICE)
        with ak.backend("triton"):
            stored.check(*inputs, layouts=layouts, step_size=0.07)


@runs
def test_bits_of_stored_perturbations_per_sample_and_per_channel(monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    for layouts in ("cccc", "llll", "clcl"):
        x, grad, d, m, _ = stored.case((5, 3, 5, 8), layouts=layouts, device=DEVICE)
        rows = [torch.rand(5, device=DEVICE) * 0.2 for _ in "12"]
        clip = {"clip_min": torch.tensor([0.0, 0.1, -0.5], device=DEVICE), "clip_max": [1.0, 0.8, 2.0]}
        index = torch.tensor([2, -1, 0, 8, 2**40], device=DEVICE)
        with ak.backend("triton"):
            stored.check(x, grad, d, m, index, rows[0], step_size=rows[1], **clip)
            stored.check(x, grad, d[:0], m[:0], index)


@runs
@pytest.mark.parametrize("layouts", ["ccc", "clc"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_steps_to_a_hyperplane(norm, layouts):
    for shape, dtype in (((2, 3, 5, 8), SINGLE), ((3, 10), HALF), ((1, 3, 20, 41), SINGLE)):
        inputs = hyperplane.case(shape, dtype=dtype, layouts=layouts, device=DEVICE)
        with ak.backend("triton"):
            hyperplane.check(*inputs, norm)
    with ak.backend("triton"):
        hyperplane.check(*hyperplane.case((4, 3, 4, 5), special=True, device=DEVICE), norm, clip_max=[1.0, 1.5, 2.0])


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_ahead_of_time(compiled, variant, capability):
    ptx, sass, usage = compiled(variant, capability)
    # Nothing that would change bits: contraction, flushed denormals, minima that drop NaN, truncation.
    for forbidden in ("fma.", "mad.f", ".ftz", "min.f32", "max.f32", "min.NaN", "max.NaN", "cvt.rz"):
        assert forbidden not in re.sub(r"cvt\.rzi|//.*", "", ptx), forbidden
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage) and not re.search(r"\b(LDL|STL)\b", sass), "registers spill"
    images = re.findall(r"\b((?:LDG|STG)\.E(?:\.U?\d+)?)", sass)
    if "channels_last" in variant or "one pixel" in variant:
        return
    # Four pixels an access, and for noise as well: the words never pass through shared memory.
    assert not re.search(r"\b(LDS|STS)\b", sass)
    stores = [access for access in images if access.startswith("STG")]
    narrow = variant in ("step, fp16", "step, bf16")
    assert stores and set(stores) == {"STG.E.64" if narrow else "STG.E.128"}


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", NORM_VARIANTS)
def test_norms_compile_ahead_of_time(compiled, variant, capability):
    """fp32 is neither contracted nor flushed; in fp64 only the logarithm and the exponential are the library's."""
    ptx, sass, usage = compiled(variant, capability)
    ptx = re.sub(r"max\.f32 .*, 0f00000000;", "", ptx)  # Triton 3.6 makes it of v > 0 ? v : 0, which drops NaN too
    forbidden = ["fma.rn.f32", "mad.f", "min.f", "max.f", "sqrt.approx", "div.full", "div.approx"]
    for operation in [*forbidden, *([] if "start" in variant else ["fma.", ".ftz"])]:
        assert operation not in re.sub(r"//.*", "", ptx), operation
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage) and not re.search(r"\b(LDL|STL)\b", sass), "registers spill"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", PLANE_VARIANTS)
def test_steps_to_a_hyperplane_compile_ahead_of_time(compiled, variant, capability):
    """Neither contracted nor flushed, and quotients and roots are exact; minima and maxima are of what is no NaN."""
    ptx, sass, usage = compiled(variant, capability)
    for operation in ("fma.rn.f32", "mad.f", ".ftz", "sqrt.approx", "div.full", "div.approx"):
        assert operation not in re.sub(r"//.*", "", ptx), operation
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage) and not re.search(r"\b(LDL|STL)\b", sass), "registers spill"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", STORED_VARIANTS)
def test_stored_perturbations_compile_ahead_of_time(compiled, variant, capability):
    """The quotient alone may use fused operations, which round it correctly."""
    ptx, sass, usage = compiled(variant, capability)
    for operation in ("fma.", "mad.f", ".ftz", "min.f", "max.f", "div.full", "div.approx", "cvt.rz"):
        assert operation not in re.sub(r"cvt\.rzi|//.*", "", ptx), operation
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage) and not re.search(r"\b(LDL|STL)\b", sass), "registers spill"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", MATRIX_VARIANTS)
def test_the_nuclear_norm_compiles_ahead_of_time(compiled, variant, capability):
    """In double precision throughout; vectors pass from thread to thread, but never by the cache for constants. No more
    than a few numbers, which loops count, leave the registers."""
    ptx, _, usage = compiled(variant, capability)
    for operation in ("fma.", "mad.f", "f32.approx", "ld.global.nc", "sqrt.approx", "div.approx", "div.full"):
        assert operation not in re.sub(r"//.*", "", ptx), operation
    stack = re.search(r"STACK:(\d+) .*LOCAL:0 ", usage)
    assert "bar.sync" in ptx and stack and int(stack[1]) <= 32


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_flat_single_precision_is_four_wide(compiled, capability):
    ptx, sass, _ = compiled("step", capability)
    assert set(re.findall(r"(?:ld|st)\.global\S*", ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert set(re.findall(r"(?:LDG|STG)\.E\S*", sass)) == {"LDG.E.128", "STG.E.128"}


@compiles
@pytest.mark.parametrize(("variant", "conversion"), [("step, bf16", "cvt.rn.bf16"), ("step, fp16", "cvt.rn.f16")])
def test_sixteen_bits_are_rounded_to_nearest(compiled, variant, conversion):
    """What the interpreter cannot show for bfloat16."""
    ptx, _, _ = compiled(variant, 80)
    assert conversion in ptx


@compiles
@pytest.mark.parametrize(
    "variant", ["step", "step and neighbours, per sample and channel", "step, more than 2**31 pixels"]
)
def test_what_is_launched_is_what_was_inspected(variant, compiled_at_launch):
    plan = VARIANTS[variant]()
    assert compiled_at_launch(plan).asm["cubin"] == triton.compile_ahead(plan, 90).asm["cubin"]


@compiles
def test_the_launch_covers_the_images_and_asks_for_the_options():
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.update(grid=grid, arguments=arguments, options=options)

    plan = VARIANTS["step"]()
    triton.launch(plan._replace(kernel=Kernel()), torch.device("cpu"))
    assert seen == {"grid": (128 * 3 * 32 * 32 // TILE,), "arguments": plan.arguments, "options": triton.OPTIONS}
    assert 32 * triton.OPTIONS["num_warps"] <= TILE, "else two threads may load one pixel of an in-place step"


@compiles
def test_reasons_say_what_to_do(monkeypatch):
    assert "start Python with TRITON_INTERPRET=1" in str(unavailable_reason("triton", "cpu"))
    assert "not for mps" in str(unavailable_reason("triton", "mps"))
    if not torch.cuda.is_available():
        assert "PyTorch sees no CUDA device" in str(unavailable_reason("triton", "cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in str(unavailable_reason("triton", "cuda"))


@compiles
def test_triton_is_imported_only_when_it_is_chosen():
    code = "import sys, atlas_kernels.backends.triton; assert 'triton' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_replays_read_the_key_again():
    _, _, x = problem((4, 3, 8, 8), device="cuda")
    key, out = torch.tensor([1, 0], device="cuda"), torch.empty_like(x)
    with ak.backend("triton"):
        ak.random_start(x, 0.1, key=key, out=out)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ak.random_start(x, 0.1, key=key, out=out)
        key.copy_(torch.tensor([2, 3]))
        graph.replay()
    with ak.backend("reference"):
        assert same_bits(out, ak.random_start(x, 0.1, key=key))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_current():
    check_against_reference(*problem((2, 3, 8, 8), device="cuda:1"))
