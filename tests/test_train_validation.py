"""Validation: which images it holds out, what it looks at, and the checkpoint that it keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atlas_kernels import PGD
from atlas_train import checkpoint, engine, saving, validation, watch
from atlas_train.compare import CONFIG, compare, settings_of
from atlas_train.config import TrainConfig, resolved
from atlas_train.data import Batches, DataSplits, Images, held_out
from atlas_train.noise import noise_keys
from atlas_train.passes import count_passes, passes_per_step
from atlas_train.run import Run
from atlas_train.stored import evaluate_checkpoint, resume, resume_compare
from tiny_runs import EPS, TINY, Lines, same, splits, weights

VALIDATED = TINY | {"val_size": 16, "train_size": 48, "probe_size": 0}


def numbered(count: int = 200) -> Images:
    """Images that say which they are."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return Images(pixels, torch.arange(count) % 4)


def ids(images: Images | None) -> list[int]:
    assert images is not None
    return images.images[:, 0, 0, 0].tolist()


def script(monkeypatch: pytest.MonkeyPatch, pgd: Iterable[float], clean: Iterable[float] | None = None) -> None:
    """Validation finds these accuracies, epoch after epoch."""
    robust, plain = iter(pgd), iter(clean or [])
    monkeypatch.setattr(watch, "validate", lambda run: {"val_clean": next(plain, 0.9), "val_pgd": next(robust)})


# --- the images


def test_images_are_held_out_by_the_seed_and_never_trained_on() -> None:
    train, val = held_out.split(numbered(), None, 40, 3)
    assert sorted(ids(train) + ids(val)) == list(range(200)) and len(val or ()) == 40
    assert val is not None and torch.bincount(val.labels).tolist() == [10] * 4
    assert torch.equal(val.labels, torch.tensor(ids(val)) % 4)
    again, other = (held_out.split(numbered(), None, 40, seed)[1] for seed in (3, 4))
    assert ids(val) == ids(again) != ids(other)


def test_a_part_of_the_images_is_the_one_that_it_was_without_validation() -> None:
    train, val = held_out.split(numbered(), 60, 40, 3)
    assert ids(train) == ids(numbered().subset(60, 3)) == ids(held_out.split(numbered(), 60, 0, 3)[0])
    assert len(ids(val)) == 40 and not set(ids(val)) & set(ids(train))


