"""The study of a recipe: rows are made once, gains are of the same seed, and every option is one of the trainer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import recipe
from atlas_train import data
from atlas_train.config import TrainConfig

SMALL = ["--base", "dataset=digits", "train_size=64", "epochs=2", "batch_size=32", "train_precision=fp32", "device=cpu"]


class Here:
    """A pool of processes that is this one."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recipe, "ProcessPoolExecutor", Here)
    yield
    recipe.splits_of.cache_clear()


@pytest.mark.parametrize("study", recipe.STUDIES)
def test_every_option_is_one_of_the_trainer(study: str) -> None:
    made = [TrainConfig(**recipe.BASE | changed) for changed in recipe.STUDIES[study].values()]
    assert all(made.count(config) == 1 for config in made)


def test_rows_are_made_once_and_gains_are_of_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    command = ["--results", str(path), *SMALL, "--eval-size", "40", "--options", "label smoothing 0.1", "linear"]
    recipe.main([*command, "--seeds", "1"])
    assert [(row["option"], row["seed"]) for row in recipe.read(path)] == [
        ("base", 0), ("label smoothing 0.1", 0), ("linear", 0),
    ]  # fmt: skip
    first = path.read_text()
    path.write_text(first + first[:50])  # cut off while it wrote
    recipe.main([*command, "--seeds", "2"])
    rows = recipe.read(path)
    assert len(rows) == 6 and sorted(row["seed"] for row in rows) == [0, 0, 0, 1, 1, 1]
    assert all(row["environment"]["commit"] and row["environment"]["device"] == "cpu" for row in rows)
    of = {(row["option"], row["seed"]): row["clean"] for row in rows}
    gain = 100 * statistics.mean(of["linear", seed] - of["base", seed] for seed in (0, 1))
    assert f"{gain:+.1f} \u00b1" in capsys.readouterr().out.split("linear  ")[-1]
    document = path.with_suffix(".md").read_text()
    assert "| linear" in document and "| s/epoch | MiB |" in document and all(row["memory"] > 0 for row in rows)
    older = [{name: value for name, value in row.items() if name != "memory"} for row in rows]
    assert recipe.gains_table(older)[0][-1] == "s/epoch" and recipe.gains_table([*older[:3], *rows[3:]])[1][-1] != "-"
    other = next(recipe.queue("recipe", rows[0]["base"] | {"epochs": 3}, ["base"], 1, rows))
    assert other["base"]["epochs"] == 3  # another base is another run


def test_ema_is_beside_the_weights_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "ema.jsonl"
    recipe.main(["--study", "ema", "--results", str(path), *SMALL, "--eval-size", "20", "--seeds", "1"])
    rows = {row["option"]: row for row in recipe.read(path)}
    warm, cold = (rows[f"lr constant, {name}"] for name in ("EMA 0.999 with warm-up", "without"))
    assert warm["raw"] == cold["raw"]  # an average changes nothing in training
    (_, lines), *_ = recipe.tables(list(rows.values()))
    assert (
        len(lines) == 5
        and lines[1][4] == f"{100 * (rows[lines[1][0]]['clean'] - rows[lines[1][0]]['raw']['clean']):+.1f}"
    )


def test_files_are_made_of_what_the_reduced_set_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, made = (
        tmp_path / "rows.jsonl",
        [name for name, changed in recipe.OPTIONS.items() if recipe.MADE in changed.values()],
    )
    recipe.main(["--results", str(path), *SMALL, "--eval-size", "20", "--seeds", "1", "--options", *made])
    assert [row["option"] for row in recipe.read(path)] == ["base", *made] and len(made) == 2
    images = data.load("digits").train
    config = TrainConfig(dataset="digits", train_size=64, seed=3)
    rest, kept = recipe._left_out(images, config), images.subset(64, 3)
    assert len(rest) == len(images) - 64
    assert not {image.tobytes() for image in rest.images.numpy()} & {image.tobytes() for image in kept.images.numpy()}
    with pytest.raises(ValueError, match="no image is left out as extra data: set train_size to less than"):
        recipe._left_out(images, TrainConfig(dataset="digits"))


def test_a_run_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    recipe.main(["--results", str(path), *SMALL, "lr=1e30", "--options", "clip norm 1", "--seeds", "1"])
    assert "base: no row: NonFiniteLoss" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no setting epoch:"):
        recipe.main(["--results", str(path), "--base", "epoch=2"])


def test_intervals_are_of_students_t() -> None:
    assert recipe.interval([]) == "-" and recipe.interval([0.01]) == "+1.0"
    assert recipe.interval([0.00, 0.02]) == "+1.0 \u00b1 12.7"
    assert recipe.interval([0.01, 0.02, 0.03]) == "+2.0 \u00b1 2.5"


def test_no_run_begins_that_would_not_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    recipe.main(["--results", str(path), *SMALL, "--limit-s", "0"])
    assert not path.exists()
