"""The CUDA library without a GPU: no warning in the build, machine code as it was meant, and it loads anywhere."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from atlas_kernels.schema import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90")
STRICT = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]


def nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = next((str(p) for h in homes if h and (p := Path(h, "bin", "nvcc")).exists()), None) or shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    return found


def cuobjdump() -> str:
    """The disassembler, which toolkits may leave out, but Triton brings along."""
    triton = importlib.util.find_spec("triton")
    packages = (triton and triton.submodule_search_locations) or []
    folders = [Path(nvcc()).resolve().parent, *(Path(p, "backends", "nvidia", "bin") for p in packages)]
    found = next((str(p) for f in folders if (p := f / "cuobjdump").exists()), None) or shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump was found neither beside nvcc nor in the triton package")
    return found


def dump(what: str, path: Path) -> list[str]:
    return subprocess.run(
        [cuobjdump(), what, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def project_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, which cannot be imported: it would start a build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            return ast.literal_eval(node.value).split()
    raise AssertionError("setup.py no longer has NVCC_FLAGS")


def installed(command: list[str]) -> Path | None:
    """The folder of the last build, if ``command`` compiled there and ninja finds nothing that changed since."""
    folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    rules = folder / "build.ninja"
    if importlib.util.find_spec("ninja") is None or not rules.exists():
        return None
    if f"  command = {' '.join(command)} -MMD" not in rules.read_text():
        return None
    dry_run = [sys.executable, "-m", "ninja", "-C", str(folder), "-n", "libatlas_cuda.so"]
    told = subprocess.run(dry_run, capture_output=True, text=True)
    return folder if told.returncode == 0 and "no work to do" in told.stdout else None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The object of each .cu file: those of the installed library where warnings were errors, as in .ci/run."""
    command = [nvcc(), *project_flags()]
    for arch in ARCHS:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}", *STRICT]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if folder := installed(command):
        return {source.stem: folder / f"{source.stem}.cu.o" for source in sources}
    folder = tmp_path_factory.mktemp("cuda")
    for source in sources:
        compiling = [*command, "-c", str(source), "-o", str(folder / f"{source.stem}.cu.o")]
        result = subprocess.run(compiling, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return {source.stem: folder / f"{source.stem}.cu.o" for source in sources}


@pytest.fixture(scope="module")
def library(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    objects = [str(path) for path in built.values()]
    target = tmp_path_factory.mktemp("linked") / "libatlas_cuda.so"
    subprocess.run([nvcc(), "-shared", "-cudart", "static", *objects, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def machine_code(built: dict[str, Path]) -> dict[tuple[str, str, str], list[str]]:
    """The operations of every kernel, in order, by (stem, architecture, mangled name)."""
    code: dict[tuple[str, str, str], list[str]] = {}
    for stem, path in built.items():
        arch, operations = "", []
        for line in dump("-sass", path):
            if found := re.search(r"arch = (sm_\d+)", line):
                arch = found[1]
            elif found := re.search(r"Function : (\S+)", line):
                operations = code.setdefault((stem, arch, found[1]), [])
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
                operations.append(found[1])
    return code


def test_every_file_compiles_without_a_warning(built):
    assert {*OPERATORS, "runtime"} == built.keys()


def test_ci_installs_what_is_looked_at_here():
    """Else every file would be compiled twice there."""
    assert f'NVCCFLAGS="{" ".join(STRICT)}"' in (ROOT / ".ci" / "run").read_text()


def test_nothing_is_spilled(built, machine_code):
    looked_at = set()
    for stem, path in built.items():
        arch = ""
        for line, following in itertools.pairwise(dump("-res-usage", path)):
            if found := re.search(r"arch = (sm_\d+)", line):
                arch = found[1]
            elif found := re.search(r"Function (\S+):", line):
                assert re.search(r"STACK:0 .*LOCAL:0 ", following), (arch, found[1], following)
                looked_at.add((stem, arch, found[1]))
    assert looked_at == machine_code.keys()
    for stem in built:
        assert {arch for at, arch, _ in looked_at if at == stem} == (
            {f"sm_{a}" for a in ARCHS} if stem != "runtime" else set()
        )


def perturb_kernels(machine_code: dict[tuple[str, str, str], list[str]], arch: str) -> dict[str, list[str]]:
    return {name: code for (stem, at, name), code in machine_code.items() if (stem, at) == ("perturb", f"sm_{arch}")}


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_kernels_access_128_bits(machine_code, arch):
    kernels = {name: code for name, code in perturb_kernels(machine_code, arch).items() if "Vectors" in name}
    assert len(kernels) == 11
    for name, code in kernels.items():
        assert any(op.startswith("LDG.") and op.endswith(".128") for op in code), name
        assert any(op.startswith("STG.") and op.endswith(".128") for op in code), name


@pytest.mark.parametrize("arch", ARCHS)
def test_steps_are_not_contracted(machine_code, arch):
    """adv + step * sign and adv + radius * noise round twice, as on every backend."""
    kernels = perturb_kernels(machine_code, arch)
    assert len(kernels) == 13
    for name, code in kernels.items():
        families = {op.split(".")[0] for op in code}
        assert families >= ({"DMUL", "DADD"} if "SinglesId" in name else {"FMUL", "FADD"})
        assert not families & {"FFMA", "DFMA"}, name


@pytest.mark.parametrize("arch", ARCHS)
def test_stored_perturbations_move_in_vectors_and_are_summed_in_order(machine_code, arch):
    """Wide accesses where they can be, and no atomics; rows are under way before the sums are folded."""
    kernels = {n: code for (stem, at, n), code in machine_code.items() if (stem, at) == ("stored", f"sm_{arch}")}
    assert len(kernels) == 8 + 14
    for name, code in kernels.items():
        assert not {op.split(".")[0] for op in code} & {"ATOM", "ATOMG", "RED"}, name
        if "Vectors" in name:
            wide = {
                kind for kind in ("LDG.", "STG.") if any(op.startswith(kind) and op.endswith(".128") for op in code)
            }
            assert wide == {"LDG.", "STG."}, name
            loads = [i for i, op in enumerate(code) if op.startswith("LDG.") and op.endswith(".128")]
            assert "Lb1E" not in name or max(loads) < min(i for i, op in enumerate(code) if op.startswith("BAR")), name


@pytest.mark.parametrize("arch", ARCHS)
def test_losses_are_not_contracted(machine_code, arch):
    """Those that do not divide, which takes fused operations: the sums of squares of logit_pairing are made without."""
    pairing = "Li7E"
    kernels = {
        name: code for (stem, at, name), code in machine_code.items()
        if (stem, at) == ("losses", f"sm_{arch}") and "losses_kernel" in name and pairing in name
    }  # fmt: skip
    assert len(kernels) == 6
    for name, code in kernels.items():
        families = {op.split(".")[0] for op in code}
        assert families >= ({"DMUL", "DADD"} if "RowId" in name else {"FMUL", "FADD"})
        assert not families & {"FFMA", "DFMA"}, name


@pytest.mark.parametrize("arch", ARCHS)
def test_losses_of_few_classes_need_no_barrier(machine_code, arch):
    """A row is folded by shuffles within its warp."""
    for (stem, at, name), code in machine_code.items():
        if stem in ("losses", "objectives") and at == f"sm_{arch}" and "3RowI" in name:
            families = {op.split(".")[0] for op in code}
            assert "SHFL" in families and ("BAR" in families) == ("Lb1E" in name), name


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_kernels_load_before_they_compute(machine_code, arch):
    """Up to the last load of images no arithmetic waits for an earlier one: all tensors are under way at once."""
    for name, code in perturb_kernels(machine_code, arch).items():
        if "Vectors" in name:
            last_load = max(i for i, op in enumerate(code) if op.startswith("LDG.") and op.endswith(".128"))
            arithmetic = [i for i, op in enumerate(code) if op.split(".")[0] in ("FADD", "FMUL", "FSET")]
            assert last_load < min(arithmetic), name


@pytest.mark.parametrize("arch", ARCHS)
def test_augment_stores_128_bits(machine_code, arch):
    """A vector of 8, 4 or 2 elements is one store; unaligned results go one by one."""
    kernels = {name: code for (stem, at, name), code in machine_code.items() if (stem, at) == ("augment", f"sm_{arch}")}
    assert len(kernels) == 16
    for name, code in kernels.items():
        stores = [op for op in code if op.startswith("STG.")]
        assert len(stores) == 2, name
        assert all(op.endswith(".128") for op in stores) is ("Li1E" not in name), name


@pytest.mark.parametrize("arch", ARCHS)
def test_augment_loads_do_not_wait(machine_code, arch):
    """Every byte of a vector is under way before one is converted."""
    for (stem, at, name), code in machine_code.items():
        if (stem, at) == ("augment", f"sm_{arch}") and "Li1E" not in name and "Lb0E" in name:
            vector = int(re.search(r"Li(\d)E", name)[1])
            loads = [i for i, op in enumerate(code) if op.startswith("LDG.") and ".U8" in op]
            first = next(i for i, op in enumerate(code) if op.split(".")[0] in ("I2F", "I2FP"))
            assert len(loads) == 2 * vector and sum(i < first for i in loads) >= vector, name


@pytest.mark.parametrize("arch", ARCHS)
def test_pairs_come_from_shared_memory_in_wide_reads(machine_code, arch):
    """The weights of two pairs or more a read, nothing contracted, and no atomics: sums are in a fixed order."""
    kernels = {n: c for (stem, at, n), c in machine_code.items() if (stem, at) == ("pairwise", f"sm_{arch}")}
    assert len(kernels) == 6
    for name, code in kernels.items():
        assert not {op.split(".")[0] for op in code} & {"FFMA", "DFMA", "ATOM", "ATOMG", "RED"}, name
        assert "L1Sum" not in name or "LDS.128" in code, name


@pytest.mark.parametrize("arch", ARCHS)
def test_norm_kernels_access_128_bits_and_add_in_double_precision(machine_code, arch):
    kernels = {n: code for (stem, at, n), code in machine_code.items() if (stem, at) == ("perturb_norms", f"sm_{arch}")}
    assert len(kernels) == 8
    for name, code in kernels.items():
        assert "DADD" in {op.split(".")[0] for op in code}, name
        if "Vectors" in name:
            assert any(op.startswith("LDG.") and op.endswith(".128") for op in code), name
            assert any(op.startswith("STG.") and op.endswith(".128") for op in code), name


def test_library_needs_nothing_of_cuda_or_torch(library):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf was not found")
    dynamic = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|nvrtc|torch|c10)", dynamic)


def test_library_fails_cleanly_without_a_driver(library):
    """It loads, says that there is no driver, and a launch is an error with CUDA's own text."""
    built, driver, devices = ctypes.c_int(-1), ctypes.c_int(-1), ctypes.c_int(-1)
    cuda = ctypes.CDLL(str(library))
    status = cuda.atlas_cuda_runtime(ctypes.byref(built), ctypes.byref(driver), ctypes.byref(devices))
    assert built.value >= 11000
    if driver.value:
        pytest.skip("this machine has a CUDA driver")
    assert status > 0 and driver.value == 0 and devices.value == 0
    # In a process of its own: a process has one CUDA library, and this is not the installed one.
    script = f"""
import torch
from atlas_kernels.core import core
core().load_cuda({str(library)!r})
assert core().cuda_runtime()[1:3] == (0, 0)
core().on_cuda(0)
x = torch.rand(2, 3, 4, 4)
torch.ops.atlas_kernels.pgd_step(x, x, x, 0.1, None, 0.1, None, 0.0, None, 1.0, None, False, None, x.clone(), None)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1 and "RuntimeError: atlas_perturb: CUDA: CUDA driver version" in result.stderr