@pytest.mark.parametrize(
    ("images", "train_size", "size"),
    [(50_000, None, 1000), (60_000, None, 1000), (50_000, 10_000, 500), (30_000, None, 600), (1297, None, 129),
     (64, None, 6), (9, None, 0), (50_000, 49_800, 200), (50_000, 50_000, 0)],
)  # fmt: skip
def test_how_many_are_held_out_by_default(images: int, train_size: int | None, size: int) -> None:
    assert held_out.default_size(images, train_size) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_size": 64}, "val_size 64 leaves none of the 64 training images to train on: give less, or 0"),
        ({"val_size": 10**6}, "val_size 1,000,000 leaves none of the 64"),
        ({"val_size": 20, "train_size": 45}, "train_size 45 and val_size 20 are more than the 64 training images"),
        ({"val_size": -1}, "val_size must be an integer >= 0, got -1"),
        ({"early_stop": 2}, "early_stop goes by validation, and val_size is 0"),
        ({"early_stop": -2}, "early_stop must be an integer >= 0"),
        ({"on_collapse": "rollback"}, "on_collapse='rollback' goes by validation, and val_size is 0"),
        ({"on_collapse": "undo"}, "on_collapse must be one of 'warn', 'stop', 'rollback', got 'undo'"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.train(TrainConfig(**TINY | settings), splits=splits(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what is looked at


@pytest.mark.parametrize(
    ("averaging", "norm", "eps"),
    [("none", "linf", 0.3), ("ema", "linf", 0.3), ("swa", "linf", 0.3), ("none", "l2", 2.0)],
)
def test_the_weights_that_are_exported_are_validated(averaging: str, norm: Any, eps: float) -> None:
    settings = VALIDATED | {"averaging": averaging, "ema_decay": 0.9, "swa_start": 0.5, "eps": eps, "norm": norm}
    run = engine.train(TrainConfig(**settings), splits=splits(train=96))
    assert run.validation is not None and len(run.validation) == 16 and len(run.splits.train) == 48
    x, y = run.validation.images.float() / 255, run.validation.labels

    def accuracies(model: Any) -> tuple[float, ...]:
        model.eval()
        adv = PGD(eps, steps=5, norm=norm)(model, x, y, key=noise_keys(0, -2, 1)[0])
        further = PGD(eps, eps / 8, steps=5, norm=norm)(model, x, y, start=adv)
        right = model(x).argmax(1) == y
        half = right & (model(adv).argmax(1) == y)
        robust = half & (model(further).argmax(1) == y)
        return right.float().mean().item(), half.float().mean().item(), robust.float().mean().item()

    row = run.history[-1]
    assert (row["val_clean"], row["val_pgd_5"], row["val_pgd"]) == accuracies(run.final_model)
    assert 0 < row["val_pgd"] < 1
    if averaging != "none":
        assert run.final_model is not run.model


def test_a_method_without_an_attack_is_validated_on_clean_images(tmp_path: Path) -> None:
    run = engine.train(TrainConfig(**VALIDATED | {"method": "standard"}), splits=splits(train=96), folder=tmp_path)
    assert all("val_pgd" not in row and row["val_clean"] > 0 for row in run.history)
    accuracies = [row["val_clean"] for row in run.history]
    assert run.best == accuracies.index(max(accuracies)) + 1
    assert validation.rule("standard", 16) == "the highest clean accuracy on 16 validation images, then the earliest"


def test_what_validation_costs_is_what_it_computes() -> None:
    run = engine.train(TrainConfig(**VALIDATED | {"probe_size": 16}), splits=splits(train=96))
    assert run.validation is not None
    x = run.validation.images.float() / 255
    run.history = [validation.validate(run) | watch.probe(run)]
    counted = count_passes(run.model, x, lambda: validation.validate(run) | watch.probe(run))
    share = validation.share(run, 11.0)
    assert share is not None and share * 11 * 48 / 16 == pytest.approx(counted, rel=0.02)


def test_validation_costs_four_percent_of_an_epoch_of_atlas_on_cifar10() -> None:
    """11 passes for each of the 49,000 images that are left; 23 at most for each of the 1,000 that are held out and 22
    for the 64 of the probe. Images that are wrong after five steps cost 11."""
    run = engine.train(TrainConfig(**TINY | {"epochs": 1, "val_size": 8, "probe_size": 64}), splits=splits())
    passes = passes_per_step(run)
    assert passes == pytest.approx(11, rel=0.02)
    size = held_out.default_size(50_000, None)
    run.validation, run.splits = numbered(size), dataclasses.replace(splits(), train=numbered(50_000 - size))
    run.batches = Batches(run.splits.train, 128, shuffle=True, seed=0, device="cpu", drop_last=True)
    for clean, half, most in ((0.9, 0.6, 0.0346), (0.95, 0.75, 0.0389)):
        run.history = [{"val_clean": clean, "val_pgd_5": half, "probe": half}]
        share = validation.share(run, 11.0)
        assert share is not None and share == pytest.approx(most, abs=1e-4)


# --- best.pt


def test_the_best_epoch_stays_beside_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.5, 0.5, 0.2], [0.9, 0.8, 0.8, 0.99])  # of equal ones the first
    seen: list[dict[str, Tensor]] = []
    held: list[Run] = []
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *args: held.append(prepare(*args)) or held[0])
    look = lambda row: seen.append(weights(held[0].model)) and None  # noqa: E731
    run = engine.train(TrainConfig(**VALIDATED), splits=splits(), folder=tmp_path, on_epoch=look)
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path)
    assert (run.best, best["epoch"], best["best"], last["epoch"], last["best"]) == (2, 2, 2, 4, 2)
    assert same(best["model"], seen[1]) and same(last["model"], seen[3])
    network, _ = checkpoint.load_model(tmp_path / checkpoint.export_name().replace("model", "best"))
    assert same(weights(network), seen[1]) and same(weights(run.model), seen[3])


