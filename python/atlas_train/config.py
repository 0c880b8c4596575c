"""The configuration of a training run: one typed, frozen dataclass, and what a data set fills in."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from atlas_kernels.precision import taken

from . import data, methods, models, protocols
from .data import Dataset, DataSplits, Split, held_out
from .imported import is_import_path, without_place
from .machine import MOST_THREADS, usable_device
from .methods.awp import require_wrappable
from .options import NORMS, Norm, canonical, check, option, plain, shown, suggestion

#: Settings that say where on this machine things are, and nothing about the results.
PLACES = ("data_dir", "out_dir", "resume")
#: Settings of earlier versions that no longer exist, and why. Files, flags and calls that have one still work: it is
#: ignored, whatever its value, and a warning of one line says so.
RETIRED: dict[str, str] = {
    "fold_batchnorm": "it made attacks no faster",
    "val_every": "validation looks at val_size training images after every epoch, and at no test image",
}
#: What runs of earlier versions had, where a new run has another default: their records do not say it.
EARLIER: dict[str, Any] = {"ema_warmup": False, "val_size": 0}
#: The sections of the help: what each is about, and its first setting.
SECTIONS = {
    "method": ("how it is trained, and against which attack", "method"),
    "data": ("images to train on, and those held out", "dataset"),
    "network": ("what is trained, and from which weights", "model"),
    "update": ("how the weights are updated", "epochs"),
    "averaging": ("the weights that are exported", "averaging"),
    "collapse": ("signs that training fails, and what follows (validation: --val-size)", "on_collapse"),
    "evaluation": ("of test images, at the end", "eval_size"),
    "speed": ("speed and memory; the result stays the same, up to precision", "train_precision"),
    "run": ("where it runs, and where its files are", "seed"),
}
_AUTO = "default: by data set"
AUTOATTACK = (
    "test images for AutoAttack; 0: none. PGD alone flatters methods: for GAIRAT, MART and MMA gaps of 5 to 10 "
    "points are published, ATLAS' is 16 on digits"
)
AUTOATTACK_VERSION = (
    "standard: APGD-CE, APGD-T, FAB-T and Square; apgd: the first two, in a fraction of the time; plus: more of each; "
    "rand: for networks that draw random numbers"
)


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name, without those that are ``RETIRED``; warns of these."""
    for name in settings.keys() & RETIRED.keys():
        warnings.warn(f"the setting {name} no longer exists and is ignored: {RETIRED[name]}", stacklevel=1)  # said once
    return {name: value for name, value in settings.items() if name not in RETIRED}


