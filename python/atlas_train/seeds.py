"""The same comparison with several seeds: each in its own subfolder, and one table of means and standard deviations."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, processes, protocols
from .compare import (
    CONFIG,
    MARKDOWN,
    RESULTS,
    Results,
    compare_once,
    explained,
    is_of_seeds,
    load_for,
    new_folder,
    public,
)
from .config import TrainConfig, added, from_file, from_record, methods_of, recorded, resolved
from .data import DataSplits, with_extra
from .evaluate import Say
from .folders import locked, made
from .interrupts import terminable
from .machine import usable_device
from .nonfinite import NonFiniteLoss
from .options import plain
from .results import Result, environment, figures, markdown_of_seeds, table_of_seeds
from .writing import write_json, write_text


class SeedsFailed(RuntimeError):
    """Training with some of the seeds came to numbers that are not finite; the others are in the table."""


def compare_seeds(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    show: str = "auto",
    say: Say = print,
    command: Sequence[str] | None = None,
) -> dict[int, Results]:
    """``compare`` with each of ``config.seeds`` in turn; the results by seed.

    In the run's folder: config.json with the settings of all, seed-0 and so on with what ``compare`` leaves of each,
    and results.json and results.md with the mean and the standard deviation of every figure.

    With that folder as ``config.resume`` seeds that are done stay as they are, one that was stopped goes on, missing
    ones are trained, and those of ``config.seeds`` that are new are added, as are methods in ``config.beside``.

    Raises SeedsFailed at the end where training with some seed met a loss or weights that are not finite: the others
    are trained nevertheless, and the table is theirs. Any other error ends the command at once. Else as ``compare``.
    """
    say = say if processes.is_first() else processes.unsaid
    config, root = processes.of_first(lambda: _resumed(config) if config.resume else (config, None))
    splits = splits or load_for(config, _folders(config, root) if root else {}, "resume_seeds")
    splits = splits.told(say)
    settings = resolved(config, with_extra(splits, config.extra_data))
    results: dict[int, Results] = {}
    failed: dict[int, str] = {}
    with ExitStack() as stack:
        stack.enter_context(terminable())
        root = processes.of_first(partial(_enter, stack, settings, root))
        if processes.is_first():
            stack.enter_context(explained(settings, root, _folders(settings, root), splits, say, "resume_seeds"))
            write_json(root / CONFIG, recorded(settings))
        for seed in settings.seeds:
            say(f"\nseed {seed}")
            own = processes.of_first(partial(_of_seed, settings, seed, root))
            try:
                results[seed] = compare_once(own, splits, show, say, None, stopped=lambda line: None)
            except NonFiniteLoss as error:
                failed[seed] = str(error)
                say(f"seed {seed} failed, and the others go on: {error}")
        if results and processes.is_first():
            _write(root, settings, splits, results, failed, command)
    if results:
        say(f"\n{_title(settings, splits)}\n")
        say(table_of_seeds(results))
        say(f"files: {plain(root)}")
        if splits.loader:
            say(f"next: atlas report {plain(root)} makes a page of all seeds")
    if failed:
        reasons = "; ".join(f"seed {seed}: {reason}" for seed, reason in failed.items())
        left = f"the table is that of {', '.join(map(str, results))}" if results else "there is no table"
        raise SeedsFailed(f"{len(failed)} of {len(settings.seeds)} seeds failed, {left}. {reasons}")
    return results


def _enter(stack: ExitStack, config: TrainConfig, root: Path | None) -> Path:
    """Makes the folder these runs' until the stack ends."""
    root = root or stack.enter_context(new_folder(config))
    stack.enter_context(made(root))
    stack.enter_context(locked(root))
    if not config.resume and (root / CONFIG).exists():
        raise FileExistsError(f"out_dir {plain(root)} holds runs already: go on with them (resume {plain(root)})")
    return root


def _resumed(config: TrainConfig) -> tuple[TrainConfig, Path]:
    """A configuration that goes on, with all seeds and methods of its folder."""
    root = Path(str(config.resume))
    if not is_of_seeds(root):
        raise ValueError(
            f"seeds: {plain(root)} is no folder of several seeds: leave seeds out to go on with it, or resume "
            "to begin new runs"
        )
    old = from_file(root / CONFIG, from_record)
    if config.method != old.method:
        raise ValueError(f"{plain(root)} is of {old.method}, you gave method {config.method}: leave the method out")
    seeds, beside = dict.fromkeys((*old.seeds, *config.seeds)), added(old.beside, config.beside, config.method)
    return replace(config, seeds=tuple(seeds), beside=beside), root


def _folders(config: TrainConfig, root: Path) -> dict[str, Path]:
    """The folder of every run."""
    return {f"{seed}/{name}": _folder(root, seed) / name for seed in config.seeds for name in methods_of(config)}


def _folder(root: Path, seed: int) -> Path:
    return root / f"seed-{seed}"


def _of_seed(config: TrainConfig, seed: int, root: Path) -> TrainConfig:
    """The comparison with that seed, which goes on if it was begun."""
    folder = _folder(root, seed)
    alone = folder / config.method
    begun = [path for path in (folder / CONFIG, alone / checkpoint.LAST) if path.exists()]
    resume = str(begun[0].parent) if begun else None
    return replace(config, seed=seed, seeds=(), out_dir=str(folder), resume=resume)


def _title(config: TrainConfig, splits: DataSplits) -> str:
    images = config.train_size or len(splits.train) - config.val_size
    title = f"{plain(splits.name)}, {images:,} training images, epochs {config.epochs}"
    told = protocols.departures(config.protocol, recorded(config))
    return f"{title}, seeds {', '.join(map(str, config.seeds))}" + (f", {told}" if told else "")


def _write(
    root: Path,
    config: TrainConfig,
    splits: DataSplits,
    results: Mapping[int, Results],
    failed: Mapping[int, str],
    command: Sequence[str] | None,
) -> None:
    """results.json and results.md of all seeds."""
    machine = environment(usable_device(config.device), config.threads or torch.get_num_threads())
    first = next(iter(results.values()))
    values = {
        "methods": {name: dict(_spreads([own[name] for own in results.values()])) for name in first},
        "seeds": {seed: {name: result.to_dict() for name, result in own.items()} for seed, own in results.items()},
        "failed": {seed: reason.replace(f"{root}/", "") for seed, reason in failed.items()},
        "config": recorded(config),
        "command": public(command),
        "environment": machine,
    }
    write_json(root / RESULTS, values)
    write_text(root / MARKDOWN, markdown_of_seeds(results, _title(config, splits), machine))


def _spreads(results: Sequence[Result]) -> Iterator[tuple[str, Any]]:
    """Mean and deviation of every figure, in the last epoch and in the best."""
    known = [figures(result) for result in results]
    for name in known[0]:
        values = [each[name] for each in known if name in each]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        yield name, {"mean": statistics.fmean(values), "deviation": deviation}
    if best := [result.best for result in results if result.best]:
        yield "best", dict(_spreads(best))