def test_of_equally_robust_epochs_the_more_accurate_is_the_best() -> None:
    row = {"val_pgd": 0.5, "val_clean": 0.8}
    assert validation.better(row, None) and not validation.better(row, row)
    assert validation.better(row | {"val_clean": 0.81}, row) and not validation.better(row | {"val_pgd": 0.49}, row)
    assert validation.better({"val_clean": 0.81}, {"val_clean": 0.8})
    assert not validation.better({"probe": 0.5}, None)


def test_a_run_without_validation_keeps_no_best(tmp_path: Path) -> None:
    run = engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), folder=tmp_path)
    assert run.best == 0 and not (tmp_path / "best.pt").exists() and validation.rule("atlas", 0) is None


def test_the_table_says_where_the_last_epoch_is_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.5, 0.6, 0.7])
    lines: list[str] = []
    compare(TrainConfig(**VALIDATED | {"out_dir": str(tmp_path)}), splits=splits(), show="silent", say=lines.append)
    assert lines[-2].splitlines()[-1] == "the last epoch is also the best of atlas"


def test_tables_and_files_give_best_and_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.5, 0.4, 0.2])
    lines: list[str] = []
    config = TrainConfig(**VALIDATED | {"out_dir": str(tmp_path)})
    (result,) = compare(config, splits=splits(), show="silent", say=lines.append).values()
    assert result.epoch == 4 and result.best is not None and result.best.epoch == 2
    table = lines[-2].splitlines()
    assert table[2].startswith("atlas, last (epoch 4)") and table[3].startswith("atlas, best (epoch 2)")
    assert table[5].startswith(
        "best: the epoch with the highest PGD-10 accuracy on 16 validation images, of equal ones the highest clean "
        "accuracy, then the earliest; validation and probe cost "
    )
    written = json.loads((tmp_path / "atlas" / "results.json").read_text())
    own = written["methods"]["atlas"]
    assert (own["epoch"], own["best"]["epoch"], own["best"]["clean"]) == (4, 2, result.best.evaluation.clean)
    assert written["validation"]["images"] == 16 and "highest PGD-10" in own["rule"]
    assert "best: the epoch with" in (tmp_path / "atlas" / "results.md").read_text()

    (again,) = resume_compare(tmp_path / "atlas", splits=splits(), show="silent", say=lines.append).values()
    assert again == result and any("evaluated before" in line for line in lines)
    (found,) = evaluate_checkpoint(tmp_path / "atlas", splits=splits(), say=lines.append).values()
    assert found.best is not None and (found.epoch, found.best.epoch, found.rule) == (4, 2, result.rule)
    assert lines[-2] == "and the best epoch, 2:"
    drop = {"seconds": 0.0}
    for mine, theirs in ((found, result), (found.best, result.best)):
        assert dataclasses.replace(mine.evaluation, **drop) == dataclasses.replace(theirs.evaluation, **drop)
    (only,) = evaluate_checkpoint(tmp_path / "atlas" / "best.pt", splits=splits(), say=lines.append).values()
    assert only.best is None and only.epoch == 2
    assert dataclasses.replace(only.evaluation, **drop) == dataclasses.replace(result.best.evaluation, **drop)


# --- runs that end early, or are stopped


