"""``on_gpu.sh``, which has no GPU here: on commands that only say what was asked of them, fail, or take too long."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

import targets
from harness import Row
from step_table import StepRow

SCRIPT = Path(targets.__file__).parent / "on_gpu.sh"
PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] || echo "asked: $*"
case "$*" in
  *get_device_name*) exec echo Some-GPU ;;
  *OPERATORS*) exec echo perturb noise ;;
  *"$SLOW"*) exec sleep 20 ;;
  *"$BROKEN"*) exit 3 ;;
  *"$KILLED"*) kill -KILL $$ ;;
esac
"""


Done = subprocess.CompletedProcess[str]


def run(tmp_path: Path, *options: str, slow: str = "nothing", broken: str = "nothing", killed: str = "nothing") -> Done:
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").write_text(PYTHON)
    (commands / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "SLOW": slow, "BROKEN": broken}
    env["KILLED"] = killed
    command = ["bash", str(SCRIPT), "--results", str(tmp_path / "results"), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_what_a_command_prints_is_kept_beside_its_numbers(tmp_path: Path) -> None:
    done = run(tmp_path, "--operators", "--attacks", "--data-dir", "the data")
    assert done.returncode == 0 and done.stderr == ""
    written = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    names = ("attack-precision", "attacks", "host-time", "operators")
    assert sorted(written) == [f"Some-GPU-{name}.txt" for name in names]
    files = "benchmarks/bench_perturb.py benchmarks/bench_noise.py"
    start = f"asked: -m pytest --benchmark-only -q {files} --results={tmp_path}/results/Some-GPU.json"
    assert written["Some-GPU-operators.txt"] == f"{start}\n"
    assert "--dataset cifar10 --data-dir the data " in written["Some-GPU-attack-precision.txt"]
    assert f"asked: benchmarks/targets.py {tmp_path}/results/Some-GPU\n" in done.stdout


def test_the_rest_goes_on_when_a_command_fails_or_its_part_has_no_time_left(tmp_path: Path) -> None:
    how = {"slow": "bench_training_step", "broken": "bench_attacks"}
    done = run(tmp_path, "--attacks", "--steps", "--scaling", "--seconds", "2", **how)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-6:] == [
        "Not all went well:",
        "- attacks ended with status 3",
        "- training-step was cut off after 2 seconds",
        "- training-step-compiled was not begun, for its part had no time left",
        "- profile was not begun, for its part had no time left",
        "- choices was not begun, for its part had no time left",
    ]
    results = tmp_path / "results"
    assert (results / "Some-GPU-training-step.txt").read_text().startswith("asked: benchmarks/bench_training_step.py")
    assert all((results / f"Some-GPU-{name}.txt").exists() for name in ("attack-precision", "scaling"))


def test_a_speedrun_is_run_for_each_budget_and_only_if_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path, "--speedrun", "60", "--speedrun", "120", "--data-dir", "the data")
    assert done.returncode == 0 and done.stderr == ""
    results = tmp_path / "results" / "Some-GPU-speedrun"
    asked = [line for line in done.stdout.splitlines() if line.startswith("asked: ")]
    assert asked == ["asked: -m atlas_kernels"] + [
        f"asked: benchmarks/speedrun.py {budget} --data-dir the data --runs runs/speedrun-Some-GPU --results "
        f"{results}-{budget}.json"
        for budget in (60, 120)
    ]
    assert Path(f"{results}-120.txt").exists()


@pytest.mark.parametrize("limit", [[], ["--seconds", "60"]])
def test_a_command_that_was_killed_is_not_said_to_be_out_of_time(tmp_path: Path, limit: list[str]) -> None:
    done = run(tmp_path, "--operators", *limit, killed="host_time", broken="targets")
    said = ["- host-time ended with status 137", "- targets ended with status 3"]
    assert done.returncode == 1 and done.stderr.splitlines()[-2:] == said


def test_the_study_runs_only_when_asked(tmp_path: Path) -> None:
    done = run(tmp_path, "--studies", "600", "--data-dir", "the data")
    how = f"600 --parallel 4 --results {tmp_path}/results/atlas-study --data-dir the data"
    assert done.returncode == 0 and done.stdout.count("asked: ") == 2
    said = (tmp_path / "results" / "Some-GPU-studies.txt").read_text()
    assert said == f"asked: benchmarks/studies/run_queue.py {how}\n"


