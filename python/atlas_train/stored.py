"""Runs in their folders, from Python: resumed or evaluated, also on data and networks of your own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from atlas_kernels.checks import whole

from . import checkpoint, data, models, progress
from .autoattack import Precision, Version
from .autoattack import autoattack as run_autoattack
from .compare import Results, compare, is_comparison, settings_in, settings_of
from .config import added, label
from .data import DataSplits, identity
from .engine import OnEpoch, train
from .evaluate import Say, evaluate
from .imported import require_trusted, same_code
from .machine import on_host, usable_device
from .options import NORMS, Norm, plain
from .results import Result
from .run import Run
from .seeds import compare_seeds
from .validation import best_told, chooses, rule

Path = str | os.PathLike[str]


def resume(
    path: Path,
    *,
    splits: DataSplits | None = None,
    model: nn.Module | str | None = None,
    display: progress.Display | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> Run:
    """Resumes a run after its last epoch, with its own settings: ``resume("runs/digits-1/atlas", epochs=60)``.

    Args:
        path: folder of the run, or its last.pt.
        splits: the data. They are needed if the run was trained on data of your own, and must be the same, or
            ValueError.
        model: the network. It is needed if the run's is of your own: a module, built as for the run, or its import
            path.
        display, on_epoch: as for ``train``.
        changes: settings of ``TrainConfig`` to change from now on, such as epochs.
    """
    state = checkpoint.load(path, ("arch", "config"))
    config = settings_in(state, path)
    if splits is None and "dataset" not in changes:
        require_trusted("dataset", config.dataset, path)
    if model is None:
        require_trusted("model", config.model, path)
    elif isinstance(model, str):
        changes["model"], model = model, None
    config = replace(config, **changes | {"resume": os.fspath(path), "beside": ()})
    return train(config, splits=splits, model=model, display=display, on_epoch=on_epoch)


def resume_compare(
    path: Path, *, splits: DataSplits | None = None, show: str = "auto", say: Say = print, **changes: Any
) -> Results:
    """``atlas train --resume`` from Python: resumes a comparison or a run, evaluates it and prints the table.

    Args:
        path: folder of a comparison or of a run, or its last.pt.
        splits: as for ``resume``.
        show, say: as for ``compare``.
        changes: settings of ``TrainConfig`` to change from now on; ``beside`` adds methods.
    """
    path = os.fspath(path)
    config = settings_of(path)
    if splits is None and "dataset" not in changes:
        require_trusted("dataset", config.dataset, path)
    if "model" not in changes:
        require_trusted("model", config.model, path)
    if is_comparison(path):
        changes["beside"] = added(config.beside, changes.get("beside"), config.method)
    return compare(replace(config, **changes | {"resume": path}), splits=splits, show=show, say=say)


def resume_seeds(
    path: Path, *, splits: DataSplits | None = None, show: str = "auto", say: Say = print, **changes: Any
) -> dict[int, Results]:
    """As ``resume_compare``, for the folder of several seeds; ``seeds`` among the changes adds some."""
    path = os.fspath(path)
    config = settings_of(path)
    if splits is None and "dataset" not in changes:
        require_trusted("dataset", config.dataset, path)
    if "model" not in changes:
        require_trusted("model", config.model, path)
    return compare_seeds(replace(config, **changes | {"resume": path}), splits=splits, show=show, say=say)


def evaluate_checkpoint(
    path: Path,
    *,
    splits: DataSplits | None = None,
    model: nn.Module | str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    reading: Mapping[str, Any] | None = None,
    other_data: bool = False,
    eps: float | None = None,
    norm: Norm | None = None,
    size: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    autoattack: int = 0,
    autoattack_version: Version = "standard",
    search_precision: Precision = "fp32",
    state: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    say: Say = print,
    dealt: bool = False,
    **pgd: Any,
) -> dict[str, Result]:
    """Clean, FGSM and PGD accuracy of a checkpoint's network on its test images, by the name of its method.

    Args:
        path: folder of the run, whose last epoch is evaluated and, as ``Result.best``, its best; or one of its files:
            last.pt, best.pt, model.safetensors.
        splits: the data. They are needed if the run was trained on data of your own. Their test images must be those
            of the run, or ValueError.
        model: the network. It is needed if the run's is of your own: a module, built as for the run, that takes the
            weights, or a name or an import path.
        dataset: a data set to evaluate on instead of the run's. If the run's is code of your own, its import path: then
            it must give the test images of the run. data_dir, download: as for ``data.load``.
        reading: image_size, grey and skip_unreadable of ``data.load``, where they are not those of the run.
        other_data: True allows ``splits``, or what ``dataset`` gives, to be other data than the run's.
        eps, norm, size, threads: as for ``evaluate``; default: the run's, and in another norm the data set's eps.
        device: default: cuda where there is one.
        autoattack: so many images for AutoAttack too; search_precision, state: as for ``autoattack.autoattack``. The
            best epoch has a state of its own, beside it.
        say: told what is going on.
        dealt: as for ``evaluate``.
        pgd: steps, step_size and restarts, as for ``evaluate``.
    """
    if not whole("autoattack", autoattack, 0) and state is not None:
        raise ValueError(
            f"state {plain(state)} is where AutoAttack goes on, and autoattack is 0, so that none is run: say on how "
            "many images, or leave state out"
        )
    network, description, splits, images = opened(
        path,
        splits=splits,
        model=model,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        reading=reading,
        other_data=other_data,
        say=say,
    )
    run = description["config"]
    where = usable_device(device)
    network = network.to(where)
    if not isinstance(model, nn.Module):
        few = splits.test.first(2).to(where).float() / 255
        models.require_usable(network, model or type(network).__name__, few, splits.num_classes)
    channels_last = bool(run.get("channels_last"))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    norm, size = norm or run["norm"], run.get("eval_size") if size is None else size
    if eps is None:
        eps = run["eps"] if norm == run["norm"] else data.declared(splits).radius(norm)
    if eps is None:
        raise ValueError(f"{plain(path)} does not say what eps is in {NORMS[norm]}: give it (--eps)")
    shared: dict[str, Any] = {"norm": norm, "batch_size": batch_size, "seed": seed, "say": say, "dealt": dealt}

    def attacked(epoch: int | None, name: str = "") -> Result:
        accuracies = evaluate(network, splits.test, eps, size=size, channels_last=channels_last, **shared, **pgd)
        result = Result(accuracies, data=images, epoch=epoch)
        if not autoattack:
            return result
        how: dict[str, Any] = {"version": autoattack_version, "search_precision": search_precision}
        how["state"] = state and os.fspath(state) + name
        found = run_autoattack(network, splits.test, eps, autoattack, **how, **shared)
        return replace(result, autoattack=found)

    with on_host(run.get("threads") if threads is None else threads):
        epoch, best, raw = (description.get(name) for name in ("epoch", "best", "best_raw"))
        last = best == epoch and "within" not in description
        result, kept = attacked(epoch), checkpoint.locate(path).with_name(checkpoint.BEST)
        if best and (raw or not last) and os.path.isdir(path) and kept.exists():
            say(best_told(best, bool(raw)))
            chosen = rule(run["method"], run["val_size"], chooses(run["averaging"], run["best_of"]))
            with checkpoint.weights_of(kept, network):
                result = replace(result, best=replace(attacked(best, ".best"), raw=raw or None), rule=chosen)
    return {label(run["method"], run.get("awp", 0)): result}


def opened(
    path: Path,
    *,
    splits: DataSplits | None = None,
    model: nn.Module | str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    reading: Mapping[str, Any] | None = None,
    other_data: bool = False,
    say: Say = print,
) -> tuple[nn.Module, dict[str, Any], DataSplits, dict[str, Any]]:
    """The network of a checkpoint, what that says of it, its data and the record of the test images.

    Arguments and errors are those of ``evaluate_checkpoint``.
    """
    network, description = checkpoint.load_network(path, model)
    if splits is None:
        name = dataset or identity.loader(description, path, "evaluate_checkpoint")
        known = description["config"]
        own = {} if name in data.names() else data.asked({key: known.get(key) for key in data.READING})
        given = data.asked(reading or {})
        splits = data.load(name, data_dir or known.get("data_dir"), download, **own | given).told(say)
    images = identity.record(splits, ("test",))
    other = dataset is not None and not same_code(dataset, description.get("data", {}).get("loader"))
    for note in _notes(description, images, path, other_data or other):
        say(note)
    return network, description, splits, images


def _notes(description: Mapping[str, Any], images: Mapping[str, Any], path: Path, other: bool) -> list[str]:
    """What to say of the data. Raises ValueError if they are not the run's, unless ``other`` data were asked for."""
    classes = description["arch"]["num_classes"]
    if images["num_classes"] > classes:
        raise ValueError(
            f"{plain(path)} knows {classes} classes, and the data have {images['num_classes']}: give others"
        )
    try:
        return identity.require_same(description, images, path, "evaluate_checkpoint")
    except ValueError as error:
        if not other:
            remedy = "or, if you mean to evaluate on others, say other_data=True (--other-data)"
            raise ValueError(f"{error}; {remedy}") from error
        return [f"note: not the data that {plain(path)} was made on"]
