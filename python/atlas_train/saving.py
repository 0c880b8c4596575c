"""Save, export and resume a run in its folder. Resuming checks what must be the same and reports what changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import answers, checkpoint, models, optimizers, processes, within
from .config import PLACES, TrainConfig, from_record, recorded
from .data import identity
from .imported import without_place
from .options import plain, shown
from .remembered import begins_anew, without_stores
from .report import write_csv
from .run import Run
from .writing import builtin, write_link

LOG = "log.csv"
FIXED = (
    "method", "train_size", "val_size", "batch_size", "optimizer", "seed", "averaging", "decay_norms", "activation",
    "extra_share", "mixup", "cutmix", "protocol",
)  # fmt: skip
_CHECKED = (*FIXED, "dataset", "model", "init", "extra_data", "width", "mean", "std", "hyper", "awp", "awp_warmup")
#: Settings of which one must change for a run to go on that ended before its time.
_ENDING = ("epochs", "on_collapse", "early_stop")
_KEPT = (torch.float32, torch.bfloat16)  # floats of a method's memory; images in training are float32
#: Settings that are never told as changed: checked, or without a say in the numbers.
_UNTOLD = {*_CHECKED, *PLACES, "beside", "seeds", "download", "save_every", "tensorboard", "workers"}


def save(run: Run) -> None:
    """last.pt in the run's folder, and after an epoch log.csv, and best.pt if it was the best."""
    assert run.folder
    if not processes.is_first():
        return
    state = {
        "config": recorded(run.config),
        "data": run.data,
        "hyper": run.method.in_use(),
        "changes": run.changes,
        "versions": checkpoint.versions() | ({"processes": str(many)} if (many := processes.count()) > 1 else {}),
        "arch": run.arch,
        "answers": _answers(run),
        "epoch": run.epoch,
        "step": run.step,
        "seconds": run.seconds,
        "history": run.history,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "memory": run.memory,
        "average": run.average and run.average.state_dict(),
        "validation": run.validation and identity.facts(run.validation),
        "best": run.best,
        "best_raw": run.best_raw,
        "rescues": run.rescues,
        "ended": run.ended,
        "peak_memory": run.peak_memory,
        "rng": checkpoint.rng_state(),
        **({"within": run.within.state_dict()} if run.within.batches else {}),
    }
    checkpoint.save(run.folder / checkpoint.LAST, state)
    if run.within.batches:
        return
    if run.best and run.best == run.epoch:
        _save_best(run, run.folder / checkpoint.LAST, state)
    write_csv(run.folder / LOG, run.history)


def require_disk(run: Run) -> None:
    """Raises OSError where the disk has less room than one epoch of the run needs at least: a checkpoint beside the one
    that is there, and best.pt."""
    assert run.folder
    kept = run.method.store_bytes((run.samples, *run.splits.train.shape))
    size = (run.folder / checkpoint.LAST).stat().st_size + (0 if run.memory else kept)
    needed, free = size * (2 if run.validation else 1), shutil.disk_usage(run.folder).free
    if free < needed:
        raise OSError(
            f"{plain(run.folder)} lies on a disk with {free / 1e6:,.1f} MB free, and this run writes "
            f"{needed / 1e6:,.1f} MB or more beside what is there: make room, or choose another folder"
        )


def _save_best(run: Run, last: Path, state: Mapping[str, Any]) -> None:
    """best.pt beside the checkpoint of its epoch: the same file, or a copy that differs as ``_of_best`` says."""
    assert run.folder
    if changed := _of_best(run, state):
        checkpoint.save(run.folder / checkpoint.BEST, {**state, **changed})
    else:
        write_link(run.folder / checkpoint.BEST, last)


def _of_best(run: Run, state: Mapping[str, Any]) -> dict[str, Any]:
    """What best.pt has otherwise than the checkpoint of its epoch: it may mean the weights in training, and it holds
    nothing that is kept for each image."""
    changed: dict[str, Any] = {}
    if run.best_raw and not state.get("raw"):
        changed = {"raw": True, "answers": _answers(run, run.model)}
    memory = without_stores(run.method, state.get("memory", {}))
    return changed if len(memory) == len(state.get("memory", {})) else {**changed, "memory": memory}


def discard(folder: Path) -> None:
    """Takes away what ``save`` and TensorBoard wrote, for a run of which nothing came, into an empty folder."""
    own = (folder / name for name in (checkpoint.LAST, checkpoint.BEST, LOG))
    for path in (*own, *folder.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)


def export(run: Run) -> Path:
    """The bare weights of ``final_model``, for others to load, and those of best.pt if it is of another epoch; returns
    the file of the first."""
    assert run.folder
    path = run.folder / checkpoint.export_name()
    _export(run, run.final_model, path)
    path.with_stem("best").unlink(missing_ok=True)
    with best_weights(run) as best:
        if best:
            _export(run, best, path.with_stem("best"))
    return path


