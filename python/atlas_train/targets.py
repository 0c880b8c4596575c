"""What `atlas evaluate` is pointed at: a run, a state dict, or a factory; the network, and the images to attack."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, data, fine_tuning, models, stored
from .data import DataSplits, identity
from .evaluate import Say, evaluate, require_normalisation
from .imported import is_import_path, without_place
from .machine import on_host, usable_device
from .models.classifier import Classifier, Normalize
from .options import NORMS, Norm, plain
from .results import environment
from .robustness.report import Report

#: What a normalisation is called elsewhere: at RobustBench mu and sigma.
_NORMALISATIONS = {"mu": "normalize.mean", "sigma": "normalize.std"}


@dataclass(frozen=True)
class Target:
    """A network, its test images, and what is known of both.

    mean, std: by which the images are still to be normalised. settings: of the run, by their names in ``TrainConfig``;
    epoch: of its, after which the weights were kept.
    """

    network: nn.Module
    splits: DataSplits
    images: Mapping[str, Any]
    architecture: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None

    def radii(self, eps: Sequence[float], norm: Norm) -> tuple[float, ...]:
        """``eps``, or the usual one. Raises ValueError where there is none."""
        usual: Any = self.settings.get("eps") if norm == self.settings.get("norm") else None
        usual = usual or (self.splits.eps if norm == "linf" else data.declared(self.splits).radius(norm))
        if eps or usual:
            return tuple(eps) or (usual,)
        raise ValueError(f"eps: {plain(self.splits.name)} has no usual radius in {NORMS[norm]}: give it (--eps)")


def opened(
    target: str,
    *,
    model: str | None = None,
    width: int | None = None,
    activation: str = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    splits: DataSplits | None = None,
    dataset: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    reading: Mapping[str, Any] | None = None,
    other_data: bool = False,
    say: Say = print,
) -> Target:
    """The network that ``target`` means: a run's folder or one of its files, a state dict with ``model`` (a name or an
    import path), or an import path of a factory, which is called and gives the trained network.

    mean, std: of a state dict or a factory whose network does not normalise; empty: images go in as they are. Other
    arguments, and errors, are those of ``stored.evaluate_checkpoint``.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got mean {mean} and std {std}: give both, or neither")
    factory = is_import_path(target) and not Path(target).exists()
    own = not factory and (os.path.isdir(target) or not os.path.exists(target) or checkpoint.is_own(target))
    if own:
        if mean is not None or width is not None:
            raise ValueError(f"{plain(target)} is a run and says its mean, std and width itself: leave these out")
        network, description, splits, images = stored.opened(
            target, splits=splits, model=model, dataset=dataset, data_dir=data_dir, download=download,
            reading=reading, other_data=other_data, say=say,
        )  # fmt: skip
        epoch, best = description.get("epoch"), description.get("best")
        kept = checkpoint.locate(target).with_name(checkpoint.BEST)
        if best and (best != epoch or description.get("best_raw")) and os.path.isdir(target) and kept.exists():
            say(f"evaluating the last epoch, {epoch}; the best one, {best}, is in {plain(kept)}")
        name = str(description["arch"]["name"])
        return Target(network, splits, images, name, settings=description["config"], epoch=epoch)
    _require_one_network(target, model, factory)
    if splits is None:
        splits = data.load(_named(target, dataset), data_dir, download, **reading or {}).told(say)
    require_normalisation(mean, std, splits.test.shape[0])
    sizes: dict[str, Any] = {"num_classes": splits.num_classes, "in_channels": splits.test.shape[0], "width": width}
    name, apart = target if factory else str(model), (mean, std) if mean else (None, None)
    if not is_import_path(name):
        network, apart = _of_ours(target, name, {**sizes, "activation": activation}, mean, std), (None, None)
    else:
        network = models.network(name, **sizes)
        if not factory:
            fine_tuning.begin_with(network, target, fine_tuning.read(target, "state dict"))
    return Target(network.eval(), splits, identity.record(splits, ("test",)), without_place(name), *apart)