class _Lenient(type):
    """A class that may be called with retired settings, and takes what is not given from the protocol."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        settings, names = without_retired(settings), [f.name for f in dataclasses.fields(cls)][: len(args)]  # type: ignore
        missing = protocols.missing(settings.get("protocol"), {**settings, **dict(zip(names, args, strict=False))})
        return super().__call__(*args, **{**settings, **missing})

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

    beside: tuple[str, ...] = option(
        None,
        "other methods, trained with the same settings for the same table. all, alone: every method; --beside without "
        "a name, or none: none; default: on digits standard and one_step_adv, else none. With the folder of a "
        "comparison as --resume they are added to its methods",
    )
    protocol: Literal["fastat"] | None = option(
        None,
        "a published recipe: it changes the defaults of other settings; a setting that you give wins. fastat: of the "
        f"FastAT Benchmark (arXiv 2604.22853): {protocols.told('fastat')}",
    )
    eps: float = option(
        None,
        "radius of the ball, for images in [0, 1], e.g. 8/255; < 1 in l_inf alone; " + _AUTO,
        above=0,
        below=1,
        of_linf=True,
        hint="images are in [0, 1], so write 8/255 instead of 8",
    )
    norm: Norm = option(
        "linf",
        "threat model: the norm of the ball in training, validation and evaluation. l2 and l1: only for methods that "
        "attack by PGD (its own steps then apply) or not at all; eps is then 128/255 and 12 on cifar10",
    )
    eps_warmup: int = option(
        0,
        "epochs at the start in which eps grows evenly: eps / (eps_warmup + 1) in the first, and so on; attack steps "
        "shrink with it. Validation and evaluation use all of eps (Pang et al. 2021)",
        low=0,
        hint="whole epochs; 0: none",
    )
    mix_share: float = option(
        0.0,
        "share of the batches that are attacked with mix_steps steps instead of the method's own (not those in "
        "beside); 0: none",
        low=0,
        below=1,
        hint="write 0.1 for a tenth; 0: off",
    )
    mix_steps: int = option(10, "attack steps of the batches of mix_share; their step size is PGD's", low=1)
    awp: float = option(
        0.0,
        "adversarial weight perturbation (not for those in beside), as a share of each weight's norm; 0: off. "
        "Published: 0.01 for adv, 0.005 for trades (Wu et al. 2020)",
        low=0,
        below=1,
    )
    awp_warmup: int = option(
        0,
        "epochs at the start without awp. Published: 0 for adv, 9 for trades; some are needed where accuracy stays at "
        "chance otherwise, as with adv and awp 0.01 on digits",
        low=0,
    )

    dataset: str = option(
        "digits",
        f"one of {', '.join(data.names())} (digits is embedded); folder: pictures of your own in --data-dir, a folder "
        "for each class; npz: arrays in the file --data-dir; or code of your own: package.module:factory or "
        "path/to/file.py:factory",
    )
    data_dir: str | None = option(
        None, "folder with the data's files, or the .npz file; default: $ATLAS_DATA, then the cache folder"
    )
    download: bool = option(False, "download the data if they are found nowhere")
    image_size: int | None = option(
        None,
        "pixels on each side to which the pictures of dataset folder are resized, and their middle cut out; default: "
        "as they are, all of one size",
        low=1,
    )
    grey: bool = option(False, "pictures of dataset folder in grey, as one channel, instead of RGB")
    skip_unreadable: bool = option(False, "leave out pictures of dataset folder that cannot be read")
    stream: bool = option(
        None,
        "read the pictures of dataset folder anew in each epoch, while the network trains, instead of keeping them in "
        "memory; default: where they take more than 2 GB there",
    )
    workers: int = option(
        None,
        "processes that decode pictures that stream; 0: the training process does; default: one less than there are "
        "CPU cores, 1 to 16. The result is the same",
        low=0,
    )
    train_size: int | None = option(
        None,
        "train on this many images, with the same share of each class; default: all but those of validation",
        low=1,
    )
    val_size: int = option(
        None,
        "training images held out for validation, which chooses best.pt; never trained on; 0: no validation. Default: "
        "2 % of the images, but at least 500, and at most 1000 and a tenth of them",
        low=0,
    )
    val_step_size: float | None = option(
        None,
        "step of PGD-10 in validation, e.g. 2/255; default: eps / 2 in its first five steps (in l1 PGD's own), and "
        "eps / 8 in the other five",
        above=0,
    )
    augment: bool = option(None, "random crop and flip; " + _AUTO)
    crop: Literal["shift", "resized"] = option(
        None,
        "how augment crops. shift: by up to 4 pixels; resized: a part of random size and shape, resized, of pictures "
        "that stream (as is usual for ImageNet); default: resized where they stream in 128 pixels or more",
    )
    extra_data: str | None = option(
        None,
        "more training images, real or generated: an .npz file with image (uint8 [N, H, W, C]) and label (integers "
        "[N]), the layout of the published ones for CIFAR-10 (Gowal et al. 2021)",
    )
    extra_share: float = option(
        0.5,
        "share of each batch that comes from extra_data; an epoch has as many batches as without it (0.5: Carmon et "
        "al. 2019)",
        above=0,
        below=1,
        hint="write 0.3 for 30 %",
    )
    mixup: float = option(
        0.0,
        "alpha of mixup, for every method whose loss can have two labels; 0: off. Published: 1.4 (Rice et al. 2020)",
        low=0,
        high=100,
    )
    cutmix: float = option(
        0.0,
        "alpha of CutMix, for the same methods; 0: off. Published: 1 (Yun et al. 2019); it helps most with averaging "
        "(Rebuffi et al. 2021)",
        low=0,
        high=100,
    )

    model: str = option(
        None,
        f"network: {', '.join(models.names())}, or code of your own: package.module:factory or "
        "path/to/file.py:factory; " + _AUTO,
    )
    width: int | None = option(None, "width of the network; default: the network's own", low=1)
    activation: Literal["relu", "silu", "gelu"] = option(
        "relu", "of the networks listed under --model; silu (Swish) and gelu are smooth (Gowal et al. 2020)"
    )
    sync_batchnorm: bool = option(
        False,
        "with several processes (torchrun): BatchNorm takes its statistics of the rows of all, not of each process's "
        "own. On GPUs alone, and not with mma, yopo and methods that differentiate twice",
    )
    init: str | None = option(
        None,
        "weights to start from, for fine-tuning: a run's folder, a checkpoint, or a .safetensors or .pt file of "
        "weights by name; none: random, by seed",
    )
    mean: tuple[float, ...] = option(
        None,
        "mean of the training images in [0, 1], a number for each channel, by which the networks listed under --model "
        "normalise; none, and std too: images go in as they are; default: by data set, or measured where they are in "
        "colour",
    )
    std: tuple[float, ...] = option(None, "standard deviation, beside mean; default: the same", above=0)

    epochs: int = option(None, "passes over the training images; " + _AUTO, low=1)
    batch_size: int = option(
        None,
        "images per update. lr does not follow it: with sgd multiply lr by the same factor, and use lr_warmup (Goyal "
        "et al. 2017); " + _AUTO,
        low=1,
    )
    optimizer: Literal["sgd", "adam"] = option(None, "what turns gradients into updates; " + _AUTO)
    lr: float = option(None, "highest learning rate; " + _AUTO, above=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, below=1)
    momentum_low: float = option(
        0.0,
        "with schedule one_cycle: momentum of sgd at the highest learning rate; at the lowest it is that of momentum "
        "(torch's OneCycleLR: 0.85, and momentum 0.95). 0: momentum stays the same",
        low=0,
        below=1,
        hint="0: momentum stays the same",
    )
    schedule: Literal["cyclic", "piecewise", "cosine", "linear", "one_cycle", "constant"] = option(
        "cyclic",
        "of the learning rate: cyclic 0 -> lr -> 0; piecewise lr, lr/10 from 50 %, lr/100 from 75 % of the steps; "
        "cosine and linear lr -> 0; one_cycle lr/25 -> lr -> lr/250000 (Smith & Topin 2018; momentum: momentum_low); "
        "constant",
    )
    schedule_step: Literal["batch", "epoch"] = option(
        "batch",
        "when the learning rate, and momentum with momentum_low, changes: with every batch, or once an epoch, which "
        "then counts as one step of the schedule",
    )
    cyclic_peak: float = option(
        None,
        "share of the steps before the highest rate of cyclic and one_cycle; default: by data set for cyclic, 0.3 for "
        "one_cycle",
        low=0,
        below=1,
    )
    lr_warmup: float = option(
        0.0,
        "epochs (0.5 is half of one) at the start in which the learning rate grows evenly from 0; not for cyclic and "
        "one_cycle, which start low anyway. Published: 5 (Goyal et al. 2017)",
        low=0,
        hint="0: no warm-up",
    )
    weight_decay: float = option(None, "share of the weights that is added to their gradients; " + _AUTO, low=0)
    decay_norms: bool = option(
        True,
        "weight decay also for BatchNorm and biases, as in most published code; --no-decay-norms: not for these (He "
        "et al. 2019)",
    )
    clip_norm: float = option(
        0.0,
        "gradient clipping: the largest l2 norm of all gradients together; longer ones are scaled down (Pascanu et al. "
        "2013). 0: no limit",
        low=0,
        hint="0: no limit",
    )
    label_smoothing: float = option(
        0.0,
        "share of the label that is spread evenly over all classes, in the cross-entropies of the loss; attacks use "
        "whole labels (not in free, yopo, liet, fgsm_pgi, fgsm_uap, stored_adv, gat, nuat and atlas with local=start). "
        "Published: 0.1 to 0.2 (Pang et al. 2021)",
        low=0,
        below=1,
        hint="write 0.1 for a tenth; 0: off",
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "what follows a loss that is NaN or infinite. stop: the run ends; skip: the batch changes nothing (updates "
        "that a method with several per batch has made stay), and CUDA waits for every loss",
    )

    averaging: Literal["none", "ema", "swa"] = option(
        "none",
        "average of the weights, BatchNorm's statistics included, which is then validated, evaluated and exported. "
        "ema: moving average, after every batch; swa: mean over the last epochs (Izmailov et al. 2018)",
    )
    ema_decay: float = option(
        0.999, "decay of ema: it averages over about 1 / (1 - decay) batches; take less for a short run", low=0, below=1
    )
    ema_warmup: bool = option(
        True,
        "after t batches ema's decay is at most (1 + t) / (10 + t), so that a short run forgets its first weights (as "
        "in TensorFlow)",
    )
    swa_start: float = option(0.75, "share of the epochs that is over before swa begins", low=0, below=1)
    average_bn: Literal["average", "clean", "method"] = option(
        "average",
        "where BatchNorm's statistics of the average come from. average: averaged as the weights are; clean: a pass "
        "over the clean training images (Izmailov et al. 2018); method: a pass with the method's attack. The passes "
        "are made after every epoch that has an average",
    )

    best_of: Literal["average", "either"] = option(
        "average",
        "with averaging: whose weights best.pt may hold. average: the average's; either: those of the average or "
        "those in training, whichever are more robust in validation, which then takes twice the time",
    )

    on_collapse: Literal["warn", "stop", "rollback"] = option(
        "warn",
        "what follows when training collapses (catastrophic overfitting). warn: a warning; stop: the run ends after "
        "that epoch; rollback: it goes back to best.pt, and on with one attack step more, or ends there if the method "
        "has no --steps. Methods in beside: warn",
    )
    early_stop: int = option(
        0, "end the run after so many epochs in a row without a better one in validation; 0: never", low=0
    )
    probe_size: int = option(
        64, "training images that PGD-10 attacks after each epoch, to see a collapse; 0: do not watch", low=0
    )

    eval_size: int | None = option(None, "test images of the final evaluation; default: 1000 on a CPU, else all", low=1)
    autoattack: int = option(0, AUTOATTACK, low=0)
    autoattack_version: Literal["standard", "apgd", "plus", "rand"] = option("standard", AUTOATTACK_VERSION)

    train_precision: Literal["fp32", "bf16", "auto"] = option(
        "fp32",
        "of the network where weights get gradients; bf16: autocast; auto: bf16 where the device is known to be faster "
        "in it (`python -m atlas_kernels` says it of the CPU), else fp32. results.json says which auto took, and a "
        "resumed run keeps it. Evaluation stays fp32",
    )
    attack_precision: Literal["fp32", "bf16", "auto"] | None = option(
        None,
        "of the network in attacks, validation and probe; images and steps stay fp32. Attacks on a forward of training "
        "(liet, fgsm_uap, fgsm_pgi, stored_adv, atlas with local=start) use train_precision. Default: as "
        "train_precision",
    )
    channels_last: bool = option(False, "images and weights in channels_last")
    compile: bool = option(
        False,
        "torch.compile of the network in attacks and training, also in graphs of whole steps; a minute or so in the "
        "first step. Not with yopo, jacobian, grad_align, cure and llr, which look inside the network or differentiate "
        "twice; probe and evaluation run it as it is",
    )
    on_compile_error: Literal["stop", "eager"] = option(
        "stop", "a network that cannot be compiled stops the run in its first step, or is trained uncompiled"
    )
    cuda_graphs: Literal["none", "attack", "step"] = option(
        "none", "capture attacks, or whole training steps, once, and replay them: for networks small for their GPU"
    )
    cudnn_benchmark: bool = option(
        False,
        "cuDNN tries its algorithms at the first convolution of each shape, and takes the fastest. Two runs may then "
        "differ in the last place, as may a resumed one from one that was not",
    )
    checkpoint_activations: bool = option(
        False,
        "less memory in training, at the price of up to one forward more for each: the backward computes the inside of "
        "each block again. The memory of attacks is unchanged",
    )

    seed: int = option(0, "of the weights, the batches, the noise and the draw of val_size", low=0)
    seeds: tuple[int, ...] = option(
        (),
        "train once with each of these instead of seed, in a subfolder each, for a table of means and standard "
        "deviations. With such a folder as --resume seeds that are done are not trained again, and new ones are added",
        low=0,
    )
    device: str = option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    threads: int | None = option(None, "CPU threads; default: torch's; digits: 1", low=1, high=MOST_THREADS)
    out_dir: str | None = option(None, "folder of the run; every method gets a subfolder; default: a new one in runs/")
    resume: str | None = option(
        None,
        "folder of a run or of a comparison, or last.pt, to go on with (best.pt: from the best epoch again); its "
        "settings are then the defaults, but for data_dir, which no file holds",
    )
    save_every: float = option(
        10.0,
        "minutes of training after which last.pt is written within an epoch too, so that a run that is killed loses no "
        "more; Ctrl-C then loses nothing. 0: only at the ends of epochs",
        low=0,
        hint="0: only at the ends of epochs",
    )
    tensorboard: bool = option(False, "also log for TensorBoard")

    def __post_init__(self) -> None:
        check(self, "config")
        self._set_names()
        known = [self.method, *_beside(self.beside, self.method)]
        for name in known:
            method = methods.build(name, 0.5 if self.eps is None else self.eps, self._early(name), norm=self.norm)
            for kind in ("mixup", "cutmix"):
                if getattr(self, kind):
                    methods.require_mixable(method, kind)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"config: seeds must be different ones, got {shown(self.seeds)}: name each once")
        _require_compatible(self)
        protocols.require_of_norm(self.protocol, vars(self))
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(
                "config: mean and std must be as many numbers, one for each channel, or none both, got "
                f"{shown(self.mean)} and {shown(self.std)}"
            )
        if self.awp:
            require_wrappable(methods.get(self.method))
        self.build_method(self.eps or 0.5, self._early(self.method))
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
            "dataset": canonical(self.dataset, (*data.names(), *data.FORMS)),
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

    def _early(self, name: str) -> dict[str, Any]:
        """``hyper_of``, with the form of the named data set where the values need that form. Without it they must still
        be valid too: records of earlier versions were made with other defaults."""
        own, eps = self.hyper_of(name), self.eps or 0.5
        usual = data.usual(self.dataset)
        if not methods.get(name).form_options or usual is None:
            return own
        defaults = methods.defaults_on(usual, name)
        if _is_of_another_form(self, name, defaults):
            return own
        form = {key: value for key, value in defaults.items() if not isinstance(value, (data.OfEps, data.UpTo))}
        try:
            methods.build(name, eps, own)
        except ValueError:
            return {**form, **own}
        return own

    def build_method(self, eps: float | None = None, hyper: Mapping[str, Any] | None = None) -> methods.Method:
        """The method with its hyper-parameters; eps must be known (see ``resolved``) or given. hyper: default: those of
        the configuration."""
        own = self.hyper_of(self.method) if hyper is None else hyper
        method = methods.build(self.method, eps or self.eps, own, self.label_smoothing, self.norm)
        method = methods.AWP(method, self.awp, self.awp_warmup) if self.awp else method
        if self.eps_warmup or self.mix_share:
            method = methods.Curriculum(method, self.eps_warmup, self.mix_share, self.mix_steps, self.seed)
        if self.mixup:
            return methods.Mixing(method, "mixup", self.mixup)
        return methods.Mixing(method, "cutmix", self.cutmix) if self.cutmix else method

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return label(self.method, self.awp)


def label(method: str, awp: float) -> str:
    """What tables call a method with that much perturbation of weights."""
    return method + ("+awp" if awp else "")


#: Two settings that are not to be had together, and why.
_CLASHES = (
    ("mixup", "cutmix", "a batch is mixed in one way"),
    ("compile", "checkpoint_activations", "compiled code decides by itself what to compute again"),
)


def _require_compatible(config: TrainConfig) -> None:
    """Raises ValueError for settings of speed that contradict each other or the device."""
    for one, other, why in _CLASHES:
        if getattr(config, one) and getattr(config, other):
            raise ValueError(f"config: {one} and {other} do not go together, as {why}: leave one out")
    _require_warmups(config)
    _require_cycle(config)
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


def _require_cycle(config: TrainConfig) -> None:
    """Raises ValueError for a momentum that has no cycle, or none that a graph could follow."""
    low = config.momentum_low
    if low and config.schedule != "one_cycle":
        raise ValueError(
            f"config: momentum_low={low:g} goes with schedule='one_cycle', got {config.schedule!r}: set "
            "momentum_low=0, or that schedule"
        )
    if low > config.momentum:
        raise ValueError(
            f"config: momentum_low must be at most momentum, {config.momentum:g}, got {low:g}: exchange them, or set "
            "momentum_low=0"
        )
    if low and config.schedule_step == "batch" and config.cuda_graphs == "step":
        raise ValueError(
            f"config: momentum_low={low:g} with schedule_step='batch' is another momentum in every batch, and a graph "
            "of the step holds one (cuda_graphs='step'): set schedule_step='epoch', momentum_low=0, or "
            "cuda_graphs='attack'"
        )


def _require_warmups(config: TrainConfig) -> None:
    """Raises ValueError for a warm-up that the run does not leave, or beside a schedule that has its own."""
    for name in ("lr_warmup", "eps_warmup"):
        if config.epochs is not None and (value := getattr(config, name)) and value >= config.epochs:
            raise ValueError(
                f"config: {name} must be less than epochs, {config.epochs}, of which something has to come after it, "
                f"got {value:g}: set fewer, or more epochs"
            )
    if config.lr_warmup and config.schedule in ("cyclic", "one_cycle"):
        raise ValueError(
            f"config: lr_warmup={config.lr_warmup:g} has no place before schedule={config.schedule!r}, which rises by "
            "itself until cyclic_peak: set that, or choose schedule cosine, linear, piecewise or constant"
        )


def resolved(config: TrainConfig, splits: DataSplits, own_model: bool = False) -> TrainConfig:
    """The configuration with every default that depends on data set and machine filled in.

    The data set is that of ``splits``. own_model: the network is given as such, so that ``model`` names none. Raises
    ValueError that says what the data set has no default for.
    """
    dataset = data.declared(splits)
    _require_valid(dataset)
    defaults = dataset.settings | {
        "eps": splits.eps if config.norm == "linf" else dataset.radius(config.norm),
        "augment": splits.augment,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    if config.schedule == "one_cycle":
        defaults["cyclic_peak"] = 0.3  # of torch's OneCycleLR
    own = own_model or is_import_path(config.model or dataset.model)
    if own or len(dataset.mean or ()) != splits.train.shape[0]:  # those of CIFAR-10 say nothing of a grey copy
        defaults |= {"mean": None, "std": None}
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    missing |= {"dataset": splits.name} | ({"model": None} if own_model else {})
    normalised = not own and splits.train.shape[0] == models.COLOUR
    if normalised and not config.resume and {**vars(config), **missing}["mean"] is None:  # else the checkpoint has them
        missing |= _measured(splits.train)
    if config.val_size is None:
        missing["val_size"] = held_out.default_size(len(splits.train), config.train_size)
    config = _precise(dataclasses.replace(config, **missing))
    config = dataclasses.replace(config, beside=_beside(config.beside, config.method))
    _require_known(config, splits, own, own_model)
    held_out.require_room(len(splits.train), config.train_size, config.val_size)
    return dataclasses.replace(config, hyper={**config.hyper, **_published(config, dataset)})


def _precise(config: TrainConfig) -> TrainConfig:
    """The configuration with what the precisions that are left to the machine come to on the device."""
    left = [name for name in ("train_precision", "attack_precision") if getattr(config, name) == "auto"]
    found: dict[str, Any] = {name: taken("auto", usable_device(config.device)) for name in left}
    return dataclasses.replace(config, **found)


def _require_valid(dataset: Dataset) -> None:
    """Raises ValueError for defaults that no configuration can have."""
    try:
        TrainConfig(**dataset.settings)
        for norm, eps in dataset.radii.items():
            TrainConfig(method="standard", norm=cast(Norm, norm), eps=eps)
        known = {*data.names(), *(key for name in methods.names() for key in methods.get(name).defaults)}
        if dataset.like not in (None, *known):
            raise ValueError(f"like: no data set {shown(dataset.like)}{suggestion(dataset.like, known)}")
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
    if own and config.activation != "relu":
        raise ValueError("config: activation is for networks of ours alone: leave it out, and choose it in yours")
    if own and config.mean:
        raise ValueError(
            "config: mean and std are built into networks of ours alone: leave them out, and normalise in yours"
        )
    if config.eps is None:
        raise ValueError(
            f"config: the data set {plain(splits.name)} has no usual eps in {NORMS[config.norm]}: set it (--eps), or "
            "declare it (Dataset.radii)"
        )
    widest = math.prod(splits.train.shape) ** (0.5 if config.norm == "l2" else 1.0)
    if config.norm != "linf" and config.eps >= widest:
        raise ValueError(
            f"config: eps must be less than {widest:.4g} in {NORMS[config.norm]}, as no two images in [0, 1] are "
            f"further apart, got {config.eps:.4g}: write 128/255 instead of 128"
        )
    unknown = [name for name in ("epochs", "batch_size", "lr") if getattr(config, name) is None]
    if unknown:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ValueError(
            f"config: the data set {splits.name!r} has no {', '.join(unknown)} of its own: set them ({flags}), or "
            "declare them with it (atlas_train.data.Dataset)"
        )


def _measured(images: Split) -> dict[str, tuple[float, ...]]:
    """Mean and std of the images as everyone writes them; a channel that is the same everywhere is divided by 1."""
    mean, std = (tuple(round(value, 4) for value in values) for values in images.mean_std())
    return {"mean": mean, "std": tuple(value or 1.0 for value in std)}


def alone(config: TrainConfig) -> TrainConfig:
    """The configuration of one run, without the methods beside it, what is set for them, and other seeds."""
    return dataclasses.replace(config, beside=(), hyper=config.hyper_of(config.method), seeds=())


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
    """The methods' defaults on the data set, where nothing else was set, and where they change something. A step size
    applies only in l_inf, and if neither ``steps`` nor a form with a step of its own was set; where a method has
    forms, the rest only in l_inf, and if no form was chosen."""
    filled: dict[str, Any] = {}
    for name in (config.method, *config.beside):
        given = config.hyper_of(name)
        defaults = {**methods.defaults_on(dataset, name), **protocols.hyper(config.protocol, name)}
        other, own = _is_of_another_form(config, name, defaults), dict[str, Any]()
        steps = _chosen(methods.get(name), given, defaults, methods.get(name).step_options)
        for key, value in defaults.items():
            if isinstance(value, data.OfEps):
                free = key not in given and "steps" not in given and not (key == "step_size" and steps)
                if free and config.norm == "linf":
                    own[key] = value * config.eps
            elif key not in given and not other:
                own[key] = value.at(config.eps) if isinstance(value, data.UpTo) else value
        method = methods.build(name, config.eps, {**given, **own}, norm=config.norm)
        unused = method.without_effect()
        filled |= {f"{name}.{key}": value for key, value in own.items() if key not in unused}
    return filled


def _is_of_another_form(config: TrainConfig, name: str, defaults: Mapping[str, Any]) -> bool:
    """Whether the method has forms, and another than that of the data set's defaults was chosen."""
    method = methods.get(name)
    form = method.form_options
    return bool(form) and (config.norm != "linf" or _chosen(method, config.hyper_of(name), defaults, form))


