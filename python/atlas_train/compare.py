"""A whole command: train the method and those beside it, evaluate each, and leave one table, one picture, one JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

from . import checkpoint, data, progress
from .config import TrainConfig, resolved
from .data import DataSplits
from .engine import train
from .evaluate import Evaluation, evaluate
from .report import table, write_curves
from .run import Run, cpu_threads

Results = dict[str, tuple[Evaluation, float | None]]
EVALUATION, RESULTS, CURVES = "evaluation.json", "results.json", "curves.png"


def compare(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    show: str = "auto",
    say: Callable[[str], None] = print,
) -> Results:
    """Trains ``config.method`` and every method in ``config.beside`` under the same settings and evaluates them.

    Returns, per method, its evaluation and seconds of training. In the run's folder: a subfolder per method (last.pt,
    log.csv, model.safetensors, evaluation.json), results.json and, with matplotlib, curves.png.

    Args:
        show: progress: auto, live, plain or silent.
        say: takes the lines between the progress and the final table.

    Raises FileExistsError when ``config.out_dir`` already holds such a run, and what ``train`` raises.
    """
    splits = splits or data.load(config.dataset, config.data_dir, config.download)
    config = resolved(replace(config, beside=()) if config.resume else config, splits)
    root = checkpoint.locate(config.resume).parent.parent if config.resume else choose_folder(config)
    runs: dict[str, Run] = {}
    results: Results = {}
    for name in (config.method, *config.beside):
        own = replace(config, method=name, hyper=config.hyper_of(name), beside=())
        folder = checkpoint.locate(config.resume).parent if config.resume else root / name
        runs[name] = train(own, splits=splits, folder=folder, display=progress.make(show))
        results[name] = _evaluate(runs[name], splits, say), runs[name].seconds
        checkpoint.write_json(folder / EVALUATION, results[name][0].to_dict())
    order = (*config.beside, config.method)
    if config.beside:
        folder = root
        rows = {name: results[name][0].to_dict() | {"training_seconds": results[name][1]} for name in order}
        checkpoint.write_json(root / RESULTS, rows)
    drawn = write_curves(folder / CURVES, {name: runs[name].history for name in order})
    images = len(runs[config.method].splits.train)
    say(f"\n{splits.name}, {images:,} training images, epochs {config.epochs}, seed {config.seed}\n")
    say(table({name: results[name] for name in order}))
    say(f"files: {folder}" + ("" if drawn else " (no curves.png: matplotlib is not installed)"))
    return {name: results[name] for name in order}


def _evaluate(run: Run, splits: DataSplits, say: Callable[[str], None]) -> Evaluation:
    c = run.config
    with cpu_threads(c.threads):
        return evaluate(run.model, splits.test, c.eps, size=c.eval_size, channels_last=c.channels_last, say=say)


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
