"""The benchmark of whole training steps measures what it says: both sides do the same, and the bare passes are ours."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_training_step as bench
import harness
import steps
from atlas_kernels import memory
from atlas_kernels.capture import CaptureFailed
from atlas_train import compiled, methods, optimizers
from fake_graph import recorded
from network_passes import first_layer

CPU = torch.device("cpu")
K = 4
#: Passes of the published code, from reading it: a step of an attack is 3 where it calls backward, 2 where it does not;
#: adv in both projects. A layer less here and there.
PUBLISHED = {
    "standard": [3], "one_step_adv": [6], "n_fgsm": [5], "grad_align": [11], "atlas": [11], "backward_smoothing": [11],
    "free": [24], "adv": [3 * K + 1 + 3 + 1, 3 * K + 3], "gairat": [3 * K + 3], "mart": [2 * K + 6],
    "trades": [3 * K + 9], "adr": [2 * K + 6 + 2], "adr trades": [3 * K + 6 + 2], "llr": [3 + 6 + 2 * K + 3],
    "cure": [3 + 1 + 3 + 12], "jacobian": [6], "atlas start": [7], "liet": [8], "fgsm_pgi": [8], "fgsm_uap": [8],
    "gat": [12], "nuat": [12], "stored_adv": [3],
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Iterator[bench.Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.NETWORKS, "digits_net", ("digits", 8))
        patch.setitem(bench.SHAPES, "digits", ((1, 8, 8), 0.1))
        patch.setattr(optimizers, "fusible", lambda weight: True)  # as on CUDA, where graphs are
        yield bench.Bench(bench.Settings("digits_net", width=8, steps=K, rounds=2))


def test_the_network_is_no_other_in_eval_mode(small: bench.Bench) -> None:
    batch = next(iter(small.run("standard", {}).batches))
    top = small.model.eval()(batch.x).topk(2).values
    assert bench.sure(small.model(batch.x), batch.y) >= 0.5 * len(batch.y) and (top[:, 0] - top[:, 1]).max() < 20
    assert small.model.train().training


def test_every_method_has_a_row_and_adv_has_both_ways() -> None:
    assert {step.method for step in steps.STEPS.values()} == set(methods.names())
    assert len(steps.STEPS["adv"].published) == 2 and steps.STEPS["adr trades"].hyper == {"form": "trades"}


@pytest.mark.parametrize("name", steps.STEPS)
def test_both_sides_make_the_same_step_and_bare_makes_its_passes(name: str, small: bench.Bench) -> None:
    losses = bench.Contest(small.double(), name).losses()
    assert list(losses.values()) == pytest.approx([losses["ours fp32"]] * len(losses), rel=1e-9, abs=0)
    assert len(losses) == 1 + len(steps.STEPS[name].published)
    row = bench.Contest(small, name).look()
    depends = name in ("yopo", "mma")  # on network and data
    expected = [row.passes["published"]] if depends else PUBLISHED[name]
    assert [row.passes[way] for way in row.published] == pytest.approx(expected, abs=0.6)
    assert name != "mma" or row.passes["ours"] > 10, "no sample is sure enough to be attacked"
    assert row.passes["bare"] == pytest.approx(row.passes["ours"], rel=0.02)
    assert all(peak > 0 for peak in row.memory.values()) and {"ours fp32", "ours bf16"} < set(row.memory)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", steps.STEPS)
def test_bare_runs_the_network_as_ours_does(name: str, dtype: str, small: bench.Bench) -> None:
    contest, seen = bench.Contest(small, name), []
    layer = first_layer(contest.made.model)

    def note(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        mode = module.training or name == "llr"  # which is in train mode with statistics that are given
        frozen = not module.weight.requires_grad and torch.is_grad_enabled()
        layout = args[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((len(args[0]), mode, frozen, torch.is_grad_enabled(), output.dtype, layout))

    layer.register_forward_hook(note)
    contest.calls[f"ours {dtype}"]()
    mine = sorted(map(str, seen))
    seen.clear()
    contest.calls[f"bare {dtype}"]()
    assert sorted(map(str, seen)) == mine and mine


def wrong(m: Any, batch: Any, key: Any) -> steps.Statement:
    right = steps.trades(m, batch, key)
    return right._replace(how={**right.how, "beta": 1.1 * m.beta})


def test_a_wrong_loss_prints_no_time(small: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.STEPS, "trades", dataclasses.replace(steps.STEPS["trades"], published={"": wrong}))
    row = bench.measure(small, "trades")
    assert not row.seconds and row.problem
    assert row.doubles["published"] != pytest.approx(row.doubles["ours fp32"], rel=1e-3)
    said = f"trades: loss {row.losses['ours fp32']:.6g}, published {row.losses['published']:.6g}: no times"
    assert bench.table([row])[1] == [said, *[""] * (len(bench.table([])[0]) - 1)]


@pytest.mark.parametrize(
    "mine, published, exact, times",
    [
        (1.004, 1.0, None, True),
        (1.006, 1.0, 1.004, True),
        (1.006, 1.0, 1.0001, False),
        (1.006, 1.0, 1.012, False),
        (1.0, float("nan"), 1.0, False),
        (float("nan"), 1.0, 1.0, False),
    ],
)
def test_rounding_is_told_from_another_loss(mine: float, published: float, exact: float | None, times: bool) -> None:
    row = bench.StepRow("x", losses={"published": published, "ours fp32": mine}, passes={"ours": 3.0, "bare": 3.0})
    assert row.differing == ([] if exact is None else ["published"])
    row.doubles = {"published": exact or 0.0}
    row.look_for_problems()
    assert (row.problem is None) == times


def test_a_bare_loop_of_other_passes_is_an_error(small: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    step = steps.STEPS["adv"]
    short = dataclasses.replace(step, passes=lambda m, sure: step.passes(m, sure)[1:])
    monkeypatch.setitem(steps.STEPS, "adv", short)
    with pytest.raises(
        ValueError, match=r"adv: the bare loop makes .* passes and ours .*: correct its row in steps.py"
    ):
        bench.measure(small, "adv")


def test_contenders_take_turns_and_ours_keeps_memory(small: bench.Bench) -> None:
    contest, order = bench.Contest(small, "n_fgsm"), []

    def noted(name: str) -> Any:
        return lambda: order.append((name, memory._depth > 0))

    contest.calls = {name: noted(name) for name in contest.calls}
    contest.round(0)
    contest.round(1)
    names = ["published", "ours fp32", "bare fp32", "ours bf16", "bare bf16"]
    swapped = ["published", "bare fp32", "ours fp32", "bare bf16", "ours bf16"]
    assert order == [(name, name != "published") for name in names + swapped]
    assert {len(times) for times in contest.row.seconds.values()} == {2}


def test_a_long_row_ends_after_three_rounds(small: bench.Bench) -> None:
    made = copy.copy(small)
    made.settings = dataclasses.replace(small.settings, rounds=5, row_seconds=0.0)
    row = bench.measure(made, "standard")
    assert len(row.seconds["ours fp32"]) == 3
    assert [cells[-1] for cells in row.lines()] == ["3"]


def test_weights_stay_where_they_are(small: bench.Bench) -> None:
    contest = bench.Contest(small, "free")
    contest.look()
    contest.round(0)
    for mine, before in zip(contest.made.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(mine, before) or (mine - before).abs().max() < 1e-15


def test_results_are_written_after_every_row(
    small: bench.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(made: bench.Bench, name: str, say: Any) -> Any:
        if name == "mart":
            raise KeyboardInterrupt
        return real(made, name)

    real, target = bench.measure, tmp_path / "steps.json"
    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--network", "digits_net", "--width", "4", "--rounds", "1", "--steps", "2", "--device", "cpu",
                    "--methods", "standard,mart", "--results", str(target)])  # fmt: skip
    found = json.loads(target.read_text())
    assert [row["step"] for row in found["rows"]] == ["standard"] and found["environment"]["torch"] == torch.__version__
    assert found["settings"]["images"].startswith("synthetic") and len(found["one pass"]) == 4
    assert "| standard |" in target.with_suffix(".md").read_text() and len(list(tmp_path.iterdir())) == 2


def test_a_table_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    """Rows that are kept stay in their order, those measured again are replaced, other settings are refused."""
    target = tmp_path / "steps.json"
    how = ["--network", "digits_net", "--width", "4", "--rounds", "1", "--steps", "2", "--device", "cpu"]
    how += ["--results", str(target)]
    monkeypatch.setattr(bench, "measure", lambda made, name, say: bench.StepRow(name, problem="first"))
    bench.main([*how, "--methods", "mart,adv"])
    monkeypatch.setattr(bench, "measure", lambda made, name, say: bench.StepRow(name, problem="second"))
    bench.main([*how, "--methods", "standard,mart", "--keep"])
    rows = json.loads(target.read_text())["rows"]
    assert [(row["step"], row["problem"]) for row in rows] == [
        ("standard", "second"), ("adv", "first"), ("mart", "second")]  # fmt: skip
    assert "- adv: `python benchmarks/bench_training_step.py" in target.with_suffix(".md").read_text()
    before = target.read_text()
    with pytest.raises(ValueError, match="steps = 2, this run 3: take another file"):
        bench.main([*how, "--steps", "3", "--methods", "trades", "--keep"])
    assert target.read_text() == before
    with pytest.raises(SystemExit):
        bench.main(["--methods", "adv", "--keep", "--results", str(tmp_path / "other.json")])


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--methods", "adv,tradse"])
    assert "no row 'tradse'" in capsys.readouterr().err


def test_peak_memory_is_what_is_held_at_once() -> None:
    def call() -> None:
        first, second = torch.empty(1 << 18), torch.empty(1 << 17)
        del first
        torch.empty(1 << 16)
        del second

    assert harness.peak_memory(call, CPU) == (1 << 20) + (1 << 19)


def test_the_interval_is_that_of_order_statistics() -> None:
    assert harness.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0, 0.75)
    low, high, coverage = harness.median_interval(range(1, 12))  # type: ignore[arg-type]
    assert (low, high) == (2, 10) and coverage == pytest.approx(0.9883, abs=1e-4)


def test_other_kinds_of_ours(small: bench.Bench) -> None:
    made = copy.copy(small)
    made.settings, made.recorder = dataclasses.replace(small.settings, graphs=True), recorded
    row = bench.measure(made, "trades")
    assert row.problem is None
    assert {f"{side} {dtype} graphs" for side in ("ours", "bare") for dtype in ("fp32", "bf16")} < set(row.seconds)
    assert [line[0] for line in row.lines()] == ["trades", "trades graphs"]
    assert not row.missing
    assert set(bench.Contest(made, "mma").kinds) == {""}, "a step of MMA cannot be a graph"


@pytest.mark.parametrize(("name", "graphs"), [("atlas", 2), ("trades", 3)])
def test_compiled_in_graphs(name: str, graphs: int, small: bench.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare passes are compiled as ours are: all code is shared."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(bench.SHAPES, "digits", ((2, 8, 8), 0.1))  # strides of one channel may be any
    settings = dataclasses.replace(small.settings, graphs=True, compile="bf16")
    contest = bench.Contest(bench.Bench(settings, recorded), name)
    assert set(contest.kinds) == {"", " compiled", " graphs", " compiled graphs"}
    before = compiled.graphs()
    for kind in (" compiled", " compiled graphs"):
        for side in ("ours", "bare"):
            for _ in range(3):
                contest.calls[f"{side} bf16{kind}"]()
    assert compiled.graphs() - before == graphs
    contest.calls["published"]()
    contest.row.passes, contest.row.losses = {"published": 1.0, "ours": 1.0}, {"published": 1.0, "ours fp32": 1.0}
    contest.round(0)
    lines = {line[0]: line for line in contest.row.lines()}
    assert lines[f"{name} compiled graphs"][3:5] == ["-", "-"] and "%" in lines[f"{name} compiled graphs"][9]


def test_a_row_without_graphs_says_why(small: bench.Bench) -> None:
    def refuses(call: Any, device: torch.device, *, warmup: int, pool: Any) -> Any:
        raise CaptureFailed("it waits for the device")

    made = copy.copy(small)
    made.settings, made.recorder = dataclasses.replace(small.settings, graphs=True), refuses
    row = bench.measure(made, "standard")
    assert not any("graphs" in name for name in row.seconds) and "ours fp32" in row.seconds
    said = [line[0] for line in row.lines()]
    assert said[0] == "standard" and said[1].startswith("standard graphs: ") and "it waits for the device" in said[1]


def test_losses_are_compared_without_tf32_and_times_are_in_the_default(
    small: bench.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    contest, seen = bench.Contest(small, "standard"), []

    def noted(name: str, call: harness.Call) -> harness.Call:
        return lambda: (seen.append((name, torch.backends.cudnn.allow_tf32)), call())[1]

    contest.calls = {name: noted(name, call) for name, call in contest.calls.items()}
    contest.look()
    assert seen == [("published", False), ("ours fp32", False), ("ours bf16", True)]
    seen.clear()
    contest.round(0)
    assert len(seen) == 5 and all(allowed for _, allowed in seen)