def _chosen(
    method: type[methods.Method], given: Mapping[str, Any], defaults: Mapping[str, Any], names: tuple[str, ...]
) -> bool:
    """Whether one of these hyper-parameters is given, and is not the data set's default or else the method's."""
    known = methods.hyper_parameters(method)
    return any(name in given and given[name] != defaults.get(name, known[name].default) for name in names)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain types only, for JSON and checkpoints."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return values | {"hyper": dict(config.hyper)}


def recorded(config: TrainConfig) -> dict[str, Any]:
    """``to_dict`` for files that others read: without what says where things lie on this machine."""
    kept = {key: value for key, value in to_dict(config).items() if key not in PLACES}
    return kept | {name: kept[name] and without_place(kept[name]) for name in ("model", "init", "extra_data")}


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


def from_record(values: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """The configuration that a run wrote down, maybe one of an earlier version; of a retired setting that was off there
    is nothing to say."""
    off = {key for key in values.keys() & RETIRED.keys() if isinstance(values[key], int) and not values[key]}
    return from_dict({**EARLIER, **{key: value for key, value in values.items() if key not in off}}, source)


def from_file(path: str | os.PathLike[str], read: Callable[..., TrainConfig] = from_dict) -> TrainConfig:
    """A configuration from a JSON file: {"method": "atlas", "hyper": {"radius": 0.1}, "eps": "8/255", ...}."""
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
    return read(values, f"config file {plain(path)}")
