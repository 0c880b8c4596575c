"""A whole command: train the method and those beside it, evaluate each, and leave one table, one picture, one JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, progress
from .autoattack import autoattack, require_autoattack
from .config import TrainConfig, resolved, to_dict
from .data import DataSplits
from .engine import train
from .evaluate import evaluate
from .passes import passes_per_step
from .report import write_curves
from .results import Result, environment, markdown, table
from .run import Run, on_host

Results = dict[str, Result]
#: Settings that say where on this machine things are, and nothing about the results.
PLACES = ("data_dir", "out_dir", "resume")
EVALUATION, RESULTS, MARKDOWN, CURVES = "evaluation.json", "results.json", "results.md", "curves.png"


def compare(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    show: str = "auto",
    say: Callable[[str], None] = print,
) -> Results:
    """Trains ``config.method`` and every method in ``config.beside`` under the same settings and evaluates them.

    Returns what each came to. In the run's folder: a subfolder per method (last.pt, log.csv, model.safetensors,
    evaluation.json), results.json with configuration and environment, results.md and, with matplotlib, curves.png.

    Args:
        show: progress: auto, live, plain or silent.
        say: takes the lines between the progress and the final table.

    Raises FileExistsError when ``config.out_dir`` already holds such a run, and what ``train`` raises.
    """
    if config.autoattack:
        require_autoattack()
    splits = splits or data.load(config.dataset, config.data_dir, config.download)
    config = resolved(replace(config, beside=()) if config.resume else config, splits)
    root = checkpoint.locate(config.resume).parent.parent if config.resume else choose_folder(config)
    runs: dict[str, Run] = {}
    results: Results = {}
    for own in (_own(config, config.method), *(_own(config, name) for name in config.beside)):
        folder = checkpoint.locate(config.resume).parent if config.resume else root / own.method
        runs[own.label] = train(own, splits=splits, folder=folder, display=progress.make(show))
        results[own.label] = _result(runs[own.label], splits, say)
        checkpoint.write_json(folder / EVALUATION, results[own.label].evaluation.to_dict())
    results = {name: results[name] for name in (*config.beside, config.label)}
    folder = root if config.beside else folder
    drawn = write_curves(folder / CURVES, {name: runs[name].history for name in results})
    title = _write(folder, config, runs[config.label], results)
    say(f"\n{title}\n")
    say(table(results))
    say(f"files: {folder}" + ("" if drawn else " (no curves.png: matplotlib is not installed)"))
    return results


def _own(config: TrainConfig, name: str) -> TrainConfig:
    """The run of one method: the same settings, without what belongs to another method."""
    awp = config.awp if name == config.method else 0.0
    return replace(config, method=name, hyper=config.hyper_of(name), awp=awp, beside=())


def _result(run: Run, splits: DataSplits, say: Callable[[str], None]) -> Result:
    c, model = run.config, run.final_model
    with on_host(c.threads):
        found = evaluate(model, splits.test, c.eps, size=c.eval_size, channels_last=c.channels_last, say=say)
        result = Result(found, run.seconds, run.seconds / run.epoch, passes_per_step(run), run.skipped)
        if c.autoattack:
            how: dict[str, Any] = {"version": c.autoattack_version, "say": say}
            result = replace(result, autoattack=autoattack(model, splits.test, c.eps, c.autoattack, **how))
    return result


def _write(folder: Path, config: TrainConfig, run: Run, results: Results) -> str:
    """results.json and results.md, each of which explains itself; returns the title."""
    title = f"{run.splits.name}, {len(run.splits.train):,} training images, epochs {config.epochs}, seed {config.seed}"
    machine = environment(run.device, config.threads or torch.get_num_threads())
    values = {
        "methods": {name: result.to_dict() for name, result in results.items()},
        "config": {key: value for key, value in to_dict(config).items() if key not in PLACES},
        "environment": machine,
    }
    checkpoint.write_json(folder / RESULTS, values)
    checkpoint.write_text(folder / MARKDOWN, markdown(results, title, machine))
    return title


def choose_folder(config: TrainConfig) -> Path:
    """``out_dir`` if it holds no run of these methods yet; without ``out_dir``, the first free runs/<dataset>-<n>."""
    if config.out_dir is None:
        return next(folder for n in count(1) if not (folder := Path("runs") / f"{config.dataset}-{n}").exists())
    folder = Path(config.out_dir)
    for name in (config.method, *config.beside):
        own = folder / name
        if (own / checkpoint.LAST).exists():
            raise FileExistsError(
                f"out_dir {folder} already holds a run of {name}: go on with it (resume {own}) or choose another"
            )
    return folder
