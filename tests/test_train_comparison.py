"""`atlas compare`: one table of any runs, made of what lies in their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_train import checkpoint, cli
from atlas_train.compare import compare
from atlas_train.comparison import compared
from atlas_train.config import TrainConfig
from atlas_train.robustness.report import Report
from atlas_train.targets import evaluate_target
from tiny_runs import TINY, splits

pytest.importorskip("tyro")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: two of ATLAS that differ in lr and a weight, one of standard beside the first."""
    root = tmp_path_factory.mktemp("runs")
    quick: dict[str, Any] = TINY | {"epochs": 1, "train_size": 32}
    first = quick | {"beside": ("standard",), "out_dir": str(root / "first")}
    second = quick | {"lr": 0.01, "hyper": {"local_weight": 2.0}, "out_dir": str(root / "second")}
    for settings in (first, second):
        compare(TrainConfig(**settings), splits=splits(), show="silent", say=lambda text: None)
    return root


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of them."""
    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a markdown table, by its header."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip((c.strip() for c in lines[0]), (c.strip() for c in row), strict=False)) for row in lines[2:]]


def report(run: Path, name: str) -> Report:
    """What ``atlas evaluate --attacks --json`` finds of a run, also written to a file."""
    how: dict[str, Any] = {"size": 20, "splits": splits(), "eps": (0.1, 0.2), "say": lambda text: None}
    found, _ = evaluate_target(str(run), ("fgsm", "pgd-3"), **how)
    Path(name).write_text(json.dumps(found.to_dict()))
    return found


def test_a_table_has_what_is_stored_and_what_differs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.Module.__call__", lambda *args, **how: pytest.fail("a network runs"))
    assert cli.main(["compare", str(runs), "--table", "markdown"]) == 0
    text = capsys.readouterr().out
    rows = cells(text)
    assert [row["run"] for row in rows] == ["first/atlas", "first/standard", "second/atlas"]
    assert [row["method"] for row in rows] == ["atlas", "standard", "atlas"]
    assert [row["lr"] for row in rows] == ["0.005", "0.005", "0.01"]
    assert [row["local_weight"] for row in rows] == ["1", "", "2"]
    assert not {"epochs", "batch_size", "steps", "count", "eps"} & set(rows[0])
    for row in rows:
        stored = json.loads((runs / row["run"] / "evaluation.json").read_text())
        for column, name in {"clean": "clean", "FGSM": "fgsm", "PGD-20": "pgd"}.items():
            assert row[column] == f"{100 * stored[name]:.1f} %"
        assert row["passes/step"] == f"{stored['passes']:.1f}" and row["training"].endswith(" s")
    assert "all: dataset bars, train_size 32, model digits_net, width 4, eps 0.1 (l_inf), epochs 1" in text
    assert "40 test images, standard error at most 7.9 points" in text


def test_the_last_line_says_what_to_do_next(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(runs / "second" / "atlas")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("atlas report runs/second/atlas")


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_forms_are_those_of_evaluate(form: Any, runs: Path) -> None:
    table = compared([runs]).table(form)
    begins = {"text": "run  ", "markdown": "| run |", "latex": r"\begin{tabular}{l"}
    assert table.startswith(begins[form])
    if form == "latex":
        rows, remarks = table.split(r"\end{tabular}")
        assert r"local\_weight" in rows and all(line.startswith("% ") for line in remarks.strip().splitlines())


def test_missing_damaged_and_foreign_folders_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    (runs / "first" / "standard" / "evaluation.json").write_text('{"clean": 2}')
    (runs / "second" / "atlas" / "last.pt").write_bytes(b"PK")
    assert cli.main(["compare", str(runs / "first"), str(runs / "second"), "nowhere", "empty", "notes.txt"]) == 1
    text = capsys.readouterr().out
    for told in (
        "nowhere does not exist", "empty holds no run of atlas train", "notes.txt is no run",
        "runs/first/standard/evaluation.json", "runs/second/atlas/last.pt cannot be read as a checkpoint",
    ):  # fmt: skip
        assert f"! left out: {told}" in text
    assert "atlas" in text.splitlines()[2]
    assert cli.main(["compare", "nowhere"]) == 2 and "nowhere does not exist" in capsys.readouterr().err


def test_one_damaged_run_does_not_hide_those_beside_it(runs: Path) -> None:
    (runs / "first" / "atlas" / "evaluation.json").write_text("{")
    found = compared([runs])
    assert list(found.records) == ["first/standard", "second/atlas"] and len(found.left_out) == 1


def test_a_run_that_was_not_evaluated_has_its_costs_and_the_remedy(runs: Path) -> None:
    (runs / "second" / "atlas" / "evaluation.json").unlink()
    table = compared([runs]).table("markdown")
    row = cells(table)[-1]
    assert row["run"] == "second/atlas (epoch 1)" and row["clean"] == "" and row["training"].endswith(" s")
    assert "not evaluated yet: second/atlas; atlas evaluate runs/second/atlas --attacks" in table


def test_what_evaluate_wrote_is_a_column_of_its_run(runs: Path) -> None:
    first, second = runs / "first" / "atlas", runs / "second" / "atlas"
    found = report(first, str(first / "evaluated.json"))
    report(first, str(second / "wrong.json"))
    report(second, "apart.json")
    table = compared([runs, "apart.json"]).table("markdown")
    rows = cells(table)
    assert len(rows) == 3
    own = f"{100 * found.accuracy('pgd-3', 0.1):.1f} %"
    assert rows[0]["PGD-3 (20 images)"].removesuffix(" !") == own and rows[1]["PGD-3 (20 images)"] == ""
    assert rows[2]["PGD-3 (20 images)"]  # given by itself, and of these weights
    assert rows[0]["PGD-20"]  # evaluation.json is still there
    assert "! second/atlas: wrong.json is of other weights than those of the last epoch: left out" in table
    alone = cells(compared(["apart.json", first]).table("markdown"))
    assert [row["run"] for row in alone] == ["apart.json", "runs/first/atlas"]


def test_collapses_and_figures_of_an_earlier_epoch_are_noted(runs: Path) -> None:
    first, second = (runs / name / "atlas" for name in ("first", "second"))
    values = json.loads((first / "evaluation.json").read_text())
    (first / "evaluation.json").write_text(json.dumps(values | {"collapses": [[1, "it hides"]]}))
    state = torch.load(second / "last.pt", weights_only=True)
    row = state["history"][0]
    state |= {"epoch": 2, "step": 2 * state["step"], "history": [row | {"val_clean": 0.9}, row | {"epoch": 2}]}
    state["history"][1]["val_clean"] = 0.1
    checkpoint.save(second / "last.pt", state)
    table = compared([runs]).table()
    assert "first/atlas collapsed in epoch 1: it hides" in table
    assert "! second/atlas: its accuracies are of epoch 1, and it has been trained to epoch 2 since" in table
    (second / "evaluation.json").unlink()
    assert "second/atlas collapsed in epoch 2: clean accuracy on the validation images fell" in compared([runs]).table()


def test_other_test_images_are_said(runs: Path) -> None:
    path = runs / "second" / "atlas" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["data"]["test"]["sha256"] = "0" * 64
    checkpoint.save(path, state)
    assert "not of the same test images" in compared([runs]).table()
    assert "not of the same test images" not in compared([runs / "first"]).table()
