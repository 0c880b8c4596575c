"""A whole command: train the method and those beside it, evaluate each, and leave one table, one picture, one JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, methods, peak_memory, processes, progress, protocols, schema
from .autoattack import autoattack
from .compiled import require_compilable
from .config import PLACES, TrainConfig, added, alone, from_file, from_record, methods_of, recorded, resolved
from .data import DataSplits, identity, with_extra
from .engine import load_splits, train
from .evaluate import Say, evaluate
from .folders import locked, made, numbered
from .imported import is_import_path, without_place
from .interrupts import Terminated, terminable
from .machine import on_host, usable_device
from .options import plain
from .passes import passes_per_step
from .report import write_curves
from .results import Result, commit, environment, markdown, table
from .run import Run, network_of, require_trainable
from .saving import best_weights
from .validation import best_told, chooses, rule, share
from .watch import collapses, telling
from .writing import write_json, write_text

Results = dict[str, Result]
#: In the folder of a comparison the whole configuration, methods beside included.
CONFIG = "config.json"
#: Where an AutoAttack stands that is not done, by what it attacks.
STATES = "autoattack-{}.state"
EVALUATION, RESULTS, MARKDOWN, CURVES = "evaluation.json", "results.json", "results.md", "curves.png"


def compare(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    show: str = "auto",
    say: Say = print,
    command: Sequence[str] | None = None,
) -> Results:
    """Trains ``config.method`` and every method in ``config.beside`` under the same settings and evaluates them.

    Returns what each came to, in the last epoch and in the best. In the run's folder: a subfolder per method (last.pt,
    best.pt, log.csv, model.safetensors, best.safetensors if the best epoch is another, evaluation.json), config.json
    with the settings of them all, results.json with configuration, environment and ``command``, results.md and, with
    matplotlib, curves.png.

    With ``config.resume`` a run goes on; with the folder of a comparison, all of it: methods that are done stay as they
    are, one that was stopped goes on, missing ones are trained, those in ``config.beside`` are added, and the table is
    that of all. Its other settings must then be given again: ``stored.resume_compare`` does so.

    Args:
        show: progress: auto, live, plain or silent.
        say: takes the lines between the progress and the final table.
        command: the words of the command line, for results.json.

    Raises FileExistsError when ``config.out_dir`` already holds such a run or another run is writing to the folder, and
    what ``train`` raises.
    """
    if config.seeds or (config.resume and is_of_seeds(config.resume)):
        raise ValueError(
            f"seeds: compare trains with one, {plain(config.resume or 'the configuration')} has several: call "
            "atlas_train.seeds.compare_seeds, or atlas_train.stored.resume_seeds"
        )
    return compare_once(config, splits, show, say, command, stopped=say)


def compare_once(
    config: TrainConfig, splits: DataSplits | None, show: str, say: Say, command: Sequence[str] | None, stopped: Say
) -> Results:
    """``compare``; ``stopped`` takes the line that says how a run goes on."""
    say = say if processes.is_first() else processes.unsaid
    config, folders = processes.of_first(lambda: _resumed(config) if config.resume else (config, {}))
    splits = with_extra(splits or load_for(config, folders), config.extra_data).told(say)
    if not len(splits.test):
        raise ValueError(f"{plain(splits.name)} has no test images, so that nothing can be compared: give some")
    config = resolved(config, splits)
    for name in methods_of(config) if config.compile else ():
        require_compilable(methods.get(name))
    with ExitStack() as stack:
        stack.enter_context(terminable())
        folder, folders = processes.of_first(partial(_enter, stack, config, folders))
        if processes.is_first():
            stack.enter_context(explained(config, folder, folders, splits, stopped))
            if config.beside:
                write_json(folder / CONFIG, recorded(config))
        runs, results = _train_all(config, folders, splits, show, say)
        if not processes.is_first():
            return results
        drawn = write_curves(folder / CURVES, {name: runs[name].history for name in results})
        title = _write(folder, config, runs, results, command)
    say(f"\n{title}\n")
    say(table(results))
    say(f"files: {plain(folder)}" + ("" if drawn else " (no curves.png: matplotlib is not installed)"))
    if splits.loader:
        say(f"next: atlas report {plain(folder)} makes a page of it; atlas export, a network for others")
    return results


def _enter(stack: ExitStack, config: TrainConfig, folders: dict[str, Path]) -> tuple[Path, dict[str, Path]]:
    """Makes the folder this comparison's until the stack ends; gives it and those of the runs."""
    if not folders:
        root = stack.enter_context(new_folder(config))
        folders = {name: root / name for name in methods_of(config)}
    folder = folders[config.method].parent if config.beside else folders[config.method]
    stack.enter_context(made(folder))
    for path in (folder, *(own for own in folders.values() if own.exists())):
        stack.enter_context(locked(path))
    if not config.resume:
        _require_free(config, folders)
    return folder, folders