def _named(target: str, dataset: str | None) -> str:
    """The data set. Raises ValueError where nobody says it."""
    if dataset is None:
        raise ValueError(
            f"dataset: {plain(target)} does not say which images it is for: name them (--dataset, one of "
            f"{', '.join(data.names())}, or path/to/file.py:factory)"
        )
    return dataset


def _require_one_network(target: str, model: str | None, factory: bool) -> None:
    """Raises ValueError where two networks are named, or none."""
    if factory and model:
        raise ValueError(f"model: {plain(target)} is a factory, which gives the network itself: leave --model out")
    if target.endswith(".py"):
        raise ValueError(f"{plain(target)} is code: say which factory of it gives the network, {plain(target)}:NAME")
    if not factory and not model:
        raise ValueError(
            f"model: {plain(target)} is a state dict, which does not say of which network: name it (--model, one of "
            f"{', '.join(models.names())}, or package.module:factory)"
        )


def _of_ours(
    path: str, name: str, sizes: Mapping[str, Any], mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """One of our networks with the weights of a file, and the normalisation that the file or the user says."""
    weights: dict[str, Tensor] = fine_tuning.read(path, "state dict")
    weights = {_NORMALISATIONS.get(key, key): value for key, value in weights.items()}
    kept = checkpoint.mean_std(weights)
    weights = {key: value for key, value in weights.items() if key not in _NORMALISATIONS.values()}
    if kept:
        if mean is not None and kept != (tuple(mean), tuple(std or ())):
            raise ValueError(f"mean and std: {plain(path)} holds its own, {kept}: leave --mean and --std out")
        mean, std = kept
    if mean is None and sizes["in_channels"] == models.COLOUR:
        raise ValueError(
            f"mean and std: {plain(path)} holds none, and colour images are usually normalised: give --mean and --std "
            "as they were in training, or --mean none --std none for images that go in as they are"
        )
    network: Classifier = models.build(name, normalize=False, **sizes)
    try:
        fine_tuning.begin_with(network, path, weights)
    except ValueError as error:
        if sizes["width"] is None and weights.keys() == network.state_dict().keys():  # so that shapes alone differ
            raise ValueError(f"{error}. If it is of another width, say it (--width)") from error
        raise
    network.normalize = Normalize(mean, std) if mean and std else None
    return network


def evaluate_target(
    target: str,
    attacks: Sequence[str],
    *,
    eps: Sequence[float] = (),
    norm: Norm | None = None,
    size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    say: Say = print,
    how: Mapping[str, Any] | None = None,
    **where: Any,
) -> tuple[Report, Target]:
    """The report on what ``target`` means, and the network itself: ``atlas evaluate --attacks`` from Python.

    eps, norm, size, threads: default: the run's, or usual for the data set. how: more arguments of ``evaluate``; where:
    of ``opened``.
    """
    found = opened(target, say=say, **where)
    run, splits, place = found.settings, found.splits, usable_device(device)
    norm = norm or run.get("norm") or "linf"
    network = found.network.to(place)
    few = splits.test.first(2).to(place).float() / 255
    models.require_usable(network, found.architecture, few, splits.num_classes)
    channels_last = bool(run.get("channels_last"))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    threads = run.get("threads") if threads is None else threads
    with on_host(threads):
        report = evaluate(
            network, splits.test, found.radii(eps, norm), attacks=attacks, norm=norm,
            size=run.get("eval_size") if size is None else size, channels_last=channels_last, mean=found.mean,
            std=found.std, num_classes=None if where.get("other_data") else splits.num_classes, say=say, **how or {},
        )  # fmt: skip
        facts = {
            "target": without_place(target),
            "epoch": found.epoch,
            "architecture": found.architecture,
            "dataset": splits.name,
            "additional_data": bool(run.get("extra_data")) if run else None,
            "data": found.images,
            "weights": checkpoint.fingerprint(network),
            "environment": environment(place, threads or torch.get_num_threads()),
        }
    return replace(report, facts=facts, class_names=splits.class_names), found
