"""Which precision is fast on a device: what "auto" takes, and who is warned of what, once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atlas_kernels import PGD, Execution, precision
from atlas_kernels.precision import cpu_report, taken, warn_if_slow
from atlas_train import cli, compare, engine, stored
from atlas_train.config import TrainConfig
from tiny_runs import TINY, splits

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AVX2 = {"avx2": True}
AVX512 = AVX2 | {"avx512_f": True, "avx512_bw": True}
ZEN4, SAPPHIRE = AVX512 | {"avx512_bf16": True}, AVX512 | {"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}
GRAVITON = {"neon": True, "sve": True, "bf16": True}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the CPU, and what its user tells oneDNN, another; nothing was warned of before."""
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)

    def make(has: dict[str, bool], limit: str = "") -> None:
        warn_if_slow.cache_clear()
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        monkeypatch.setattr(precision, "_capabilities", lambda: has)

    yield make
    warn_if_slow.cache_clear()


def warned(*calls: tuple[str, torch.device]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for call in calls:
            warn_if_slow(*call)
    return [str(each.message) for each in seen]


@pytest.mark.parametrize(
    ("has", "limit", "auto", "slower"),
    [
        (ZEN4, "", "bf16", None),
        (SAPPHIRE, "", "bf16", None),
        (AVX512, "", "fp32", "several times"),
        (AVX2, "", "fp32", "several times"),
        (ZEN4, "AVX512_CORE", "fp32", "several times"),
        (SAPPHIRE, "avx2", "fp32", "several times"),
        (SAPPHIRE, "AVX512_CORE_BF16", "bf16", None),
        (GRAVITON, "", "fp32", None),
        ({}, "", "fp32", None),
    ],
)
def test_bf16_goes_by_what_the_cpu_has_and_onednn_may_use(machine, has, limit, auto, slower) -> None:
    machine(has, limit)
    assert taken("auto", CPU) == auto and taken("bf16", CPU) == "bf16" and taken("keep", CPU) == "keep"
    told = warned(("bf16", CPU), ("fp32", CPU), ("keep", CPU), ("bf16", CPU))
    assert len(told) == (slower is not None), "warned of, and once"
    assert not told or ("AVX-512 BF16 or AMX BF16" in told[0] and slower in told[0] and '"auto"' in told[0])
    assert ("bf16 pays here" if auto == "bf16" else "keep to fp32") in cpu_report()
    assert (slower or "") in cpu_report() and (limit.upper() in cpu_report())


def test_fp16_is_warned_of_where_no_instructions_multiply_in_it(machine) -> None:
    machine(ZEN4)
    (told,) = warned(("fp16", CPU), ("fp16", CPU))
    assert "fp16 is slow on this CPU" in told and "several times" in told
    machine(SAPPHIRE)
    assert not warned(("fp16", CPU))


def test_a_gpu_without_bf16_is_told_apart(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(AVX2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    for capability, auto in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        warn_if_slow.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert taken("auto", CUDA) == auto
        told = warned(("bf16", CUDA), ("fp16", CUDA))
        assert told == [] if auto == "bf16" else "bf16 is slow on T4" in told[0] and len(told) == 1


def test_this_cpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own names, and by those that torch had before."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if "avx2" in flags:
        for flag, name in (("avx2", "AVX2"), ("avx512_bf16", "AVX-512 BF16"), ("avx512_fp16", "AVX-512 FP16")):
            assert (flag in flags) == (name in cpu_report())
        singly = precision._asked_singly()
        assert singly == {flag: precision._capabilities().get(flag, False) for flag in singly}


# --- attacks


def test_an_execution_takes_it_and_warns(machine) -> None:
    seen: list[torch.dtype] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    network[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])

    def attacked(execution: Execution) -> None:
        with execution:
            PGD(0.1, steps=1)(network, x, y)

    for has, auto in ((ZEN4, torch.bfloat16), (AVX2, torch.float32)):
        machine(has)
        execution = Execution("auto")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attacked(execution)
        assert seen.pop() == auto and execution.precision_on("cpu") == ("bf16" if has is ZEN4 else "fp32")
    with pytest.warns(UserWarning, match='bf16 is slow on this CPU.*"auto"') as told:
        attacked(Execution("bf16"))
        attacked(Execution("bf16"))
    assert len(told) == 1 and seen == [torch.bfloat16] * 2, "the user is asked for nothing, and gets what he asked for"


# --- the trainer


def test_a_run_takes_it_records_it_and_keeps_it_on_another_machine(machine, tmp_path: Path) -> None:
    machine(ZEN4)
    both = {"train_precision": "auto", "attack_precision": "auto"}
    settings = TINY | both | {"epochs": 1, "out_dir": str(tmp_path / "run")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compare.compare(TrainConfig("standard", **settings), splits=splits(), show="silent", say=lambda line: None)
    folder = tmp_path / "run" / "standard"
    assert '"train_precision": "bf16"' in (folder / "results.json").read_text()
    machine(AVX2)
    with pytest.warns(UserWarning, match="bf16 is slow on this CPU") as told:
        run = stored.resume(folder, splits=splits(), epochs=2)
    assert len(told) == 1 and run.config.train_precision == run.execution.precision == "bf16"
    run = stored.resume(folder, splits=splits(), epochs=3, **both)
    assert run.config.train_precision == run.config.attack_precision == run.execution.precision == "fp32"
    assert run.changes[-1]["changed"]["train_precision"] == ["bf16", "fp32"]


@pytest.mark.parametrize("which", ["train_precision", "attack_precision"])
def test_a_run_that_is_slow_says_so(machine, which: str) -> None:
    machine(AVX2)
    config = TrainConfig("standard", **TINY | {"epochs": 1, which: "bf16"})
    with pytest.warns(UserWarning, match='bf16 is slow on this CPU.*"auto"') as told:
        engine.train(config, splits=splits(16))
        engine.train(config, splits=splits(16))
    assert len(told) == 1


def test_auto_and_none_are_two_words_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(compare, "compare", lambda config, command: seen.append(config))
    for word in ("auto", "none", "bf16"):
        assert cli.main(["train", "--attack-precision", word]) == 0
    assert [config.attack_precision for config in seen] == ["auto", None, "bf16"]


# --- Triton's interpreter


def test_the_interpreter_is_warned_of_once() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch, warnings; from atlas_kernels import cross_entropy, backend\n"
        "with warnings.catch_warnings(record=True) as seen, backend('triton'):\n"
        "    warnings.simplefilter('always')\n"
        "    for rows in (2, 3): cross_entropy(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.long))\n"
        "told = [w for w in seen if 'interpreter' in str(w.message)]\n"
        "print(len(told), told[0].filename, told[0].message)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.stdout.startswith("1 ") and 'backend("native")' in out.stdout, out.stdout + out.stderr