def _export(run: Run, model: nn.Module, path: Path) -> None:
    own = {"arch": run.arch, "config": recorded(run.config), "data": run.data, "answers": _answers(run, model)}
    description = json.dumps(builtin(own))
    checkpoint.export_state_dict(model, path, {"atlas": description, "format": "pt"})


@contextmanager
def best_weights(run: Run) -> Iterator[nn.Module | None]:
    """The run's network with the weights of best.pt, for as long as the context lasts; None where there is no such
    file, or it holds what the last epoch came to."""
    if not run.best or (run.best == run.epoch and not run.best_raw) or not run.folder:
        yield None
        return
    with checkpoint.weights_of(run.folder / checkpoint.BEST, run.model):
        yield run.model


def _answers(run: Run, model: nn.Module | None = None) -> list[list[float]] | None:
    """What a network of the user's own says to fixed images; one of ours is known by its name."""
    ours = run.arch["by_name"] and not models.is_import_path(run.arch["name"])
    return None if ours else answers.answers(model or run.final_model, run.splits.train.shape)


def require_network(state: Mapping[str, Any], model: nn.Module | None, name: str | None, source: Path) -> None:
    """Raises ValueError if the checkpoint has a network of the user's own, which nobody gave."""
    arch = state["arch"]
    if model is None and not arch["by_name"] and not models.is_import_path(name):
        raise ValueError(
            f"{plain(source)} holds a {plain(arch['name'])} of your own: give it from Python (model=...), or say how "
            "it is built, --model package.module:factory"
        )


