"""The table at the end: what it holds, what it costs to make it, and whether the files explain themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from atlas_train import checkpoint, engine, methods
from atlas_train.compare import compare
from atlas_train.config import TrainConfig, resolved
from atlas_train.evaluate import Evaluation
from atlas_train.methods import ADV
from atlas_train.passes import passes_per_step
from atlas_train.results import Result, markdown, table
from tiny_runs import TINY, same, splits, weights

EVALUATION = Evaluation(0.5, 0.25, 0.125, 100, 8 / 255, 20, 1 / 255, 3, 1.0, "cpu")


def test_compare_trains_evaluates_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(**TINY | {"epochs": 2, "beside": ["standard"], "out_dir": str(tmp_path / "out")})
    results = compare(config, splits=splits(), show="plain")
    assert list(results) == ["standard", "atlas"]
    printed = capsys.readouterr().out
    shown = printed[printed.index("method ") :].splitlines()
    assert shown[0].split() == ["method", "clean", "FGSM", "PGD-20", "passes/step", "s/epoch", "training", "memory"]
    assert [line.split()[0] for line in shown[2:4]] == ["standard", "atlas"]
    assert "eps 0.1 (l_inf); 40 test images, standard error at most 7.9 points" in shown[4]
    for method in ("standard", "atlas"):
        names = {p.name for p in (tmp_path / "out" / method).iterdir()}
        assert names == {"last.pt", "log.csv", checkpoint.export_name(), "evaluation.json"}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    own = written["methods"]["atlas"]
    assert own["pgd"] == results["atlas"].evaluation.pgd and 9 < own["passes"] < 11.1
    assert own["memory"] == results["atlas"].memory > 4 * written["network"]["parameters"]
    assert "memory: the most that torch holds at once" in printed
    assert own["training_seconds"] == pytest.approx(2 * own["epoch_seconds"]) and own["epoch_seconds"] > 0
    assert written["config"]["lr"] == TINY["lr"] and written["config"]["epochs"] == 2
    assert str(tmp_path) not in json.dumps(written)  # nobody else has this folder
    machine = written["environment"]
    assert (machine["torch"], machine["threads"], machine["device"]) == (torch.__version__, 1, "cpu") and machine["cpu"]
    document = (tmp_path / "out" / "results.md").read_text()
    assert "| method | clean | FGSM | PGD-20 |" in document and f"torch {torch.__version__}" in document
    if (tmp_path / "out" / "curves.png").exists():
        assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="already holds a run of atlas: go on with it"):
        compare(config, splits=splits(), show="silent")


def test_a_run_alone_leaves_its_results_too(tmp_path: Path) -> None:
    config = TrainConfig(**TINY | {"epochs": 1, "method": "standard", "out_dir": str(tmp_path)})
    compare(config, splits=splits(), show="silent", say=lambda text: None)
    assert list(json.loads((tmp_path / "standard" / "results.json").read_text())["methods"]) == ["standard"]


@pytest.mark.parametrize(
    ("method", "settings", "refused"),
    [
        ("llr", {"checkpoint_activations": True}, "checkpoint_activations: llr looks into the network"),
        ("yopo", {"hyper": {"yopo.first_layer": "nothing"}}, "nothing"),
    ],
)
def test_a_method_beside_that_cannot_be_had_is_refused_before_any_trains(
    method: str, settings: dict[str, Any], refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas_train.compare.train", lambda *args, **how: pytest.fail("it trains"))
    config = TrainConfig(**TINY | {"beside": (method,), "out_dir": str(tmp_path / "out")} | settings)
    with pytest.raises(ValueError, match=refused):
        compare(config, splits=splits(), show="silent")
    assert not (tmp_path / "out").exists()


def test_all_beside_means_every_method() -> None:
    config = resolved(TrainConfig(**TINY | {"method": "adv", "beside": ("all",)}), splits())
    assert sorted(("adv", *config.beside)) == sorted(methods.names())
    assert TrainConfig(beside=("all",), hyper={"adv.steps": 3}).hyper_of("adv") == {"steps": 3}
    assert resolved(TrainConfig(**TINY | {"beside": ("adv", "atlas", "adv")}), splits()).beside == ("adv",)


def test_a_table_leaves_out_what_is_not_known() -> None:
    lines = table({"adv": Result(EVALUATION)}).splitlines()
    assert lines[0].split() == ["method", "clean", "FGSM", "PGD-20"]
    assert lines[2].split() == ["adv", "50.0", "%", "25.0", "%", "12.5", "%"]
    assert "eps 8/255" in lines[3] and "3 restarts" in lines[3] and "at most 5.0 points" in lines[3]
    both = table({"adv": Result(EVALUATION, 60.25, 6.025, 23.0), "other": Result(EVALUATION)}).splitlines()
    assert both[2].split()[-4:] == ["23.0", "6.03", "60.2", "s"]
    assert len(both[3]) == len(both[2]) - len("  passes/step  s/epoch  training")  # and no blanks instead


def test_markdown_is_a_table() -> None:
    lines = markdown({"adv": Result(EVALUATION, passes=23)}, "title", {"torch": "2"}).splitlines()
    assert lines[:4] == ["# title", "", "| method | clean | FGSM | PGD-20 | passes/step |", "| --- |" + " ---: |" * 4]
    assert lines[4] == "| adv | 50.0 % | 25.0 % | 12.5 % | 23.0 |" and lines[-1] == "torch 2."


@dataclass(frozen=True)
class Remembers(ADV):
    """Draws from the global generator and keeps a tensor."""

    name: ClassVar[str] = "remembers"

    def prepare(self, model, batch, key, state):
        state.memory.setdefault("seen", torch.zeros(1)).add_(torch.rand(1).ceil())
        return super().prepare(model, batch, key, state)


def test_counting_passes_leaves_the_run_as_it_was() -> None:
    run = engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits())
    run = replace(run, method=Remembers(0.1, steps=3), memory={"seen": torch.full((1,), 4.0)})
    before, optimizer, random = weights(run.model), str(run.optimizer.state_dict()), torch.get_rng_state()
    assert passes_per_step(run) == pytest.approx(2 * 3 + 3, abs=0.5)  # the first layer needs no input gradient
    assert same(weights(run.model), before) and str(run.optimizer.state_dict()) == optimizer
    assert torch.equal(torch.get_rng_state(), random) and run.memory["seen"] == 4 and run.step == 4
    assert all(parameter.grad is None for parameter in run.model.parameters())
