"""A run that is stopped and resumed, beside one that is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas_train import engine
from atlas_train.config import TrainConfig


def resumed_and_whole(method: str, hyper: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, buffers and memory of a run on digits: killed in its third epoch and resumed, and in one piece."""
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
    resumed = engine.train(dataclasses.replace(config, resume=str(folder / "killed")))
    assert (whole.step, resumed.step) == (9, 9)
    memories = [{f"memory.{name}": value for name, value in run.memory.items()} for run in (resumed, whole)]
    return resumed.model.state_dict() | memories[0], whole.model.state_dict() | memories[1]
