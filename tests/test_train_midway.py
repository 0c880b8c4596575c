"""Checkpoints within an epoch, and what of a run lasts that is stopped there."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atlas_kernels as ak
from atlas_train import checkpoint, engine, segment
from atlas_train.config import TrainConfig
from atlas_train.data import Batches
from atlas_train.nonfinite import Losses
from atlas_train.stored import evaluate_checkpoint
from killed import beside, differences
from resume import in_step
from tiny_runs import TINY, Lines, splits

SETTINGS = TINY | {"val_size": 16, "epochs": 3}  # of four batches
STEP = 6  # the third batch of the second epoch


def stopped(config: TrainConfig, folder: Path, number: int = signal.SIGINT, times: int = 1, step: int = STEP) -> None:
    """Trains until signals come within a step."""

    def signals() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    lines = Lines()
    with in_step(step, signals), pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        engine.train(config, splits=splits(80), folder=folder, display=lines)
    assert any("stopping after this batch" in text for text in lines.said) == (config.save_every > 0)
    assert number == signal.SIGINT or stop.value.code == 128 + number  # type: ignore[union-attr]


def resumed(config: TrainConfig, folder: Path, **more: Any) -> Any:
    return engine.train(dataclasses.replace(config, resume=str(folder)), splits=splits(80), **more)


def test_ten_kills_change_no_bit(tmp_path: Path) -> None:
    config = TrainConfig("fgsm_pgi", averaging="ema", **SETTINGS | {"save_every": 1e-9})
    within, differ = beside(config, tmp_path / "whole", tmp_path / "cut", 10)
    assert not differ and within > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "atlas", "hyper": {"local": "start"}, "averaging": "swa", "swa_start": 0.5},
        {"method": "one_step_adv", "optimizer": "sgd", "schedule": "one_cycle", "momentum_low": 0.5},
        {"method": "atlas", "mix_share": 0.5, "averaging": "ema", "average_bn": "method", "eps_warmup": 2},
        {"method": "trades", "awp": 0.01, "mixup": 1.0, "on_nonfinite": "skip"},
    ],
    ids=lambda settings: settings["method"],
)
def test_ctrl_c_loses_no_batch(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "EVERY", 3)  # the second look is in the second epoch, before the stop
    config = TrainConfig(**SETTINGS | settings)
    engine.train(config, splits=splits(80), folder=tmp_path / "whole")
    step = 7 if settings["method"] == "one_step_adv" else STEP  # the last batch of the epoch
    stopped(config, tmp_path / "cut", step=step)
    state = checkpoint.load(tmp_path / "cut")
    assert (state["epoch"], state["step"], state["within"]["batches"]) == (1, step + 1, step + 1 - 4)
    assert state["within"]["segment"] is not None
    torch.manual_seed(123)
    lines = Lines()
    resumed(config, tmp_path / "cut", display=lines)
    assert f"resumed in epoch 2 of 3, after {step - 3} of 4 batches" in lines.said
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_batch_that_was_left_out_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Losses.add

    def spoiled(self: Losses, ids: Tensor, loss: Tensor, metrics: Any) -> None:
        add(self, ids, loss * float("inf") if self._run.step == 5 else loss, metrics)

    monkeypatch.setattr(Losses, "add", spoiled)
    config = TrainConfig("standard", **SETTINGS | {"on_nonfinite": "skip"})
    stopped(config, tmp_path)
    assert checkpoint.load(tmp_path)["within"]["skipped"] == 1
    assert resumed(config, tmp_path).history[1]["skipped"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_saves_too(tmp_path: Path, number: int) -> None:
    stopped(TrainConfig("standard", **SETTINGS), tmp_path, number)
    assert checkpoint.load(tmp_path)["step"] == STEP + 1
    assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    stopped(TrainConfig("standard", **SETTINGS), tmp_path, times=2)
    assert checkpoint.load(tmp_path)["step"] == 4  # the step was broken off, so its state is of no use


def test_without_save_every_the_last_epoch_is_kept(tmp_path: Path) -> None:
    stopped(TrainConfig("standard", **SETTINGS | {"save_every": 0}), tmp_path)
    assert checkpoint.load(tmp_path)["step"] == 4


def test_a_state_with_nan_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        monkeypatch.setattr(checkpoint, "not_finite", lambda model: {"conv1.weight"})
        signal.raise_signal(signal.SIGINT)

    with in_step(STEP, broken), pytest.raises(KeyboardInterrupt):
        engine.train(TrainConfig("standard", **SETTINGS), splits=splits(80), folder=tmp_path)
    assert checkpoint.load(tmp_path)["step"] == 4


def test_a_failure_in_the_first_epoch_keeps_what_was_saved(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with in_step(2, fail), pytest.raises(OSError, match="gone"):
        engine.train(TrainConfig("standard", **SETTINGS | {"save_every": 1e-9}), splits=splits(80), folder=tmp_path)
    assert checkpoint.load(tmp_path)["step"] == 2


def test_the_best_epoch_is_evaluated_beside_weights_of_a_later_batch(tmp_path: Path) -> None:
    config = TrainConfig("standard", **SETTINGS | {"eval_size": 8})
    stopped(config, tmp_path)
    assert checkpoint.load(tmp_path)["best"] == 1
    (result,) = evaluate_checkpoint(tmp_path, splits=splits(80), steps=1, say=lambda text: None).values()
    assert result.best is not None and result.best.epoch == 1


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = TrainConfig("standard", **SETTINGS)
    stopped(config, tmp_path)
    with pytest.raises(ValueError, match="is in epoch 2 already, you gave epochs=1: give epochs=2 or more"):
        resumed(dataclasses.replace(config, epochs=1), tmp_path)
    state = checkpoint.load(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "step 7 is not batch 2 of 4 after epoch 1": {"batches": 2},
        "within.batches must be an integer >= 1, got 0": {"batches": 0},
        "within.metrics must have 3 values of each": {"metrics": {"loss": torch.ones(2)}},
        "within.metrics must have 2 values of each": {"skipped": 1},
        "within.segment must be None or a number": {"segment": "0"},
    }
    for message, changed in changes.items():
        damaged = {**state, "within": state["within"] | changed}
        checkpoint.save(tmp_path / checkpoint.LAST, damaged)
        with pytest.raises(ValueError, match=message):
            resumed(config, tmp_path)


def test_batches_that_are_passed_over_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    augment = ak.augment
    monkeypatch.setattr(ak, "augment", lambda *args, **kwargs: (made.append(1), augment(*args, **kwargs))[1])
    batches = Batches(splits().train, 8, shuffle=True, seed=3, device="cpu", augment=True)
    batches.set_epoch(2)
    whole = list(batches)
    made.clear()
    rest = list(batches.starting(5))
    assert len(rest) == len(made) == 3
    for batch, same in zip(rest, itertools.islice(whole, 5, None), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