def test_a_run_ends_after_so_many_epochs_that_were_no_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.5, 0.5, 0.4, 0.9, 0.8, 0.9, 0.7])
    lines, config = Lines(), TrainConfig(**VALIDATED | {"early_stop": 2, "epochs": 8})
    run = engine.train(config, splits=splits(), folder=tmp_path, display=lines)
    told = "validation was no better for 2 epochs than in epoch 2"
    assert (run.epoch, run.best, run.ended) == (4, 2, told)
    assert f"{told}: the run ends after epoch 4 of 8" in lines.said
    again = resume(tmp_path, splits=splits(), display=lines)
    assert again.epoch == 4 and same(weights(again.model), weights(run.model))
    assert f"nothing to train: {told}; another value of" in lines.said[-1]
    assert resume(tmp_path, splits=splits(), early_stop=3).epoch == 8  # epoch 5 is the best, and 6 to 8 are no better


def test_a_run_that_is_killed_goes_on_with_its_best_to_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(**VALIDATED | {"averaging": "ema", "epochs": 5})
    whole = engine.train(config, splits=splits(), folder=tmp_path / "whole")
    child = os.fork()
    if not child:  # ends as by kill -9
        look = lambda row: row["epoch"] == 3 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        engine.train(config, splits=splits(), folder=tmp_path / "killed", on_epoch=look)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = checkpoint.load(tmp_path / "killed")["best"]
    assert kept > 0 and checkpoint.load(tmp_path / "killed" / "best.pt")["epoch"] == kept
    run = engine.train(dataclasses.replace(config, resume=str(tmp_path / "killed")), splits=splits())
    assert same(weights(run.model), weights(whole.model)) and run.best == whole.best
    ours, theirs = (checkpoint.load(tmp_path / name / "best.pt") for name in ("killed", "whole"))
    assert ours["epoch"] == theirs["epoch"] and same(ours["model"], theirs["model"])


def test_a_run_that_is_stopped_before_best_is_written_has_it_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, [0.3, 0.5, 0.4, 0.2])

    def stop(path: Path, source: Path) -> None:
        if checkpoint.load(source)["epoch"] == 2:
            raise KeyboardInterrupt
        link(path, source)

    link = saving.write_link
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "write_link", stop)
        engine.train(TrainConfig(**VALIDATED), splits=splits(), folder=tmp_path)
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 1 and checkpoint.load(tmp_path)["epoch"] == 2
    run = resume(tmp_path, splits=splits())
    assert run.best == 2 and checkpoint.load(tmp_path / "best.pt")["epoch"] == 2


def test_a_run_that_goes_on_elsewhere_takes_its_best_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    config = TrainConfig(**VALIDATED | {"schedule": "constant"})
    engine.train(dataclasses.replace(config, epochs=2), splits=splits(), folder=tmp_path / "a")
    more = dataclasses.replace(config, resume=str(tmp_path / "a"))
    run = engine.train(more, splits=splits(), folder=tmp_path / "b")
    assert run.best == 1 and checkpoint.load(tmp_path / "b" / "best.pt")["epoch"] == 1
    (tmp_path / "a" / "best.pt").unlink()
    lines = Lines()
    run = engine.train(dataclasses.replace(more, epochs=3), splits=splits(), display=lines)
    assert run.best == 3 and checkpoint.load(tmp_path / "a" / "best.pt")["epoch"] == 3
    assert "best.pt, of epoch 1, is no longer there" in lines.said[0]


def test_a_run_goes_on_from_its_best_epoch_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.5, 0.4, 0.2, 0.6, 0.9])
    whole = engine.train(TrainConfig(**VALIDATED), splits=splits(), folder=tmp_path)
    assert (tmp_path / checkpoint.export_name()).with_stem("best").exists()
    run = resume(tmp_path / "best.pt", splits=splits())
    assert [row["val_pgd"] for row in run.history] == [0.3, 0.5, 0.6, 0.9] and same(
        weights(run.model), weights(whole.model)
    )
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == run.best == 4
    assert not (tmp_path / checkpoint.export_name()).with_stem("best").exists()  # best and last are one