def test_the_study_wants_to_know_how_long(tmp_path: Path) -> None:
    done = run(tmp_path, "--studies", "--data-dir")
    assert done.returncode == 2 and "--studies takes a whole number above 0, got --data-dir" in done.stderr


WRONG = [["--nothing"], ["--seconds", "soon"], ["--seconds", "0"], ["--seconds"], ["--speedrun", "soon"]]


@pytest.mark.parametrize("options", WRONG)
def test_what_it_does_not_know_it_says(tmp_path: Path, options: list[str]) -> None:
    done = run(tmp_path, *options)
    assert done.returncode and "seconds" in done.stderr and not (tmp_path / "results").exists()
    assert options != ["--nothing"] or "--tests --operators --attacks --steps --scaling --training" in done.stderr


def operators(ours: float) -> dict[str, object]:
    rows = [Row(op, targets.SIZE, 100, {"ours": ours}, 10.0, True) for op in targets.COPY]
    return {"rows": [asdict(row) for row in (*rows, Row("random_start", "1x1", 100, {"ours": 1.0}, 10.0, True))]}


def steps(**settings: object) -> dict[str, object]:
    times = {"published": [0.04] * 3, "ours bf16": [0.02] * 3, "bare bf16": [0.01] * 3}
    times |= {"ours bf16 graphs": [0.0074, 0.0075, 0.0076], "bare bf16 graphs": [0.0067] * 3}
    rows = [StepRow(name, losses={"published": 1.0}, seconds=times) for name in ("atlas", "trades", "liet")]
    return {"settings": {**targets.NETWORK, **settings}, "rows": [asdict(r) | {"published": r.published} for r in rows]}


def test_targets_beside_what_was_reached(tmp_path: Path) -> None:
    results = str(tmp_path / "GPU")
    assert {line[-1] for line in targets.table(results)[1:]} == {"not measured"}
    (tmp_path / "GPU.json").write_text(json.dumps(operators(11.5)))
    (tmp_path / "GPU-training-step.json").write_text(json.dumps(steps()))
    found = targets.table(results)[1:]
    assert [line[2:] for line in found] == [
        ["87.0%", "missed"], ["87.0%", "reached"], ["87.0%", "missed"], *[["87.0%", "reached"]] * 5,
        ["7.50", "reached"], ["89.3%", "missed"], ["5.33", "reached"], ["89.3%", "missed"],
        ["5.33", "reached"], *[["-", "not measured"]] * 4,
    ]  # fmt: skip
    assert found[8][:2] == ["atlas step, batch 128, ours bf16 graphs, ms", "<= 7.50"]
    (tmp_path / "GPU-training-step.json").write_text(json.dumps(steps(batch_size=64)))
    assert {line[-1] for line in targets.of_steps(results)} == {"not measured"}
    targets.main(results)
    written = (tmp_path / "GPU-targets.md").read_text()
    assert "| random_start at 512x3x224x224, of copy | >= 90.0% | 87.0% | missed |" in written
    (tmp_path / "GPU-training-step.json").write_text('{"settings": {"netw')
    with pytest.raises(SystemExit, match="GPU-training-step.json is not whole JSON .*: measure it again"):
        targets.main(results)


def test_targets_of_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "training-step-cpu.json"
    times = {"published": [1.3, 1.31, 1.2], "ours fp32": [1.0] * 3, "bare fp32": [0.95, 0.93, 0.9]}
    row = StepRow("fgsm_uap", losses={"published": 1.0}, seconds=times)
    measured = {"settings": targets.ON_CPU, "rows": [asdict(row) | {"published": row.published}]}
    results.write_text(json.dumps(measured))
    targets.main(str(results))
    lines = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[4:6] == [["1.30", "1.30", "reached"], ["94.0%", "93.0%", "missed"]] and len(lines) == 10
    assert lines[6] == ["-", "not", "measured"] and [path.name for path in tmp_path.iterdir()] == [results.name]
    results.write_text(json.dumps({"settings": targets.NETWORK, "rows": []}))
    with pytest.raises(SystemExit, match="holds no steps of"):
        targets.main(str(results))
