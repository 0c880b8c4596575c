"""A run that is killed again and again (kill -9) and resumed, beside one that is not: `python tests/killed.py -h`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from atlas_train import checkpoint, engine
from atlas_train.config import TrainConfig
from tiny_runs import TINY, splits

#: Epochs of six batches, each of which is saved.
SETTINGS: dict[str, Any] = {**TINY, "val_size": 16, "save_every": 1e-9}
#: What two runs of the same bits may differ in, times apart.
_TIMES, _OTHER = {"seconds", "images_per_s"}, {"config", "changes", "seconds"}


def train(config: TrainConfig, folder: Path) -> None:
    """Trains in ``folder``, or goes on there."""
    resume = str(folder) if (folder / checkpoint.LAST).exists() else None
    engine.train(dataclasses.replace(config, resume=resume), splits=splits(112), folder=folder)


def train_and_kill(config: TrainConfig, folder: Path, times: int, seed: int) -> int:
    """Trains to the end, in processes of which ``times`` are killed: every other one after it has saved, the others at
    any time. Returns how many left a checkpoint within an epoch."""
    draw, within = random.Random(seed), 0
    for number in range(times):
        before, child = _stamp(folder), os.fork()
        if not child:
            status = 1
            try:
                train(config, folder)
                status = 0
            finally:
                os._exit(status)
        ended = 0
        while number % 2 == 0 and _stamp(folder) == before and not ended:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)[0]
        assert not ended, "the run was over before all kills, or failed"
        time.sleep(draw.uniform(0, 0.02 if number % 2 == 0 else 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it was over, or failed"
        within += (folder / checkpoint.LAST).exists() and "within" in checkpoint.load(folder)
    train(config, folder)
    return within


def differences(one: Path, other: Path) -> list[str]:
    """What of two runs' checkpoints differs."""
    found = []
    for name in (checkpoint.LAST, checkpoint.BEST):
        states = [checkpoint.load(folder / name) for folder in (one, other)]
        for key in sorted(set().union(*states) - _OTHER):
            values = [_without_times(state.get(key)) for state in states]
            found += [] if _same(*values) else [f"{name}: {key}"]
    return found


def _stamp(folder: Path) -> int:
    path = folder / checkpoint.LAST
    return path.stat().st_mtime_ns if path.exists() else 0


def _without_times(value: Any) -> Any:
    rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return [{key: v for key, v in row.items() if key not in _TIMES} for row in value] if rows else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--method", default="fgsm_pgi")
    parser.add_argument("--averaging", default="ema")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        within, found = beside(TrainConfig(o.method, averaging=o.averaging, **SETTINGS), whole, cut, o.times, o.seed)
    print(
        f"{o.method}: killed {o.times} times, {within} times within an epoch; differs: {', '.join(found) or 'nothing'}"
    )
    raise SystemExit(bool(found))


def beside(config: TrainConfig, whole: Path, cut: Path, times: int, seed: int = 0) -> tuple[int, list[str]]:
    """Kills that left a checkpoint within an epoch, and what differs from the run that was not killed."""
    config = dataclasses.replace(config, epochs=4 + 2 * times)
    train(config, whole)  # first, as what a process imports on its way then costs the others nothing
    within = train_and_kill(config, cut, times, seed)
    return within, differences(whole, cut)


if __name__ == "__main__":
    main()
