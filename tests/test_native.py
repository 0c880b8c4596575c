"""The native core's door, threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels.backends import door
from atlas_kernels.backends.door import DoorError
from atlas_kernels.core import alike, available_isas, core, force_isa
from operator_cases import problem, same_bits

OPS = torch.ops.atlas_kernels


def test_a_core_of_other_files_says_so(monkeypatch):
    """As after an update of the source tree alone."""
    monkeypatch.setitem(sys.modules, "atlas_kernels._C", ModuleType("atlas_kernels._C"))
    with pytest.raises(ImportError, match="was built from other files than these; run `pip install -e .`"):
        core.__wrapped__()


def test_a_core_without_an_operator_says_so(monkeypatch):
    """As it was built before the operator came."""
    monkeypatch.setattr(door, "arguments_of", lambda operator: ())
    with pytest.raises(ImportError, match="new_operator: the native core was built from other files than these"):
        door.plan_of("new_stem", "new_operator")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_wrong_passes_the_door(data):
    """One argument of a valid call is spoilt: the operator itself, called past the public checks, must refuse."""
    adv, grad, x = problem((2, 3, 4, 4))
    key, ids, active = torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.ones(2, dtype=torch.bool)
    rows, channels, out = torch.rand(2), torch.rand(3), torch.full((6, 3, 4, 4), 7.0)
    args = dict(adv=adv, grad=grad, x=x, e=0.1, eps=rows, s=0.1, step_size=rows, r=0.1, radius=rows, count=1,
                project=True, include_x=True, lo=0.0, clip_min=channels, hi=1.0, clip_max=channels, descend=False,
                active=active, key=key, ids=ids, draw=0, out=out)  # fmt: skip
    OPS.pgd_step_neighbours(*args.values())
    name = data.draw(st.sampled_from([n for n, a in args.items() if isinstance(a, torch.Tensor)]))
    good = args[name]
    spoilt = {
        "dtype": lambda: good.to(torch.complex64),
        "integers": lambda: good.to(torch.int32),
        "rows": lambda: good[:-1],
        "more rows": lambda: torch.cat([good, good]),
        "strides": lambda: torch.stack([good, good], -1)[..., 0],
        "one value": lambda: good.flatten()[:1].expand(good.shape),
        "device": lambda: good.to("meta"),
    }[data.draw(st.sampled_from(["dtype", "integers", "rows", "more rows", "strides", "one value", "device"]))]()
    args[name], out[:] = spoilt, 7.0
    with pytest.raises((DoorError, ValueError, RuntimeError, NotImplementedError)):
        OPS.pgd_step_neighbours(*args.values())
    assert (out == 7.0).all()


def test_alike_is_said_of_plain_images_alone():
    x = torch.rand(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert alike(x, last) and alike(x, x, x.half()) and alike(x.double().requires_grad_(), x.double(), x)
    for other in (
        x.half(), x[:1], x[..., :2], x[..., ::2], x.int(), x.to("meta"), x.to_sparse(), torch.nn.Parameter(x),
        x.expand(2, 2, 3, 4, 4)[0, :, :, :1].expand(2, 3, 4, 4), None, "x",
    ):  # fmt: skip
        assert not alike(x, other), other


def test_isas_are_listed_and_checked():
    isas = available_isas()
    assert isas[0] == "baseline"
    with pytest.raises(ValueError, match="unknown: choose from baseline, v3, v4"):
        force_isa("v5")
    if "v4" not in isas:
        with pytest.raises(ValueError, match="this machine runs at most"):
            force_isa("v4")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_isa_of_the_environment():
    code = "from atlas_kernels.core import core; print(core().current_isa())"
    for number, isa in enumerate(available_isas()):
        assert run_python(code, ATLAS_ISA=isa).strip() == str(number)


def test_one_openmp_runtime():
    if not core().openmp:
        pytest.skip("built without OpenMP")
    code = """
import torch, atlas_kernels as ak
ak.pgd_step(*[torch.rand(64, 3, 32, 32)] * 3, 0.1, 0.1)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}))
"""
    assert run_python(code).strip() == "1"


def test_calls_from_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    adv, grad, x = problem((64, 3, 32, 32))
    expected = ak.pgd_step(adv, grad, x, 0.1, 0.03)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ak.pgd_step(adv, grad, x, 0.1, 0.03), range(16)))
    assert all(same_bits(r, expected) for r in results)


def test_calls_in_a_forked_loader_worker():
    code = """
import torch, atlas_kernels as ak
class Starts(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return ak.random_start(torch.full((64, 3, 32, 32), 0.5), 0.1, key=torch.tensor([i, 0]))
torch.set_num_threads(2)
here = [Starts()[i] for i in range(4)]  # the parent's thread pool exists before the fork
loader = torch.utils.data.DataLoader(Starts(), batch_size=None, num_workers=2, multiprocessing_context="fork")
print(all(torch.equal(a, b) for a, b in zip(loader, here)))
"""
    assert run_python(code).strip() == "True"


def test_backend_of_the_environment():
    code = "import torch, atlas_kernels as ak; print(ak.pgd_step(*[torch.rand(2, 2)] * 3, 0.1, 0.1).shape)"
    assert "[2, 2]" in run_python(code, ATLAS_BACKEND="reference")
    with pytest.raises(AssertionError, match="ATLAS_BACKEND='tritn' is unknown: .*; did you mean 'triton'"):
        run_python(code, ATLAS_BACKEND="tritn")


def test_doctor_says_what_runs_here():
    told = subprocess.run([sys.executable, "-m", "atlas_kernels"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert f"instruction set {available_isas()[-1]}" in told.stdout
    assert "native on cpu        yes (default)" in told.stdout
    if not torch.cuda.is_available():
        assert "native on cuda       no: " in told.stdout


def test_doctor_tells_what_is_wrong_with_the_environment():
    wrong = {"ATLAS_BACKEND": "tritn", "ATLAS_ISA": "avx\n", "ATLAS_CHECKS": "yes", "ATLAS_BACKND": "native"}
    told = run_python("from atlas_kernels.doctor import main; main()", **wrong)
    for line in (
        "ATLAS_BACKEND='tritn' is unknown: choose from reference, native, triton; did you mean 'triton'?",
        r"ATLAS_ISA='avx\n' is unknown: choose from baseline, v3, v4",
        "ATLAS_CHECKS='yes' is unknown: choose from 0, 1",
        "ATLAS_BACKND is no variable of atlas-kernels, which are ATLAS_BACKEND, ATLAS_ISA, ATLAS_CHECKS, ATLAS_CUDA",
    ):
        assert f"WARNING              {line}" in told