def as_normalized(config: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the checkpoint's mean and std, if it gives none and the network is one of ours."""
    arch = state["arch"]
    own = not arch["by_name"] or any(map(models.is_import_path, (arch["name"], config.model)))
    if own or config.mean is not None or not (kept := checkpoint.mean_std(state["model"])):
        return config
    return dataclasses.replace(config, mean=kept[0], std=kept[1])


def restore(run: Run, state: Mapping[str, Any], source: Path) -> list[str]:
    """Puts the run where the checkpoint left off; returns what the user should know.

    Raises ValueError if it belongs to another run.
    """
    old = from_record(state["config"], plain(source))
    require_same(run, old, state, source)
    put(run, state, source)
    run.seconds, run.changes = state["seconds"], list(state.get("changes", []))
    run.rescues, run.peak_memory = list(state.get("rescues", [])), state.get("peak_memory", 0)
    notes: list[str] = []
    if run.folder:
        notes, run.best = processes.of_first(lambda: (_restore_best(run, state, source), run.best))
    if (ended := state.get("ended")) and all(getattr(old, name) == getattr(run.config, name) for name in _ENDING):
        run.ended = ended
        notes.append(f"nothing to train: {ended}; another value of {', '.join(_ENDING)} lets the run go on")
    changed = differences(old, run.config)
    changed |= {
        name: [then, now]
        for name, now in checkpoint.versions().items()
        if (then := state.get("versions", {}).get(name, now)) != now
    }
    if (then := state.get("versions", {}).get("processes", "1")) != (now := str(processes.count())):
        changed["processes"] = [then, now]
    if changed:
        run.changes.append({"epoch": run.epoch, "changed": changed})
        notes += [text for text in (_told(run, changed), _stretched(run, old)) if text]
    elif not run.ended:
        notes.append(f"resumed {_where(run)}")
    if run.step and not run.ended and (anew := begins_anew(run.method, run.memory)):
        notes.append(anew)
    return notes


def put(run: Run, state: Mapping[str, Any], source: Path) -> None:
    """Weights, optimiser, averages, random state and counters as they are in the checkpoint."""
    checkpoint.load_weights(run.model, state["model"], source)
    optimizers.load(run.optimizer, state["optimizer"], source)
    if run.average:
        run.average.load_state_dict(state.get("average"), source)
    meant = run.model if state.get("raw") else run.final_model
    answers.require_same(meant, state.get("answers"), run.splits.train.shape, source)
    checkpoint.restore_rng(state["rng"], source)
    run.epoch, run.step = state["epoch"], state["step"]
    run.within = within.restored(state, len(run.batches), run.device, source)
    if run.within.batches:  # of which there may be no further one, and the log has the last rate of an epoch
        optimizers.set_rate(run.optimizer, run.within.lr)
        optimizers.set_momentum(run.optimizer, None if run.momentum is None else run.within.momentum)
    run.best, run.best_raw = state.get("best", 0), state.get("best_raw", False)
    run.history = state["history"]
    run.memory.clear()
    run.memory.update(_memory(run, state, source))


def _restore_best(run: Run, state: Mapping[str, Any], source: Path) -> list[str]:
    """Puts best.pt into the folder of a resumed run. It may be missing there: the folder may be another one, or the
    run was stopped before it was written. Returns what to tell the user if it is lost."""
    assert run.folder
    kept, own = source.parent / checkpoint.BEST, run.folder / checkpoint.BEST
    if run.best and run.best == run.epoch and not run.within.batches:
        kept = source
    if kept is source and _of_best(run, state):
        _save_best(run, source, state)
    elif run.best and kept.exists() and not (own.exists() and own.samefile(kept)):
        write_link(own, kept)
    if run.best and not own.exists():
        lost, run.best = run.best, 0
        return [f"{plain(own)}, of epoch {lost}, is no longer there: the best of the epochs that follow will be kept"]
    return []


def _memory(run: Run, state: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """What the method remembers. Raises ValueError for what it cannot have left."""
    memory = state.get("memory", {})
    for name, value in memory.items():
        if value.is_floating_point() and value.dtype not in _KEPT:
            kept = f"memory {plain(name)} is {value.dtype}, and a run keeps float32 or bfloat16"
            raise ValueError(f"{plain(source)}: {kept}: edited or damaged")
    try:
        run.method.require_memory(memory, (run.samples, *run.splits.train.shape))
    except ValueError as error:
        raise ValueError(f"{plain(source)}: {error}: edited or damaged") from error
    return {name: value.detach().to(run.device) for name, value in memory.items()}


def require_same(run: Run, old: TrainConfig, state: Mapping[str, Any], source: Path) -> None:
    """Method, network and optimiser must be those of the checkpoint; epochs, lr and the like may change."""
    new = run.config
    changed = {name: (getattr(old, name), getattr(new, name)) for name in FIXED}
    changed["init"] = old.init, recorded(new)["init"]
    changed |= _networks(run, state["arch"])
    if new.mean is not None:
        weights = state["model"], run.model.state_dict()
        changed["mean and std"] = checkpoint.mean_std(weights[0]), checkpoint.mean_std(weights[1])
    if old.method == new.method:
        changed["hyper-parameters"] = _used(old, state, run)
    differ = [
        f"{'other' if name == 'hyper-parameters' else 'another'} {name}: it has {shown(then)}, you gave {shown(now)}"
        for name, (then, now) in changed.items()
        if then != now
    ]
    if differ:
        raise ValueError(f"{plain(source)} cannot be resumed with {'; '.join(differ)}")
    if run.validation and not identity.agree(state.get("validation"), identity.facts(run.validation)):
        raise ValueError(f"{plain(source)} holds out other images for validation: edited, damaged, or of other data")
    begun = state["epoch"] + ("within" in state)
    if begun > new.epochs:
        least = f"{begun} or more" if "within" in state else f"{begun + 1} or more, or {begun} to train no further"
        done = f"is in epoch {begun}" if "within" in state else f"has done {begun} epochs"
        raise ValueError(f"{plain(source)} {done} already, you gave epochs={new.epochs}: give epochs={least}")


def _networks(run: Run, arch: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the two networks are: that of a class given from Python may now come from the import path of its class."""
    then, now = dict(arch) | {"name": without_place(arch["name"])}, dict(run.arch)
    if not arch["by_name"]:
        now |= {"name": type(run.model).__name__, "by_name": False, "width": then["width"]}
    return {f"model {key}": (value, now.get(key)) for key, value in then.items()}


def _used(old: TrainConfig, state: Mapping[str, Any], run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyper-parameters that differ, with what defaults stood for when the checkpoint was written; one that was not
    there yet had the default that it was made with."""
    then, now = ({key: getattr(c, key) for key in ("eps", "norm", "awp", "awp_warmup")} for c in (old, run.config))
    then |= old.build_method().in_use() | state.get("hyper", {})
    now |= run.method.in_use()
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return {name: then.get(name) for name in names}, {name: now.get(name) for name in names}


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, list[Any]]:
    """The settings that may change and did: [before, now] by name."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in _UNTOLD]
    pairs = {name: [getattr(old, name), getattr(new, name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _told(run: Run, changed: Mapping[str, list[Any]]) -> str:
    words = ", ".join(f"{plain(name)} {plain(now)} (before: {plain(then)})" for name, (then, now) in changed.items())
    where = _where(run) if run.within.batches else f"after epoch {run.epoch}"
    return f"resumed {where} with {words}"


def _where(run: Run) -> str:
    """Where a run goes on."""
    if not run.within.batches:
        return f"after epoch {run.epoch} of {run.config.epochs}"
    return f"in epoch {run.epoch + 1} of {run.config.epochs}, after {run.within.batches} of {len(run.batches)} batches"


def _stretched(run: Run, old: TrainConfig) -> str | None:
    """What becomes of a schedule whose length has changed."""
    new = run.config
    if old.epochs == new.epochs or run.epoch == new.epochs:
        return None
    text = f"schedules are stretched over {new.epochs} epochs, of which {run.epoch} are done"
    if new.schedule != "constant" and run.history:
        text += f": the {new.schedule} learning rate goes on at {run.rate(0):.3g}, after {run.history[-1]['lr']:.3g}"
    return text
