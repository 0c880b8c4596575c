"""A run that is stopped and resumed, beside one that is not."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_train import engine
from atlas_train.config import TrainConfig
from atlas_train.run import Run


def resumed_and_whole(method: str, hyper: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, buffers and memory of a run on digits: stopped after its second epoch, resumed, stopped by Ctrl-C within
    its third and resumed again; and in one piece."""
    config = TrainConfig(
        method, hyper, train_size=96, epochs=3, batch_size=32, width=4, lr=1e-2, probe_size=0, device="cpu", beside=()
    )
    whole = engine.train(config, folder=folder / "whole")

    def killed(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    try:
        engine.train(config, folder=folder / "killed", on_epoch=killed)
    except KeyboardInterrupt:
        torch.manual_seed(123)  # another process has another random state
    again = dataclasses.replace(config, resume=str(folder / "killed"))
    with in_step(7, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        engine.train(again)
    torch.manual_seed(123)
    resumed = engine.train(again)
    assert resumed.changes == []
    assert (whole.step, resumed.step) == (9, 9)
    memories = [{f"memory.{name}": value for name, value in run.memory.items()} for run in (resumed, whole)]
    return resumed.model.state_dict() | memories[0], whole.model.state_dict() | memories[1]


@contextmanager
def in_step(step: int, call: Callable[[], object]) -> Iterator[None]:
    """Calls ``call`` within that step (from 0) of a run, before it updates the weights."""
    rate = Run.rate

    def called(run: Run, update: int) -> float:
        if run.step == step and update == 0:
            call()
        return rate(run, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "rate", called)
        yield
