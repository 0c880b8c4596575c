"""A run of the study from its first epoch to its row; stopped or killed anywhere, it goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_train import checkpoint, methods
from atlas_train.config import TrainConfig, recorded, to_dict
from atlas_train.data import DataSplits
from atlas_train.engine import train
from atlas_train.machine import on_host, usable_device
from atlas_train.nonfinite import NonFiniteLoss
from atlas_train.passes import passes_per_step
from atlas_train.peak_memory import of_training
from atlas_train.results import environment
from atlas_train.run import Run
from atlas_train.saving import best_weights
from atlas_train.watch import collapses, telling
from atlas_train.writing import builtin
from studies import judged, rows
from studies.plan import Planned
from studies.rows import ROWS
from worker import commit_here, splits_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RUNS = ROOT / "benchmarks" / "results" / "atlas-study", ROOT / "runs" / "atlas-study"
VERDICTS = "verdicts"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where things lie: finished rows and verdicts, checkpoints, data; and where it runs."""

    results: Path = RESULTS
    runs: Path = RUNS
    data_dir: str | None = None
    device: str | None = None


def is_done(planned: Planned, results: Path) -> bool:
    """Whether there is a row of it, in ``results`` or among those of this repository."""
    wanted = (planned.name, planned.judge, planned.given)
    files = dict.fromkeys(folder / ROWS for folder in (results, RESULTS))
    return any(rows.key(row) == wanted for file in files for row in rows.read(file))


def finish(planned: Planned, places: Places, until: float = math.inf, parallel: int = 1, say: Say = print) -> bool:
    """Trains the run, judges it and adds its row; True when the row is there.

    until: by then (``time.time``) it ends after a whole epoch or a part of the images, with nothing lost, and without a
    row. parallel: how many runs share the machine, for the row. Raises what ``train`` raises, but for a loss that is
    not finite: of that a row tells.
    """
    if is_done(planned, places.results):
        return True
    folder = places.runs / planned.folder
    config = _on(planned.config(data_dir=places.data_dir, device=places.device), places.device)
    if (folder / checkpoint.LAST).exists():
        config = replace(config, resume=str(folder))
    splits = splits_of(config.dataset, places.data_dir)
    known = {"name": planned.name, "bed": planned.bed, "recipe": planned.recipe, "epochs": planned.epochs}
    known |= {"eps": planned.eps, "seed": planned.seed, "judge": planned.judge, "parallel": parallel}
    known["given"] = planned.given
    try:
        run = train(config, splits=splits, folder=folder, on_epoch=_stopping(until))
    except NonFiniteLoss as error:
        ended = str(error).partition(";")[0]
        failed = {"ended": ended, "settings": _json(to_dict(planned.config()))}
        rows.append(places.results / ROWS, known | failed | _machine(usable_device(config.device)))
        say(f"{planned.name}: {ended}")
        return True
    if run.epoch < run.config.epochs and not run.ended:
        say(f"{planned.name}: stopped after epoch {run.epoch} of {run.config.epochs}; it goes on from there")
        return False
    with on_host(run.config.threads):
        accuracies = _judged(planned, run, splits, folder, places, until)
        if accuracies is None:
            say(f"{planned.name}: trained, and judged in part; it goes on from there")
            return False
        row = known | accuracies | _facts(run) | _machine(run.device)
    rows.append(places.results / ROWS, row)
    told = ", ".join(f"{name} {100 * row[name]:.1f}" for name in judged.MEASURES)
    say(f"{planned.name}: {told} % of {row['images']:,} images" + (f"; {run.ended}" if row["collapses"] else ""))
    return True


def _on(config: TrainConfig, device: str | None) -> TrainConfig:
    """With what makes it fast there and changes nothing else: graphs of whole steps on a GPU."""
    cuda = usable_device(device).type == "cuda" and not methods.get(config.method).no_graph
    return replace(config, cuda_graphs="step") if cuda else config


def _stopping(until: float) -> Callable[[dict[str, Any]], bool]:
    """Whether another epoch as long as the last would end too late."""
    began = time.time()

    def stop(row: dict[str, Any]) -> bool:
        nonlocal began
        now = time.time()
        took, began = now - began, now
        return now + took > until

    return stop


def _judged(
    planned: Planned, run: Run, splits: DataSplits, folder: Path, places: Places, until: float
) -> dict[str, Any] | None:
    """Accuracies of the weights that validation chose and, in a screening, of those of the last epoch, on a part of the
    images, which show what a collapse has left. None where there was no time for all of it."""
    ids, images = judged.judging(planned, splits)
    version, began = judged.ATTACKS[planned.judge], time.time()

    def judge(model: torch.nn.Module, whose: str, ids: np.ndarray) -> judged.Arrays | None:
        path = folder / f"judged-{planned.judge}-{whose}.npz"
        return judged.judge(model, images, ids, run.config.eps, version, path, until)

    screens = planned.judge == "screen"
    with best_weights(run) as better:
        best = judge(better, "best", ids) if better else None
    if better and best is None:
        return None
    few = judged.a_part(ids) if better else ids
    last = judge(run.final_model, "last", few) if screens or not better else {}
    if last is None:
        return None
    arrays = {"ids": ids.astype(np.int32), **(best or last)}
    arrays |= {f"last_{name}": right for name, right in last.items()} if best and screens else {}
    name = f"{planned.folder}-{planned.judge}.npz"
    judged.save(places.results / VERDICTS / name, arrays)
    means = {name: float(right.mean()) for name, right in (best or last).items()}
    means |= {f"last_{name}": float(right.mean()) for name, right in last.items()}
    made = {"attack": version, "images": len(ids), "verdicts": f"{VERDICTS}/{name}"}
    return means | made | {"judge_seconds": round(time.time() - began, 1)}


def _facts(run: Run) -> dict[str, Any]:
    """What training came to and cost."""
    told = [f"{epoch}: {sign}" for epoch, sign in collapses(run.history, telling(run))]
    return {
        "best_epoch": run.best,
        "epochs_done": run.epoch,
        "ended": run.ended or None,
        "collapses": "; ".join(told) or None,
        "passes": passes_per_step(run),
        "seconds": round(run.seconds, 2),
        "epoch_seconds": round(run.seconds / run.epochs_done, 3),
        "memory": of_training(run),
        "settings": _json(recorded(run.config)),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    machine = environment(device, torch.get_num_threads()) | {"commit": commit_here()}
    return {name: machine[name] for name in ("date", "commit", "torch", "device", "cpu", "threads")}


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(builtin(settings), sort_keys=True)
