"""csrc/core/math.h: exp and log against fp64, over all kinds of fp32 numbers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from atlas_kernels.core import available_isas

SOURCE = Path(__file__).resolve().parent / "math_ulp.cpp"
LANES = {"baseline": 4, "v3": 8, "v4": 16}


@pytest.mark.parametrize("isa", LANES)
def test_exp_and_log_within_one_ulp(isa: str, tmp_path: Path) -> None:
    """Whole range, subnormal, infinite and NaN included; ``math_ulp 1`` looks at every number there is."""
    if not shutil.which("g++"):
        pytest.skip("g++ was not found")
    if isa not in available_isas():
        pytest.skip(f"this machine does not run {isa}")
    program = tmp_path / "math_ulp"
    target = [] if isa == "baseline" else [f"-DBEGIN_TARGET=ATLAS_BEGIN_{isa.upper()}"]
    flags = ["-std=c++17", "-O2", "-Wno-psabi", "-ffp-contract=off", f"-DLANES={LANES[isa]}", *target]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
    result = subprocess.run([str(program), "997"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    worst = [float(number) for number in result.stdout.split()]
    assert len(worst) == 3 and all(0 < ulp <= 1 for ulp in worst), worst
