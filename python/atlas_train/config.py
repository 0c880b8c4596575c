"""The configuration of a training run: one typed, frozen dataclass, and what a data set fills in."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from . import data, methods, models
from .data import Dataset, DataSplits, Images, held_out
from .imported import is_import_path, without_place
from .methods.awp import require_wrappable
from .options import canonical, check, option, plain, shown, suggestion

#: CPU threads that anybody has; of a million torch ends the process.
MOST_THREADS = 1024
#: Settings that say where on this machine things are, and nothing about the results.
PLACES = ("data_dir", "out_dir", "resume")
#: Settings of earlier versions that no longer exist, and why. Files, flags and calls that have one still work: it is
#: ignored, whatever its value, and a warning of one line says so.
RETIRED: dict[str, str] = {
    "fold_batchnorm": "it made attacks no faster",
    "val_every": "validation looks at val_size training images after every epoch, and at no test image",
}
_AUTO = "default: by data set"
AUTOATTACK = (
    "test images for AutoAttack, which needs pip install --no-deps pyautoattack; 0: none. PGD alone flatters "
    "methods: for GAIRAT, MART and MMA gaps of 5 to 10 points are published, ATLAS' is 16 on digits"
)
AUTOATTACK_VERSION = "standard: APGD-CE, APGD-T, FAB-T and Square; apgd: the first two, in a fraction of the time"


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name, without those that are ``RETIRED``; warns of these."""
    for name in settings.keys() & RETIRED.keys():
        warnings.warn(f"the setting {name} no longer exists and is ignored: {RETIRED[name]}", stacklevel=1)  # said once
    return {name: value for name, value in settings.items() if name not in RETIRED}


class _Lenient(type):
    """A class that may be called with retired settings."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        return super().__call__(*args, **without_retired(settings))

    @property
    def __signature__(cls) -> inspect.Signature:
        """Of its settings, for help() and editors, which look at the call above first."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


