"""The scaling study measures what it says, beside floors made of the same passes; its tables, figures and scripts."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import choices
import profile_step
import scaling
import subjects
from atlas_kernels.attacks import batch, objective
from atlas_train.config import from_file
from atlas_train.step_graph import StepGraph
from fake_graph import recorded
from scaling import ATTACK, METHODS, Point, operations, operators_of, passes_of, points, product_of, row, study, work_of
from scaling_report import AXES, PRECISIONS, draw, tables
from subjects import Setting, Timed

BENCHMARKS = Path(scaling.__file__).parent
SMALL = Setting("small_cnn", 4, batch=2, image=28)


@pytest.mark.parametrize("work", [ATTACK, *METHODS])
@pytest.mark.parametrize("network", ["small_cnn", "preact_resnet18"])
def test_floor_is_made_of_the_passes_of_the_work(work: str, network: str) -> None:
    image = 28 if network == "small_cnn" else 16
    point = Point("batch", work, Setting(network, 16, batch=2, image=image), 7 if work == ATTACK else 1)
    floor = passes_of(point)
    made = operations(floor.call()) * point.steps / floor.steps
    assert made == pytest.approx(operations(work_of(point).call()), rel=0.01)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_works_and_floors_run_in_their_precision(precision: str, dtype: torch.dtype) -> None:
    s = replace(SMALL, precision=precision)
    for work in (ATTACK, *METHODS):
        point = Point("batch", work, s, 1)
        for made, use in ((work_of(point), ""), (passes_of(point), "bare")):
            seen: list[torch.dtype] = []
            network = subjects.network_of(s, use)
            hook = network.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.dtype))
            made.call()()
            hook.remove()
            assert set(seen) == {dtype}, made


def test_operators_are_those_of_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(call: subjects.Call, places: dict[str, ModuleType]) -> Counter[str]:
        found: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name, place in places.items():
                original = getattr(place, name)

                def counted(*args, name=name, original=original, **kwargs):  # type: ignore[no-untyped-def]
                    found[name] += 1
                    return original(*args, **kwargs)

                patch.setattr(place, name, counted)
            call()
        return found

    attack = {"random_start": batch, "pgd_step": batch, "attack_cotangent": objective}
    found = counts(subjects.attack(SMALL, 3), attack)
    assert found == counts(subjects.attack_operators(SMALL, 3), dict.fromkeys(attack, subjects))
    assert set(found) == set(attack)


@pytest.mark.parametrize("quick", [False, True])
def test_points_vary_one_thing_at_a_time(quick: bool) -> None:
    found = list(points("cpu", quick))
    assert len(set(found)) == len(found)
    assert {p.axis for p in found} == set(AXES) and {p.work for p in found} == {ATTACK, *METHODS}
    assert {p.setting.precision for p in found} == set(PRECISIONS)
    for _, own in itertools.groupby(found, lambda p: (p.axis, p.work, p.setting.network, p.setting.precision)):
        settings = [p for p in own]
        assert len({p.at for p in settings}) == len(settings)
    if not quick:
        batches = [p.at for p in found if p.axis == "batch" and p.setting.network == "preact_resnet18"]
        assert set(batches) == {2**k for k in range(9)}
        assert max(p.at for p in found if p.axis == "classes") == 1000
    assert not [p for p in points("cuda", quick) if p.axis == "threads"]


def test_a_row_compares_seconds_of_the_same_steps() -> None:
    point = Point("steps", ATTACK, SMALL, 20)
    timed = {work_of(point): Timed(2.0, 1.9, 2.1), passes_of(point): Timed(0.3, 0.3, 0.3)}
    timed |= {operators_of(point): Timed(0.1, 0.1, 0.1), product_of(point): Timed(4.0, 4.0, 4.0)}
    made = row(point, timed, flops=10**9)
    assert passes_of(point).steps == 4 and made["passes_seconds"] == pytest.approx(5 * 0.3)
    assert made["seconds"] == {"median": 2.0, "low": 1.9, "high": 2.1} and made["operators_seconds"] == 0.1
    assert made["product_flops_per_second"] == 2 * 2048**3 / 4
    assert made["flops_seconds"] == pytest.approx(4e9 / (2 * 2048**3)) and made["at"] == 20


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    some = [
        Point("batch", work, Setting("small_cnn", 4, batch, 28, precision=precision), 2 if work == ATTACK else 1)
        for precision in PRECISIONS
        for batch in (2, 4)
        for work in (ATTACK, "atlas")
    ]
    one, two = study(some, rounds=2)
    assert [r["at"] for r in one] == [r["at"] for r in two]
    return two


def test_rows_and_tables(rows: list[dict]) -> None:
    assert json.loads(json.dumps(rows)) == rows
    for r in rows:
        assert r["at"] == r["batch"]
        assert 0 < r["seconds"]["low"] <= r["seconds"]["median"] <= r["seconds"]["high"]
        assert r["passes_seconds"] > 0 and r["flops_seconds"] > 0
        assert (r["operators_seconds"] is not None) == (r["work"] == ATTACK)
    fixed = [r | {"seconds": {"median": 0.02, "low": 0.016, "high": 0.02}, "passes_seconds": 0.015} for r in rows]
    fixed = [r | {"flops_seconds": 0.001, "operators_seconds": r["operators_seconds"] and 0.0001} for r in fixed]
    found = tables(fixed)
    assert list(found) == ["PGD, small_cnn of width 4, by batch", "atlas, small_cnn of width 4, by batch"]
    attack, atlas = found.values()
    assert attack[1] == ["2", *2 * ["10.000", "10%", "75%", "5%", "0.5%"]]
    assert atlas[2] == ["4", *2 * ["5.000", "10%", "75%", "5%"]]
    assert all(len(line) == len(table[0]) for table in found.values() for line in table)


def test_figures(rows: list[dict], tmp_path: Path) -> None:
    drawn = draw(rows, tmp_path / "figures", "scaling-cpu")
    assert [path.name for path in drawn] == ["scaling-cpu-pgd.png", "scaling-cpu-atlas.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_script_writes_and_draws_again(rows: list[dict], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scaling, "study", lambda found, rounds: iter([rows]))
    results = tmp_path / "scaling-x.json"
    scaling.main(["--quick", "--results", str(results), "--device", "cpu"])
    assert "PGD, small_cnn of width 4, by batch" in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert written["rows"] == rows and written["environment"]["torch"] == torch.__version__
    assert written["command"] == "python benchmarks/scaling.py --quick --results RESULTS --device cpu"
    assert "## atlas, small_cnn of width 4, by batch" in results.with_suffix(".md").read_text()
    monkeypatch.setattr(scaling, "study", None)
    scaling.main(["--plots-only", "--results", str(results), "--plots", str(tmp_path)])
    assert (tmp_path / "scaling-x-pgd.png").is_file()
    with pytest.raises(SystemExit):
        scaling.main(["--plots-only"])


def test_turns_are_taken_in_every_order() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(2 * subjects.SHORTEST)  # long enough that nothing is repeated

    *_, found = subjects.in_turn({name: (partial(call, name), 1) for name in "abcd"}, 5, "cpu")
    assert all(2 * subjects.SHORTEST <= t.low <= t.median <= t.high for t in found.values())
    rounds = ["".join(order[-4 * k - 4 : -4 * k or None]) for k in range(5)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(rounds)) > 1


def test_short_calls_are_repeated_and_threads_are_put_back() -> None:
    before, seen = torch.get_num_threads(), []
    list(subjects.in_turn({n: (lambda: seen.append(torch.get_num_threads()), n) for n in (2, 1)}, 1, "cpu"))
    assert set(seen) == {1, 2} and len(seen) > 100 and torch.get_num_threads() == before


def test_choices_add_up(tmp_path: Path, capsys) -> None:
    base = Setting("preact_resnet18", 16, batch=2, image=8)
    found = choices.rows_of(base, compiled=False)
    last = list(found.values())[-1]
    assert last.channels_last and last.precision == last.attack_precision == "bf16"
    assert not any(s.compile or s.cuda_graphs for s in found.values())
    assert [c.keep for c in found][:3] == [False, False, True] and not next(iter(found.values())).channels_last
    *_, rows = choices.measure(found, steps=1, rounds=2)
    assert all(len(row["attack"]) == len(row["step"]) == 2 for row in rows)
    times = zip(rows, (8, 4, 2, 2, 2), strict=True)
    lines = choices.table([row | {"attack": [t], "step": [4 * t]} for row, t in times], 1)
    assert lines[3][1:] == ["2000.0", "2.00x", "4.00x", "8000.0", "2.00x", "4.00x"]
    assert list(choices.rows_of(base, compiled=True).values())[-1].compile
    *_, steps, both = choices.rows_of(Setting(device="cuda"), compiled=True).values()
    assert steps.cuda_graphs and steps.step_graphs and not steps.compile and both.step_graphs and both.compile


def test_a_training_step_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StepGraph] = []

    def step_graph(*args: Any) -> StepGraph:
        made.append(StepGraph(*args, recorder=recorded))
        return made[-1]

    monkeypatch.setattr(subjects, "StepGraph", step_graph)
    call = subjects.training_step(replace(SMALL, precision="bf16", step_graphs=True), "trades", steps=2)
    for _ in range(3):
        call()
    (capture,) = made[0]._captures.values()
    assert capture is not None


def test_choices_are_written_after_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0] * 12)  # of the 10 of a round
    for work in ("attack", "training_step"):
        monkeypatch.setattr(subjects, work, lambda *args, **how: lambda: None)
    monkeypatch.setattr(choices, "seconds", lambda call, device: next(times))
    with pytest.raises(RuntimeError, match="StopIteration"):  # cut off in the second
        choices.main(["--device", "cpu", "--results", str(tmp_path / "choices.json")])
    rows = json.loads((tmp_path / "choices.json").read_text())["rows"]
    assert [row["attack"] + row["step"] for row in rows] == [[1.0, 1.0]] * 5


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::convolution_backward", "convolutions, backward"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", "BatchNorm"),
        ("aten::native_batch_norm_backward", "BatchNorm"),
        ("aten::_foreach_add_", "optimiser"),
        ("aten::addmm", "matrix products"),
        ("aten::copy_", "copies: layout and dtype"),
        ("aten::fill_", "fills and new memory"),
        ("atlas_kernels::pgd_step", "our operators"),
        ("aten::threshold_backward", profile_step.POINTWISE),
    ],
)
def test_kinds_of_work(name: str, kind: str) -> None:
    assert profile_step.kind_of(name) == kind


def test_profile_of_a_step(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(profile_step, "announce_operators", lambda: None)  # which lasts as long as the process
    options = ["--method", "one_step_adv", "--network", "small_cnn", "--width", "2", "--batch-size", "4"]
    profile_step.main([*options, "--device", "cpu", "--results", str(tmp_path / "profile.json")])
    lines = capsys.readouterr().out.splitlines()
    assert "published" in lines[2] and "ours bf16" in lines[2]
    assert lines[-3].startswith("the step") and any(line.startswith("convolutions, backward") for line in lines)
    found = json.loads((tmp_path / "profile.json").read_text())["milliseconds"]
    assert list(found) == ["published", "ours fp32", "ours bf16"] and found["published"]["convolutions, backward"] > 0
    assert "| convolutions, backward |" in (tmp_path / "profile.md").read_text()


def test_the_training_on_a_gpu_is_a_configuration() -> None:
    config = from_file(BENCHMARKS / "cifar10-gpu.json")
    assert (config.method, *config.beside) == ("atlas", "one_step_adv", "adv", "trades")
