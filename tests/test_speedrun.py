"""The speedrun: what its clock holds, what it keeps and goes on with, and that its records are settings of ours."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import speedrun
from atlas_train import average_bn, averaging, checkpoint, methods, warm_up
from atlas_train.autoattack import AutoAttacked
from atlas_train.compiled import require_compilable

DIGITS = ["--tiny", "--set", "dataset=digits", "model=digits_net", "train_size=64", "batch_size=16", "epochs=2"]


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """AutoAttack as it was called; it finds one image of two."""
    calls: list[dict[str, Any]] = []

    def attack(model: Any, images: Any, eps: float, size: int, **how: Any) -> AutoAttacked:
        calls.append({"images": images, "eps": eps, "size": size, "model": model, **how})
        return AutoAttacked(0.5, size, how["version"], 1.0)

    monkeypatch.setattr(speedrun, "autoattack", attack)
    return calls


def run(folder: Path, *more: str, budget: int = 60) -> dict[str, Any]:
    path = folder / "found.json"
    at = next((i for i, word in enumerate(more) if "=" not in word), len(more))
    words = [*DIGITS, *more[:at], "--seeds", "0", "--images", "20", *more[at:]]
    speedrun.main([str(budget), "--runs", str(folder / "runs"), "--results", str(path), *words])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("budget", speedrun.RECORDS)
def test_records_are_settings_of_the_trainer(budget: int) -> None:
    config = speedrun.settings(budget, False, [])
    method = config.build_method(8 / 255)
    require_compilable(method)
    assert not method.no_graph and config.dataset == "cifar10" and config.model == "resnet18" and not config.extra_data
    steps = config.epochs * (49_000 // config.batch_size)
    assert 0.045 < 1 / (1 - config.ema_decay) / steps < 0.055
    known = methods.build("fgsm_pgi", 8 / 255).weight  # of a mean over ten classes
    assert method.in_use()["local_weight"] == known / 10


def test_the_clock_holds_training_and_what_belongs_to_it_and_no_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: list[Any]
) -> None:
    """A clock that moves by what is done: 1,000 s a warm-up, 10 an average, 1 BatchNorm's pass, 100 a checkpoint."""
    now = [0.0]

    def costs(where: Any, name: str, seconds: float) -> None:
        call = getattr(where, name)

        def longer(*arguments: Any, **how: Any) -> Any:
            now[0] += seconds
            return call(*arguments, **how)

        monkeypatch.setattr(where, name, longer)

    costs(speedrun, "warm_up", 1000.0)
    costs(averaging.Averaging, "after_batch", 10.0)
    costs(average_bn, "_forwards", 1.0)
    costs(checkpoint, "save", 100.0)
    monkeypatch.setattr(warm_up, "STEPS", 3)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    (row,) = run(tmp_path, "average_bn=clean")["rows"]
    assert row["seconds"] == {"start": 0.0, "warm_up": 1030.0, "training": 2 * (4 * 10.0 + 1.0) + 100.0}
    assert row["over"] and row["epochs"] == 2 and row["train_images"] == 64


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    attack = speedrun.autoattack
    monkeypatch.setattr(speedrun, "autoattack", lambda *a, **how: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = json.loads((tmp_path / "found.json").read_text())
    assert "1 of 1 networks trained, 0 attacked" in first["verdict"] and "found" not in first["rows"][0]
    monkeypatch.setattr(speedrun, "train", None)  # it is trained
    monkeypatch.setattr(speedrun, "autoattack", attack)
    found = run(tmp_path)
    (row,) = found["rows"]
    assert row["weights"] == first["rows"][0]["weights"] and row["seconds"] == first["rows"][0]["seconds"]
    assert row["found"]["aa"] == 0.5 and row["found"]["count"] == 20
    assert "target: AA 45 % in 60 s; 50.0 % (29.9 to 70.1, 95 %), slowest run " in found["verdict"]
    assert found["verdict"].endswith(": reached") and "trained before" in capsys.readouterr().out
    page = (tmp_path / "found.md").read_text()
    assert "| LIET | 49.99 | 43.4 |" in page and "| mean | " in page and "epochs 2" in page
    test = speedrun.split(speedrun.settings(60, True, DIGITS[2:]), None)[0].test
    (call,) = attacks
    assert torch.equal(call["images"].images, test.images[:20]) and call["version"] == "standard"
    assert checkpoint.fingerprint(call["model"]) == row["weights"]
    run(tmp_path)  # it is attacked
    assert len(attacks) == 1
    run(tmp_path, "--images", "30")  # by more images, of the same network
    assert len(attacks) == 2 and attacks[1]["size"] == 30
    chosen = run(tmp_path, "--choose")
    assert attacks[2]["version"] == "apgd" and "apgd on validation images" in chosen["verdict"]
    known = {image.numpy().tobytes() for image in attacks[2]["images"].images}
    train = speedrun.split(speedrun.settings(60, True, DIGITS[2:]), None)[0].train
    assert not known & {image.numpy().tobytes() for image in (*train.images, *test.images)}
    with pytest.raises(SystemExit):
        run(tmp_path, "label_smoothing=0.1")
    assert "other settings (label_smoothing 0.4, now 0.1): choose another --runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tick, words",
    [
        (7.5, "it will take about 90 s, and the budget is 60: 2 of 3 epochs fit (--set epochs=2)"),
        (18.75, "it will take about 225 s, and the budget is 60: not one epoch fits"),
    ],
)
def test_a_budget_that_would_be_exceeded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: list[Any], capsys: Any, tick: float, words: str
) -> None:
    """On a clock that moves each time one looks at it: by four ticks an epoch."""
    ticks = itertools.count(0, tick)
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: next(ticks))
    found = run(tmp_path, "epochs=3")
    said = capsys.readouterr().out
    assert words in said
    assert "over the budget of 60 s" in said and found["rows"][0]["over"]
    assert "the time is exceeded" in found["verdict"] and "0 (over)" in said


def test_a_seed_is_the_run_of_its_seed(tmp_path: Path, attacks: list[Any]) -> None:
    both = run(tmp_path / "a", "--seeds", "0", "1")["rows"]
    again = run(tmp_path / "b", "--seeds", "1")["rows"]
    assert both[1]["weights"] == again[0]["weights"] != both[0]["weights"]
    assert [row["settings"]["seed"] for row in both] == [0, 1]


def test_what_cannot_be_had_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], attacks: list[Any]) -> None:
    for words in (["epoch=3"], ["lr=-1"]):
        with pytest.raises(SystemExit):
            run(tmp_path, *words)
    said = capsys.readouterr().err
    assert "no setting 'epoch'" in said and "lr must be" in said
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            speedrun.main(["60"])
        assert "torch sees no CUDA device here: --tiny" in capsys.readouterr().err


def test_intervals_are_wilsons() -> None:
    low, high = speedrun.interval(0.45, 1000)
    assert math.isclose(low, 0.4194, abs_tol=1e-4) and math.isclose(high, 0.4810, abs_tol=1e-4)
    assert speedrun.interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)
