"""Several seeds: each in its folder, none trained twice, and a table of means and deviations."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_train import checkpoint, cli, engine
from atlas_train import compare as comparing
from atlas_train import seeds as several
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.evaluate import Evaluation
from atlas_train.nonfinite import NonFiniteLoss
from atlas_train.results import Result, figures, markdown_of_seeds, table_of_seeds
from atlas_train.seeds import SeedsFailed, compare_seeds
from atlas_train.stored import resume_seeds
from tiny_runs import TINY, same, splits, weights

SMALL: dict[str, Any] = TINY | {
    "epochs": 2,
    "method": "one_step_adv",
    "beside": ("standard",),
    "seeds": (0, 1, 2),
    "eval_size": 8,
}


def config(folder: Path, **changed: Any) -> TrainConfig:
    return TrainConfig(**SMALL | {"out_dir": str(folder)} | changed)


def trained(config: TrainConfig, said: list[str]) -> Any:
    return compare_seeds(config, splits=splits(), show="silent", say=said.append)


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, int]]:
    """(seed, method, epoch) of every epoch that is trained from now on."""
    seen: list[tuple[int, str, int]] = []
    train_epoch = engine.train_epoch

    def counted(run: Any, *how: Any) -> Any:
        seen.append((run.config.seed, run.config.method, run.epoch + 1))
        return train_epoch(run, *how)

    monkeypatch.setattr(engine, "train_epoch", counted)
    return seen


def test_each_seed_is_a_comparison_of_its_own_and_the_table_is_of_all(tmp_path: Path) -> None:
    said: list[str] = []
    results = trained(config(tmp_path / "all"), said)
    assert list(results) == [0, 1, 2] and all(list(own) == ["standard", "one_step_adv"] for own in results.values())
    alone = compare(config(tmp_path / "one", seeds=(), seed=1), splits=splits(), show="silent", say=said.append)
    assert alone["one_step_adv"].evaluation.pgd == results[1]["one_step_adv"].evaluation.pgd
    folders = [tmp_path / "all" / "seed-1", tmp_path / "one"]
    mine, theirs = (weights(checkpoint.load_network(folder / "one_step_adv")[0]) for folder in folders)
    assert same(mine, theirs)
    first, _ = checkpoint.load_network(tmp_path / "all" / "seed-0" / "one_step_adv")
    assert not same(mine, weights(first))

    pgd = [100 * own["one_step_adv"].evaluation.pgd for own in results.values()]
    table = said[said.index(f"files: {tmp_path / 'all'}") - 1]
    row = table.splitlines()[3]
    assert row.split()[0] == "one_step_adv" and f"{statistics.mean(pgd):.1f} ± {statistics.stdev(pgd):.1f} %" in row
    assert "mean ± standard deviation (of n - 1) over the seeds 0, 1, 2" in table
    written = json.loads((tmp_path / "all" / "results.json").read_text())
    own = written["methods"]["one_step_adv"]["pgd"]
    assert (100 * own["mean"], 100 * own["deviation"]) == pytest.approx((statistics.mean(pgd), statistics.stdev(pgd)))
    assert written["seeds"]["1"]["standard"]["clean"] == results[1]["standard"].evaluation.clean
    assert written["config"]["seeds"] == [0, 1, 2] and str(tmp_path) not in json.dumps(written)
    assert set(written["methods"]["standard"]) == set(figures(results[0]["standard"]))
    assert "over the seeds 0, 1, 2" in (tmp_path / "all" / "results.md").read_text()


def test_seeds_that_are_done_are_not_trained_again_and_new_ones_are_added(
    tmp_path: Path, epochs: list[tuple[int, str, int]]
) -> None:
    said: list[str] = []
    results = trained(config(tmp_path, seeds=(0, 1), beside=()), said)
    assert len(epochs) == 4
    again = resume_seeds(tmp_path, splits=splits(), show="silent", say=said.append, seeds=(5,), beside=("standard",))
    assert list(again) == [0, 1, 5] and again[1]["one_step_adv"] == results[1]["one_step_adv"]
    assert [each for each in epochs[4:] if each[:2] in ((0, "one_step_adv"), (1, "one_step_adv"))] == []
    assert sorted(set(epochs[4:])) == [
        (s, m, e) for s in (0, 1, 5) for m in ("one_step_adv", "standard") for e in (1, 2) if m == "standard" or s == 5
    ]
    with pytest.raises(FileExistsError, match="holds runs already: go on with them"):
        trained(config(tmp_path), said)


def test_an_interrupted_seed_goes_on_and_the_way_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: list[tuple[int, str, int]]
) -> None:
    said: list[str] = []
    save = engine.save

    def killed(run: Any) -> None:
        save(run)
        if (run.config.seed, run.epoch) == (1, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(config(tmp_path / "cut", beside=()), said)
    ways = [line for line in said if "to go on" in line]
    assert len(ways) == 1 and f"stored.resume_seeds('{tmp_path / 'cut'}', splits=...)" in ways[0]
    monkeypatch.setattr(engine, "save", save)
    resumed = resume_seeds(tmp_path / "cut", splits=splits(), show="silent", say=said.append)
    assert epochs == [(s, "one_step_adv", e) for s in (0, 1, 2) for e in (1, 2)]  # each once
    whole = trained(config(tmp_path / "whole", beside=(), seeds=(1,)), said)
    for seed in whole:
        mine, theirs = (own[seed]["one_step_adv"].evaluation for own in (resumed, whole))
        assert replace(mine, seconds=0) == replace(theirs, seconds=0)


def test_a_seed_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = comparing.train

    def failing(config: TrainConfig, **how: Any) -> Any:
        if config.seed in bad:
            raise NonFiniteLoss(7, torch.arange(2), {}, how["folder"] / "last.pt")
        return train(config, **how)

    monkeypatch.setattr(comparing, "train", failing)
    said: list[str] = []
    bad = {1}
    with pytest.raises(SeedsFailed, match="1 of 3 seeds failed, the table is that of 0, 2. seed 1: the loss is not"):
        trained(config(tmp_path / "a", beside=()), said)
    written = json.loads((tmp_path / "a" / "results.json").read_text())
    assert list(written["seeds"]) == ["0", "2"] and list(written["failed"]) == ["1"]
    assert "is in seed-1/one_step_adv/last.pt" in written["failed"]["1"] and str(tmp_path) not in json.dumps(written)
    assert any("over the seeds 0, 2" in line for line in said)
    bad = {0, 1, 2}
    with pytest.raises(SeedsFailed, match="3 of 3 seeds failed, there is no table"):
        trained(config(tmp_path / "b", beside=()), said)
    monkeypatch.setattr(comparing, "train", lambda *a, **how: (_ for _ in ()).throw(ValueError("no such thing")))
    with pytest.raises(ValueError, match="no such thing"):
        trained(config(tmp_path / "c", beside=()), said)
    assert not (tmp_path / "c").exists()


def test_what_seeds_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds must be different ones, got \(0, 1, 0\): name each once"):
        config(tmp_path, seeds=(0, 1, 0))
    with pytest.raises(ValueError, match="seeds must be a list of integers >= 0, got"):
        config(tmp_path, seeds=(-1,))
    with pytest.raises(ValueError, match="compare trains with one.* call atlas_train.seeds.compare_seeds"):
        compare(config(tmp_path), splits=splits())
    run = config(tmp_path, seeds=(), epochs=1, beside=())
    compare(run, splits=splits(), show="silent", say=lambda line: None)
    with pytest.raises(ValueError, match="is no folder of several seeds: leave seeds out"):
        resume_seeds(tmp_path / "one_step_adv", splits=splits(), seeds=(0, 1))


def test_the_command_line_takes_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    quick = "--epochs 1 --train-size 64 --width 2 --eval-size 8 --probe-size 0 --beside none --method standard"
    assert cli.main(["train", *quick.split(), "--seeds", "3", "4"]) == 0
    out = capsys.readouterr().out
    assert "seeds 3, 4" in out and "files: runs/digits-1\nnext: atlas report runs/digits-1 makes" in out
    assert {path.name for path in (tmp_path / "runs" / "digits-1").iterdir()} == {
        "seed-3", "seed-4", "config.json", "results.json", "results.md"
    }  # fmt: skip
    assert cli.main(["train", "--resume", "runs/digits-1", "--seeds", "5"]) == 0
    assert "over the seeds 3, 4, 5" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "runs/digits-1", "--seeds", "none"]) == 2
    assert "has several" in capsys.readouterr().err
    monkeypatch.setattr(several, "compare_once", lambda *how, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["train", "--resume", "runs/digits-1"]) == 130
    captured = capsys.readouterr()
    assert "to go on from the last checkpoint: atlas train --resume runs/digits-1" in captured.out


def test_a_best_epoch_of_some_seeds_is_a_line_of_all() -> None:
    def found(pgd: float) -> Evaluation:
        return Evaluation(0.5, 0.25, pgd, 100, 8 / 255, 20, 1 / 255, 1, 1.0, "cpu")

    same = Result(found(0.2), epoch=4)
    results = {
        0: {"adv": Result(found(0.1), 60.0, epoch=4, best=Result(found(0.3), epoch=2))},
        1: {"adv": replace(same, best=same, training_seconds=64.0)},
    }
    lines = table_of_seeds(results).splitlines()
    assert lines[2].startswith("adv, last (epoch 4)") and "15.0 ± 7.1 %" in lines[2] and "62.0 ± 2.8 s" in lines[2]
    assert (
        lines[3].startswith("adv, best (epochs 2 to 4)") and "25.0 ± 7.1 %" in lines[3] and "50.0 ± 0.0 %" in lines[3]
    )
    assert lines[-1] == "the last epoch is also the best of adv, seed 1"
    document = markdown_of_seeds(results, "title", {"torch": "2"})
    assert "| adv, best (epochs 2 to 4) | 50.0 ± 0.0 % |" in document and document.endswith("torch 2.\n")
