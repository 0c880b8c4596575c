"""Settings every test runs under: uninitialised memory is NaN, so an output that a kernel forgot to write fails.

On CUDA float32 is float32, also in convolutions, which by PyTorch's default may round their inputs to TF32; and what
PyTorch and its libraries can compute to the same bits in every call, they do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from atlas_kernels import backend
from atlas_kernels.backends import triton, unavailable_reason
from atlas_kernels.core import available_isas, force_isa
from failures import pytest_addoption, pytest_configure  # noqa: F401 (pytest looks for them here)
from order import pytest_collection_modifyitems, pytest_sessionstart  # noqa: F401 (the same)

# The same draws in every run, so that a change is judged and not the dice; `--hypothesis-profile default` rolls them.
# No deadline: the machine may be busy.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# Of cuBLAS; without it torch warns of every matrix product. Read when the first is made, here or in a test's process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True, scope="session")
def _no_tf32() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    yield
    convolutions.allow_tf32, products.allow_tf32 = before


@pytest.fixture(autouse=True, scope="session")
def _usual_signals() -> Iterator[None]:
    """Those of a process in the foreground, which tests send: one started with nohup, or by a script with &, ignores
    some of them."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in usual.items()}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture(autouse=True)
def _strict_memory():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # also what switches the filling on
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


#: Files of tests that train or attack tiny networks begin so.
TINY = ("test_train", "test_compat", "test_example", "test_attack", "test_atlas_study", "test_bench", "test_one_step")
TINY += ("test_readme", "test_recipe", "test_robustness", "test_speedrun")


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """More threads would only wait for each other."""
    before = torch.get_num_threads()
    if request.module.__name__.startswith(TINY):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restored_isa_and_threads() -> Iterator[None]:
    """For tests that force instruction sets and numbers of threads."""
    isa, threads = available_isas()[-1], torch.get_num_threads()
    yield
    force_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is: tests that take it run on CUDA too where one is at hand."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


ENGINES = ["reference cpu", "native cpu baseline", "native cpu v3", "native cpu v4"]
ENGINES += [pytest.param(f"{name} cuda", marks=pytest.mark.gpu) for name in ("reference", "native", "triton")]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Whatever can run an operator here, one after the other: forces backend and instruction set, gives the device."""
    name, device, *isa = request.param.split()
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if isa and isa[0] not in available_isas():
        pytest.skip(f"this machine cannot run {isa[0]}")
    if reason := unavailable_reason(name, device):
        pytest.skip(reason)
    with backend(name):
        if isa:
            force_isa(isa[0])
        yield torch.device(device)
    if isa:
        force_isa(available_isas()[-1])


@pytest.fixture
def compiled_at_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[triton.Launch], Any]:
    """What Triton's own launch path compiles for compute 9.0, on a driver that stops short of launching. Anew: what an
    earlier process kept may be of another ptxas, since PyTorch's compiler brings its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 99)  # of which Triton keeps nothing
        get_current_stream = staticmethod(lambda device: 0)

    monkeypatch.setattr(driver, "_active", NoDriver())
    return lambda plan: plan.kernel.run(*plan.arguments, grid=(plan.programs,), warmup=True, **triton.OPTIONS)