@dataclass(frozen=True)
class TrainConfig(metaclass=_Lenient):
    """Everything that a training run is made of. None means the default of the data set (``data.Dataset``).

    Raises ValueError at construction for unknown names and values out of range. ``resolved`` fills in the defaults.
    Names are known in capitals too.
    """

    method: str = option("atlas", "training method; `atlas methods` lists them")
    hyper: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the method, e.g. {"radius": 0.1}; "adv.steps" reaches a method in ``beside``."""

    awp: float = option(
        0.0,
        "adversarial weight perturbation around the method (not those beside), as a share of each weight's norm; "
        "0: off. Published: 0.01 for adv, 0.005 for trades",
        low=0,
        below=1,
    )
    awp_warmup: int = option(
        0,
        "first epochs, without the perturbation of weights; published: 0 for adv, 9 for trades. Some are needed where "
        "accuracy stays at chance otherwise, as that of adv with awp 0.01 does on digits",
        low=0,
    )

    dataset: str = option(
        "digits",
        f"one of {', '.join(data.names())} (digits is embedded), or code of your own: package.module:factory or "
        "path/to/file.py:factory",
    )
    data_dir: str | None = option(None, "folder with the data's files; default: $ATLAS_DATA, then the cache folder")
    download: bool = option(False, "download the data if they are found nowhere")
    train_size: int | None = option(
        None, "train on this many images (a stratified draw); default: all that validation leaves", low=1
    )
    val_size: int = option(
        None,
        "training images held out for validation (a stratified draw by the seed, never trained on): after each epoch "
        "they say which weights are kept as best.pt; 0: none. Default: 2 % of the images, but 500 to 1000, and at most "
        "a tenth",
        low=0,
    )
    augment: bool = option(None, "random crop and flip; " + _AUTO)

    model: str = option(
        None, "network, by name, or code of your own: package.module:factory or path/to/file.py:factory; " + _AUTO
    )
    width: int | None = option(None, "width of the network; default: the network's own", low=1)
    mean: tuple[float, ...] = option(
        None, "of training images in [0, 1], a number for each channel: networks of ours normalise by it; " + _AUTO
    )
    std: tuple[float, ...] = option(None, "beside mean; " + _AUTO, above=0)

    eps: float = option(
        None,
        "l_inf radius for images in [0, 1], e.g. 8/255; " + _AUTO,
        above=0,
        below=1,
        hint="images are in [0, 1], so write 8/255 instead of 8",
    )

    epochs: int = option(None, "passes over the data; " + _AUTO, low=1)
    batch_size: int = option(None, _AUTO, low=1)
    optimizer: Literal["sgd", "adam"] = option(None, _AUTO)
    lr: float = option(None, "peak learning rate; " + _AUTO, above=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, below=1)
    weight_decay: float = option(None, _AUTO, low=0)
    schedule: Literal["cyclic", "piecewise", "cosine", "constant"] = option(
        "cyclic",
        "of the learning rate: cyclic 0 -> lr -> 0, piecewise lr/10 at 50 % and lr/100 at 75 %, cosine, constant",
    )
    cyclic_peak: float = option(None, "share of steps before the peak of cyclic; " + _AUTO, low=0, below=1)
    train_precision: Literal["fp32", "bf16"] = option(
        "fp32", "of the network where weights get gradients; bf16: autocast. Evaluation stays fp32"
    )
    attack_precision: Literal["fp32", "bf16"] | None = option(
        None, "of the network in attacks, the probe's too; images and steps stay fp32. Default: as train_precision"
    )
    channels_last: bool = option(False, "images and weights in channels_last")
    compile: bool = option(
        False,
        "torch.compile of the network in attacks and training. Methods that look inside the network or differentiate "
        "twice run it as it is there, and so do probe and evaluation",
    )
    cuda_graphs: Literal["none", "attack", "step"] = option(
        "none", "capture attacks, or whole training steps, once, and replay them: for networks small for their GPU"
    )
    checkpoint_activations: bool = option(
        False,
        "training forwards keep the input of each block alone, and the backward runs the block again: up to a forward "
        "more each, for memory. The memory of attacks is unchanged",
    )

    averaging: Literal["none", "ema", "swa"] = option(
        "none",
        "of the weights, BatchNorm's statistics included: ema after every batch; swa, the mean over the ends of the "
        "last epochs. Validation, the final evaluation and the exported weights are then those of the average; the "
        "probe looks at the weights being trained",
    )
    ema_decay: float = option(
        0.999, "decay of ema, which remembers some 1 / (1 - decay) batches: take less for a short run", low=0, below=1
    )
    swa_start: float = option(0.75, "share of the epochs before the first that swa takes", low=0, below=1)
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "a loss that is NaN or infinite stops the run, or its batch is skipped: no update (those that a method with "
        "several per batch has made stay), BatchNorm's statistics put back; CUDA then waits for every loss",
    )

    seed: int = option(0, "of the weights, the batches and the noise", low=0)
    device: str = option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    threads: int | None = option(None, "CPU threads; default: torch's; digits: 1", low=1, high=MOST_THREADS)

    on_collapse: Literal["warn", "stop", "rollback"] = option(
        "warn",
        "what follows when training collapses (catastrophic overfitting). warn: it is said, and training goes on; "
        "stop: the run ends after that epoch; rollback: it goes back to best.pt, and on from there with one attack "
        "step more, or ends there if the method has no steps. best.pt is kept in any case. Methods in beside have warn",
    )
    early_stop: int = option(
        0, "end the run when so many epochs in a row were no better in validation than the best before; 0: never", low=0
    )
    probe_size: int = option(
        64, "training images watched for catastrophic overfitting with PGD-5 after each epoch; 0: do not watch", low=0
    )
    eval_size: int | None = option(None, "test images of the final evaluation; default: 1000 on a CPU, else all", low=1)
    autoattack: int = option(0, AUTOATTACK, low=0)
    autoattack_version: Literal["standard", "apgd"] = option("standard", AUTOATTACK_VERSION)
    beside: tuple[str, ...] = option(
        None,
        "methods trained beside with the same settings, for the table. all, alone: every method; --beside without a "
        "name, or none: none; default: on digits standard and one_step_adv, else none. With the folder of a comparison "
        "as --resume they are added to its methods",
    )

    out_dir: str | None = option(None, "folder of the run; every method gets a subfolder; default: a new one in runs/")
    resume: str | None = option(
        None,
        "folder of a run or of a comparison, or last.pt, to go on with (best.pt: from the best epoch again); its "
        "settings are then the defaults, but for data_dir, which no file holds",
    )
    tensorboard: bool = option(False, "also log for TensorBoard")

    def __post_init__(self) -> None:
        check(self, "config")
        self._set_names()
        known = [self.method, *_beside(self.beside, self.method)]
        for name in known:
            methods.build(name, self.eps or 0.5, self.hyper_of(name))
        _require_compatible(self)
        if () in (self.mean, self.std) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(
                f"config: mean and std must be as many numbers, one for each channel, got {shown(self.mean)} and "
                f"{shown(self.std)}"
            )
        if self.awp:
            require_wrappable(methods.get(self.method))
        for key in self.hyper:
            owner, dot, _ = key.rpartition(".")
            if dot and owner not in known:
                raise ValueError(f"config: hyper {key!r} is for {owner!r}, which is neither method nor in beside")

    def _set_names(self) -> None:
        """Names as they are written, and ``hyper`` by names."""
        if not isinstance(self.hyper, Mapping) or not all(isinstance(key, str) for key in self.hyper):
            raise ValueError(f"config: hyper must be hyper-parameters by name, got {shown(self.hyper)}")
        spelled = {
            "method": canonical(self.method, methods.names()),
            "beside": self.beside and tuple(canonical(name, (*methods.names(), "all")) for name in self.beside),
            "dataset": canonical(self.dataset, data.names()),
            "model": canonical(self.model, models.names()),
            "device": self.device and self.device.lower(),
        }
        for field_name, value in spelled.items():
            object.__setattr__(self, field_name, value)
        if self.beside and "all" in self.beside and len(self.beside) > 1:
            raise ValueError(f"config: beside: all means every method and stands alone, got {shown(self.beside)}")

    def hyper_of(self, name: str) -> dict[str, Any]:
        """The hyper-parameters that ``hyper`` gives to the method of that name."""
        own = {key: value for key, value in self.hyper.items() if "." not in key} if name == self.method else {}
        dotted = {key.partition(".")[2]: value for key, value in self.hyper.items() if key.startswith(f"{name}.")}
        return own | dotted

    def build_method(self) -> methods.Method:
        """The method with its hyper-parameters; eps must be known (see ``resolved``)."""
        method = methods.build(self.method, self.eps, self.hyper_of(self.method))
        return methods.AWP(method, self.awp, self.awp_warmup) if self.awp else method

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return label(self.method, self.awp)


def label(method: str, awp: float) -> str:
    """What tables call a method with that much perturbation of weights."""
    return method + ("+awp" if awp else "")


#: Two settings that are not to be had together, and why.
_CLASHES = (("compile", "checkpoint_activations", "compiled code decides by itself what to compute again"),)


def _require_compatible(config: TrainConfig) -> None:
    """Raises ValueError for settings of speed that contradict each other or the device."""
    for one, other, why in _CLASHES:
        if getattr(config, one) and getattr(config, other):
            raise ValueError(f"config: {one} and {other} do not go together, as {why}: leave one out")
    graphs = config.cuda_graphs
    if graphs == "step" and config.checkpoint_activations:
        raise ValueError(
            "config: cuda_graphs='step' and checkpoint_activations do not go together, as a capture cannot put the "
            "random state back for what is computed again: leave one out, or set cuda_graphs='attack'"
        )
    if graphs != "none" and config.device is not None and not config.device.startswith("cuda"):
        raise ValueError(
            f"config: cuda_graphs={graphs!r} needs a CUDA device, got device={config.device!r}: set cuda_graphs='none'"
        )


def resolved(config: TrainConfig, splits: DataSplits, own_model: bool = False) -> TrainConfig:
    """The configuration with every default that depends on data set and machine filled in.

    The data set is that of ``splits``. own_model: the network is given as such, so that ``model`` names none. Raises
    ValueError that says what the data set has no default for.
    """
    dataset = data.declared(splits)
    _require_valid(dataset)
    defaults = dataset.settings | {
        "eps": splits.eps,
        "augment": splits.augment,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    own = own_model or is_import_path(config.model or dataset.model)
    if own or len(dataset.mean or ()) != splits.train.shape[0]:  # those of CIFAR-10 say nothing of a grey copy
        defaults |= {"mean": None, "std": None}
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    missing |= {"dataset": splits.name} | ({"model": None} if own_model else {})
    if config.val_size is None:
        missing["val_size"] = held_out.default_size(len(splits.train), config.train_size)
    config = dataclasses.replace(config, **missing)
    config = dataclasses.replace(config, beside=_beside(config.beside, config.method))
    _require_known(config, splits, own, own_model)
    held_out.require_room(len(splits.train), config.train_size, config.val_size)
    return dataclasses.replace(config, hyper={**config.hyper, **_published(config, dataset)})


def _require_valid(dataset: Dataset) -> None:
    """Raises ValueError for defaults that no configuration can have."""
    try:
        TrainConfig(**dataset.settings)
        own = dataset.methods
        if not isinstance(own, Mapping) or not all(isinstance(hyper, Mapping) for hyper in own.values()):
            raise ValueError(f"methods must be hyper-parameters by method and name, got {shown(own)}")
        for name, hyper in own.items():
            lengths = {key: value * dataset.eps for key, value in hyper.items() if isinstance(value, data.OfEps)}
            methods.build(name, dataset.eps, {**hyper, **lengths})
    except ValueError as error:
        raise ValueError(f"data set {plain(dataset.name)}: {str(error).removeprefix('config: ')}") from error


def _require_known(config: TrainConfig, splits: DataSplits, own: bool, own_model: bool) -> None:
    """Raises ValueError for what neither configuration nor data set says.

    own: the network is one's own, which nobody tells mean and std. own_model: it is given as such, without a name.
    """
    if config.model is None and not own_model:
        raise ValueError(
            f"model: the data set {splits.name!r} has no network of its own: give train a network (model=...), or name "
            f"one in the configuration, one of {', '.join(models.names())} or package.module:factory"
        )
    if own and config.mean is not None:
        raise ValueError(
            "config: mean and std are built into networks of ours alone: leave them out, and normalise in yours"
        )
    needed = ["epochs", "batch_size", "lr"]
    if not own and not config.resume and splits.train.shape[0] == models.COLOUR:  # else the checkpoint has mean and std
        needed += ["mean", "std"]
    unknown = [name for name in needed if getattr(config, name) is None]
    if unknown:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ValueError(
            f"config: the data set {splits.name!r} has no {', '.join(unknown)} of its own: set them ({flags}), or "
            f"declare them with it (atlas_train.data.Dataset){_measured(splits.train) if 'mean' in unknown else ''}"
        )


def _measured(images: Images) -> str:
    """Mean and std of the images as flags."""
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in images.mean_std())
    return f"; its training images have --mean {mean} --std {std}"


def alone(config: TrainConfig) -> TrainConfig:
    """The configuration of the method alone, without those beside it and what is set for them."""
    return dataclasses.replace(config, beside=(), hyper=config.hyper_of(config.method))


def methods_of(config: TrainConfig) -> tuple[str, ...]:
    """The method and those beside it."""
    return config.method, *_beside(config.beside, config.method)


def added(old: tuple[str, ...] | None, more: tuple[str, ...] | None, method: str) -> tuple[str, ...]:
    """The methods beside ``method`` where ``more`` are added to ``old``."""
    return tuple(dict.fromkeys((*_beside(old, method), *_beside(more, method))))


def _beside(names: tuple[str, ...] | None, method: str) -> tuple[str, ...]:
    """The methods beside ``method``, each once."""
    everything = methods.names() if names == ("all",) else names or ()
    return tuple(name for name in dict.fromkeys(everything) if name != method)


def _published(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """The methods' defaults on the data set, where nothing else was set. A step size applies only if ``steps`` was not
    set."""
    filled: dict[str, Any] = {}
    for name in (config.method, *config.beside):
        given = config.hyper_of(name)
        for key, value in methods.defaults_on(dataset, name).items():
            if isinstance(value, data.OfEps):
                if key not in given and "steps" not in given:
                    filled[f"{name}.{key}"] = value * config.eps
            elif key not in given:
                filled[f"{name}.{key}"] = value
    return filled


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain types only, for JSON and checkpoints."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return values | {"hyper": dict(config.hyper)}


def recorded(config: TrainConfig) -> dict[str, Any]:
    """``to_dict`` for files that others read: without what says where things lie on this machine."""
    kept = {key: value for key, value in to_dict(config).items() if key not in PLACES}
    return kept | {"model": config.model and without_place(config.model)}


def from_dict(values: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """The inverse of ``to_dict``, without retired keys. Raises ValueError for an unknown one, naming the nearest."""
    source, known = plain(source), [f.name for f in dataclasses.fields(TrainConfig)]
    values = without_retired(values)
    for key in values:
        if key not in known:
            raise ValueError(f"{source}: no setting {shown(key)}{suggestion(key, known)}")
    try:
        return TrainConfig(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix('config: ')}") from error


def from_file(path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration from a JSON file: {"method": "atlas", "hyper": {"radius": 0.1}, "eps": "8/255", ...}.

    defaults: what holds where the file names nothing.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config file {plain(path)} does not exist") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(
            f"config file {plain(path)} is a folder: give the file in it, or --resume {plain(path)}"
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, thousands of digits or brackets
        raise ValueError(f"config file {plain(path)} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {plain(path)} must hold one JSON object, got {type(values).__name__}")
    return from_dict({**(defaults or {}), **values}, f"config file {plain(path)}")