def is_comparison(path: str | Path) -> bool:
    """Whether that is the folder of several runs: of methods, or of seeds."""
    folder = Path(path)  # that of an exported network has such a file too
    return (folder / CONFIG).is_file() and not any(
        (folder / own).exists() for own in (checkpoint.LAST, checkpoint.WEIGHTS)
    )


def is_of_seeds(path: str | Path) -> bool:
    """Whether that is the folder of several seeds' runs."""
    return is_comparison(path) and bool(from_file(Path(path) / CONFIG, from_record).seeds)


def settings_of(path: str | Path) -> TrainConfig:
    """The settings that a comparison's folder, a run's folder or a checkpoint says it was made with."""
    if is_comparison(path):
        return from_file(Path(path) / CONFIG, from_record)
    return settings_in(checkpoint.load(path, ("arch", "config")), path)


def settings_in(state: Mapping[str, Any], path: str | os.PathLike[str]) -> TrainConfig:
    """The settings that a checkpoint which was loaded from ``path`` was made with."""
    config = alone(from_record(state["config"], plain(path)))
    return replace(config, hyper={**_form_in(state, config.method), **config.hyper})


def _form_in(state: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A method's form was the one of its defaults then, which may be others now."""
    chosen = {key: state.get("hyper", {}).get(key) for key in methods.get(method).form_options}
    return {key: value for key, value in chosen.items() if value is not None}


def _resumed(config: TrainConfig) -> tuple[TrainConfig, dict[str, Path]]:
    """A configuration that goes on, and the folder of each of its methods."""
    resume = str(config.resume)
    if config.val_size is None:
        config = replace(config, val_size=settings_of(resume).val_size)
    if is_comparison(resume):
        root = Path(resume)
        old = from_file(root / CONFIG, from_record)
        if old.beside is None:
            raise ValueError(
                f"{plain(root / CONFIG)} does not say which methods lie beside {old.method}: edited or damaged; write "
                'them into it, "beside": ["standard"] for example'
            )
        if config.method != old.method:
            raise ValueError(
                f"{plain(root)} compares {old.method} with others, you gave method {config.method}: leave the method "
                "out, or add others with beside"
            )
        config = replace(config, beside=added(old.beside, config.beside, config.method))
    else:
        folder = checkpoint.locate(resume).parent
        config, root = replace(config, beside=config.beside or ()), folder.parent
        if not config.beside:
            return config, {config.method: folder}
        if folder.name != config.method:
            raise ValueError(
                f"beside: {plain(folder)} lies alone, for the folder of a run that others go beside is called by its "
                f"method, {config.method}: leave beside out"
            )
    folders = {name: root / name for name in methods_of(config)}
    forms: dict[str, Any] = {}
    for name, at in folders.items():
        if methods.get(name).form_options and (start := _start(config, name, at)):
            form = _form_in(checkpoint.load(start), name)
            forms |= {f"{name}.{key}": value for key, value in form.items() if key not in config.hyper_of(name)}
    return replace(config, hyper={**config.hyper, **forms}), folders


def load_for(config: TrainConfig, folders: Mapping[str, Path], function: str = "resume_compare") -> DataSplits:
    """The data of the configuration, or of the runs that are there; ``function`` of ``stored`` takes one's own."""
    starts = [start for name, folder in folders.items() if (start := _start(config, name, folder))]
    source = checkpoint.locate(starts[0]) if starts else None
    state = checkpoint.load(source) if source else None
    if config.resume and is_comparison(config.resume):
        return load_splits(config, state, config.resume, function)
    return load_splits(config, state, source)


def _start(config: TrainConfig, name: str, folder: Path) -> str | None:
    """What the run of a method goes on with, if there is anything."""
    if config.resume and not is_comparison(config.resume) and name == config.method:
        return config.resume
    return str(folder) if (folder / checkpoint.LAST).exists() else None


def new_folder(config: TrainConfig) -> AbstractContextManager[Path]:
    """``out_dir``; without it, the first free runs/<dataset>-<n>."""
    return numbered(Path("runs"), config.dataset) if config.out_dir is None else made(Path(config.out_dir))


def _require_free(config: TrainConfig, folders: Mapping[str, Path]) -> None:
    """Raises FileExistsError if there is a run already where one is to begin."""
    for name, folder in folders.items():
        if (folder / checkpoint.LAST).exists():
            raise FileExistsError(
                f"out_dir {config.out_dir} already holds a run of {name}: go on with it (resume {plain(folder)}) or "
                "choose another"
            )
    root = folders[config.method].parent
    if config.beside and is_comparison(root):
        raise FileExistsError(
            f"out_dir {plain(root)} already holds a comparison: go on with it (resume {plain(root)}) or choose another"
        )


def _train_all(
    config: TrainConfig, folders: Mapping[str, Path], splits: DataSplits, show: str, say: Say
) -> tuple[dict[str, Run], Results]:
    """The runs, and what they came to in the order of the table. Those that are there already go first."""
    owns = processes.of_first(lambda: {name: _own(config, name, folder) for name, folder in folders.items()})
    _require_all(config, owns, splits)
    runs: dict[str, Run] = {}
    results: Results = {}
    for name in sorted(owns, key=lambda name: owns[name].resume is None):
        own = owns[name]
        if runs and own.mean is None:  # what is there may be of a version that recorded them in the weights alone
            first = next(iter(runs.values())).config
            own = replace(own, mean=first.mean, std=first.std)
        run = train(own, splits=splits, folder=folders[name], display=progress.make(show))
        runs[run.config.label] = run
        results[run.config.label] = _result(run, splits, folders[name], say)
    return runs, {name: results[name] for name in (*config.beside, config.label)}


def _require_all(config: TrainConfig, owns: Mapping[str, TrainConfig], splits: DataSplits) -> None:
    """Raises ValueError if one of several methods cannot be had with these settings, before any of them trains."""
    if len(owns) == 1:  # train says so
        return
    if config.mean is None:  # of runs of early versions, whose weights alone hold them
        channels = splits.train.shape[0]
        config = replace(config, mean=(0.0,) * channels, std=(1.0,) * channels)
    model = network_of(config, splits).to(usable_device(config.device))
    for own in owns.values():
        require_trainable(own, model)


def _own(config: TrainConfig, name: str, folder: Path) -> TrainConfig:
    """The run of one method: the same settings, without what belongs to another method."""
    own = config if name == config.method else replace(config, awp=0.0, mix_share=0.0, on_collapse="warn")
    own = replace(
        own, method=name, hyper=config.hyper_of(name), **protocols.beside(config.protocol, vars(config), name)
    )
    return replace(own, beside=(), resume=_start(config, name, folder))


@contextmanager
def explained(
    config: TrainConfig,
    folder: Path,
    folders: Mapping[str, Path],
    splits: DataSplits,
    say: Say,
    function: str = "resume_compare",
) -> Iterator[None]:
    """A run that is stopped says how to go on; one of which nothing comes leaves config.json as it was."""
    path = folder / CONFIG
    before = path.read_text() if path.exists() else None
    try:
        yield
    except BaseException as error:
        there = any((own / checkpoint.LAST).exists() for own in folders.values())
        if before is None and not there:
            path.unlink(missing_ok=True)
        elif before is not None and isinstance(error, ValueError):
            write_text(path, before)
        stopped = isinstance(error, (KeyboardInterrupt, Terminated, OSError, RuntimeError))
        if there and stopped and not isinstance(error, FileExistsError):
            how = (
                f"atlas train --resume {plain(folder)}{_code(config, splits)}"
                if splits.loader
                else f"atlas_train.stored.{function}({str(folder)!r}, splits=...), with the same data"
            )
            say(f"\nstopped; to go on from the last checkpoint: {how}")
        raise


def _code(config: TrainConfig, splits: DataSplits) -> str:
    """The flags that name code and places of the user's own, which must be given again."""
    own = {"dataset": splits.loader, "model": config.model}
    flags = {kind: path for kind, path in own.items() if is_import_path(path)} | {"data-dir": config.data_dir}
    return "".join(f" --{flag} {shlex.quote(plain(path))}" for flag, path in flags.items() if path)


def _result(run: Run, splits: DataSplits, folder: Path, say: Say) -> Result:
    """What the run came to; evaluated anew unless the very same was evaluated before."""
    c, model = run.config, run.final_model
    settings = ("eps", "norm", "eval_size", "channels_last", "autoattack", "autoattack_version")
    of = {name: getattr(c, name) for name in settings} | {"data": run.data["test"], "device": str(run.device)}
    of |= {"weights": checkpoint.fingerprint(model), "versions": checkpoint.versions() | {"commit": commit()}}
    of["epochs"] = [run.epoch, run.best] + ([True] if run.best_raw else [])
    if kept := processes.of_first(lambda: _kept(folder / EVALUATION, of)):
        say(f"{c.label}: evaluated before, in {folder / EVALUATION}")
        return kept
    with on_host(c.threads):
        last = _attacked(c, model, run.epoch, splits, folder, say)
        with best_weights(run) as better:
            if better:
                processes.make_alike(better)  # another machine may still see the file that was there before
                say(best_told(run.best, run.best_raw))
            best = _attacked(c, better, run.best, splits, folder, say) if better else last if run.best else None
            best = best and replace(best, raw=run.best_raw or None)
        passes, memory = passes_per_step(run), peak_memory.of_training(run)
    result = replace(
        last,
        training_seconds=run.seconds,
        epoch_seconds=run.seconds / run.epochs_done,
        passes=passes,
        memory=memory,
        skipped=run.skipped,
        best=best,
        rule=rule(c.method, c.val_size, chooses(c.averaging, c.best_of)),
        validation_share=share(run, passes),
        collapses=[list(each) for each in collapses(run.history, telling(run))],
        rescues=run.rescues,
        ended=run.ended or None,
    )
    if processes.is_first():
        write_json(folder / EVALUATION, result.to_dict() | {"of": of})
        for state in folder.glob(f"{STATES.format('*')}*"):
            state.unlink()
    return result


def _attacked(c: TrainConfig, model: nn.Module, epoch: int, splits: DataSplits, folder: Path, say: Say) -> Result:
    """The accuracies of the network as it was after that epoch; an AutoAttack that was stopped goes on."""
    ball: dict[str, Any] = {"eps": c.eps, "norm": c.norm}
    how: dict[str, Any] = {"size": c.eval_size, "channels_last": c.channels_last, "say": say, "dealt": True}
    result = Result(evaluate(model, splits.test, **ball, **how), epoch=epoch)
    if not c.autoattack:
        return result
    ball |= {"version": c.autoattack_version, "size": c.autoattack}
    of = hashlib.sha256(f"{checkpoint.fingerprint(model)} {ball}".encode()).hexdigest()[:16]
    attacked = autoattack(model, splits.test, state=folder / STATES.format(of), say=say, dealt=True, **ball)
    return replace(result, autoattack=attacked)


def _kept(path: Path, of: Mapping[str, Any]) -> Result | None:
    """An evaluation that was written before, if it is one of ``of``."""
    try:
        values = json.loads(path.read_text())
        schema.require_evaluation(values, str(path))
        return Result.from_dict(values) if values["of"] == of else None
    except (OSError, ValueError, RecursionError, KeyError):
        return None


def _write(
    folder: Path, config: TrainConfig, runs: Mapping[str, Run], results: Results, command: Sequence[str] | None
) -> str:
    """results.json and results.md, each of which explains itself; returns the title."""
    run = runs[config.label]
    what = f"{plain(run.splits.name)}, {len(run.splits.train):,} training images"
    title = f"{what}, epochs {config.epochs}, seed {config.seed}"
    if told := protocols.departures(config.protocol, recorded(config)):
        title += f", {told}"
    machine = environment(run.device, config.threads or torch.get_num_threads())
    own = {name: {"hyper": runs[name].hyper, "changes": runs[name].changes} for name in results}
    used = {f"{each.config.method}.{key}": value for each in runs.values() for key, value in each.hyper.items()}
    values = {
        "methods": {name: result.to_dict() | own[name] for name, result in results.items()},
        "config": recorded(config) | {"hyper": used},
        "network": run.arch | {"parameters": sum(p.numel() for p in run.model.parameters())},
        "data": run.data,
        "validation": run.validation and identity.facts(run.validation),
        "command": public(command),
        "environment": machine,
    }
    write_json(folder / RESULTS, values)
    write_text(folder / MARKDOWN, markdown(results, title, machine))
    return title


def public(command: Sequence[str] | None) -> str | None:
    """The command line without folders that nobody else has: "--data-dir=/home/me/data" is "--data-dir=DATA-DIR"."""
    shown, flag = [], ""
    for word in command or ():
        begin, value = "", word
        if word.startswith("--"):
            flag, sign, value = word.partition("=")
            begin = flag + sign
        known = without_place(value)
        if known != value and flag.strip("-").replace("-", "_") in PLACES:
            known = flag.strip("-").upper()
        shown.append(begin + known)
    return shlex.join(shown) if command else None