def test_disks_without_second_names_get_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    run = engine.train(TrainConfig(**VALIDATED | {"epochs": 1}), splits=splits(), folder=tmp_path)
    assert run.best == 1 and (tmp_path / "best.pt").read_bytes() == (tmp_path / "last.pt").read_bytes()
    assert not (tmp_path / "best.pt").samefile(tmp_path / "last.pt")


# --- checkpoints of versions before


def made_old(path: Path) -> None:
    """The checkpoint as a version without validation would have written it."""
    state = torch.load(path, weights_only=True)
    for name in ("validation", "best", "rescues", "ended"):
        del state[name]
    for name in ("val_size", "on_collapse", "early_stop"):
        del state["config"][name]
    state["config"]["val_every"] = 0
    state["hyper"].pop("wide_start", None)
    checkpoint.save(path, state)


def stop_after(epochs: int) -> Any:
    def look(row: dict[str, Any]) -> bool:
        return bool(row["epoch"] == epochs)

    return look


@pytest.mark.filterwarnings("error")
def test_an_old_run_goes_on_with_the_images_that_it_had(tmp_path: Path) -> None:
    config = TrainConfig(**TINY)
    whole = engine.train(config, splits=splits())
    engine.train(config, splits=splits(), folder=tmp_path, on_epoch=stop_after(2))
    made_old(tmp_path / "last.pt")
    run = resume(tmp_path, splits=splits())
    assert same(weights(run.model), weights(whole.model)) and run.validation is None and run.config.val_size == 0

    engine.train(config, splits=splits(), folder=tmp_path / "b", on_epoch=stop_after(2))
    made_old(tmp_path / "b" / "last.pt")
    with pytest.raises(ValueError, match="other hyper-parameters: it has .*'wide_start': 0.0.*, you gave"):
        resume(tmp_path / "b", splits=splits(), hyper={"wide_start": 2.0})
    asked = dataclasses.replace(config, val_size=None, resume=str(tmp_path / "b"))
    assert same(weights(engine.train(asked, splits=splits()).model), weights(whole.model))
    with pytest.raises(ValueError, match="another val_size: it has 0, you gave 8"):
        resume(tmp_path, splits=splits(), val_size=8)
    with pytest.raises(ValueError, match="on_collapse='rollback' goes by validation, and val_size is 0"):
        resume(tmp_path, splits=splits(), on_collapse="rollback")


def test_an_old_comparison_goes_on_with_the_images_that_it_had(tmp_path: Path) -> None:
    config = TrainConfig(**TINY | {"beside": ("standard",), "epochs": 1, "out_dir": str(tmp_path)})
    compare(config, splits=splits(), show="silent", say=lambda text: None)
    for name in ("atlas", "standard"):
        made_old(tmp_path / name / "last.pt")
    settings = json.loads((tmp_path / CONFIG).read_text())
    del settings["val_size"], settings["on_collapse"], settings["early_stop"]
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert settings_of(tmp_path).val_size == 0
    results = resume_compare(tmp_path, splits=splits(), show="silent", say=lambda text: None, beside=("one_step_adv",))
    assert {result.rule for result in results.values()} == {None}
    again = dataclasses.replace(config, val_size=None, resume=str(tmp_path))
    assert len(compare(again, splits=splits(), show="silent", say=lambda text: None)) == 3


def test_other_images_held_out_are_refused(tmp_path: Path) -> None:
    engine.train(TrainConfig(**VALIDATED | {"epochs": 1}), splits=splits(), folder=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["validation"]["sha256"] = "0" * 64
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(ValueError, match="holds out other images for validation"):
        resume(tmp_path, splits=splits())


def test_the_default_is_filled_in() -> None:
    data = DataSplits("bars", numbered(100), splits().test, 4, EPS)
    assert resolved(TrainConfig(**{**TINY, "val_size": None}), data).val_size == 10
    assert np.isin(ids(held_out.split(data.train, None, 10, 0)[1]), np.arange(100)).all()
