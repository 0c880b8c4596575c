"""A training run: what it is made of, and how it is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import Execution
from atlas_kernels.precision import warn_if_slow

from . import averaging, methods, models, optimizers, processes, schedules
from .compiled import compiled_network, require_compilable
from .config import TrainConfig, resolved
from .data import Batches, DataSplits, Pictures, Split, Streamed, held_out
from .data.streamed import Crop
from .fine_tuning import begin_with
from .imported import without_place
from .machine import autocast, usable_device
from .methods import Method, State
from .options import plain
from .recompute import Recomputed, blocks
from .remembered import require_room
from .step_graph import require_recordable
from .within import Within

#: From so many pixels on each side on, a crop of pictures that stream is usually resized.
RESIZED = 128


@dataclass
class Run:
    """A training run under way or done: what a checkpoint keeps, and what the loop needs beside it.

    network: what methods are given, ``model`` or its compiled form. execution: how attacks are run. data: the record
    of its images (``data.identity``). changes: settings that a resumed run has changed, each with its epoch.
    validation: training images held out. best: the epoch that best.pt holds, 0 before there is one; best_raw: whether
    it means the weights in training, though there is an average. rescues: where a collapse was taken back, from which
    epoch to which and with what. ended: why training ended early, if it did. peak_memory: the most bytes that
    torch held at once in an epoch on CUDA. within: the epoch under way. masks: names of weights and buffers that were
    not finite from the start.
    """

    config: TrainConfig
    method: Method
    model: nn.Module
    network: nn.Module
    execution: Execution
    optimizer: torch.optim.Optimizer
    batches: Batches
    splits: DataSplits
    device: torch.device
    folder: Path | None
    arch: dict[str, Any]
    total_steps: int
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    average: averaging.Averaging | None = None
    data: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    validation: Split | None = None
    best: int = 0
    best_raw: bool = False
    rescues: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""
    peak_memory: int = 0
    within: Within = field(default_factory=Within)
    masks: set[str] = field(default_factory=set)

    @property
    def final_model(self) -> nn.Module:
        """What training came to: the average of the weights where there is one, else the network itself."""
        average = self.average.network() if self.average else None
        return self.model if average is None else average

    @property
    def hyper(self) -> dict[str, Any]:
        """The method's hyper-parameters as used."""
        return self.method.in_use()

    @property
    def skipped(self) -> int:
        """Batches left out so far, for their loss was not finite."""
        return sum(row.get("skipped", 0) for row in self.history)

    @property
    def epochs_done(self) -> int:
        """Epochs that were trained, those that were taken back too."""
        return self.epoch + sum(rescue["epoch"] - rescue["back_to"] for rescue in self.rescues)

    @property
    def samples(self) -> int:
        """Images that are trained on, the extra ones too."""
        return run_samples(self.splits)

    @property
    def state(self) -> State:
        """What a method may know of the run."""
        c, repeats = self.config, self.splits.extra is not None
        where = self.step, self.total_steps, self.epoch, c.epochs
        return State(*where, self.samples, self.memory, repeats=repeats, augment=c.augment)

    def rate(self, update: int) -> float:
        """The learning rate of an update, from 0, of the batch that comes next."""
        c, updates = self.config, self.method.updates
        step, total, warmup = self.epoch, c.epochs, c.lr_warmup
        if c.schedule_step == "batch":
            step, total = self.step * updates + update, self.total_steps * updates
            warmup *= len(self.batches) * updates
        rate = schedules.learning_rate(c.schedule, c.lr, step, total, c.cyclic_peak, warmup)
        # Graphs read the rate on the device in float32. Eager steps must get the same number.
        return torch.tensor(rate).item() if self.optimizer.param_groups[0]["fused"] else rate

    @property
    def momentum(self) -> float | None:
        """The momentum of the batch that comes next, where it changes over training."""
        c = self.config
        if not c.momentum_low or c.optimizer != "sgd":
            return None
        step, total = (self.step, self.total_steps) if c.schedule_step == "batch" else (self.epoch, c.epochs)
        return schedules.momentum(c.momentum, c.momentum_low, step, total, c.cyclic_peak)

    @contextmanager
    def training(self) -> Iterator[None]:
        """How the forwards and backwards of a step are run: its attacks, and the rest."""
        # Compiled code casts its weights itself, and is made for one setting of the cache: that of steps in graphs.
        cast = autocast(self.config.train_precision, self.device, cache=not self.config.compile)
        with cast, self.execution, self.recomputed(self.model):
            yield

    def recomputed(self, model: nn.Module) -> AbstractContextManager[None]:
        """In which training forwards of ``model`` keep what the settings say."""
        return Recomputed(model) if self.config.checkpoint_activations else nullcontext()


def prepare(config: TrainConfig, splits: DataSplits, model: nn.Module | None, folder: Path | None) -> Run:
    """Network, optimiser and method as the configuration says, before the first step."""
    config = resolved(config, splits, own_model=model is not None)
    device = processes.own_device(usable_device(config.device))
    train, validation = held_out.split(splits.train, config.train_size, config.val_size, config.seed)
    splits = replace(splits, train=train)
    arch: dict[str, Any] = {
        "name": without_place(config.model) if model is None else type(model).__name__,
        "by_name": model is None,
        "num_classes": splits.num_classes,
        "in_channels": splits.train.shape[0],
        "width": config.width,
    }
    torch.manual_seed(config.seed)
    if model is None:
        model = network_of(config, splits)
    if config.init and not config.resume:
        begin_with(model, config.init)
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = batches_of(config, splits, device)
    if arch["by_name"]:
        few = splits.train.first(2).to(device).float() / 255
        models.require_usable(model, arch["name"], few, splits.num_classes)
    method, optimizer = require_trainable(config, model)
    require_shareable(config, method, device)
    if config.sync_batchnorm and processes.count() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which keeps the weights that the optimiser has
    require_room(method, (run_samples(splits), *splits.train.shape), device)
    network = compiled_network(model, method) if config.compile else model
    precision = config.attack_precision or config.train_precision
    for each in (config.train_precision, precision):
        warn_if_slow(each, device)
    execution = Execution(precision, cuda_graphs=config.cuda_graphs == "attack")
    return Run(
        config=config,
        method=method,
        model=model,
        network=network,
        execution=execution,
        optimizer=optimizer,
        batches=batches,
        splits=splits,
        device=device,
        folder=folder,
        arch=arch,
        total_steps=config.epochs * len(batches),
        average=averaging.make(config, model),
        validation=validation,
    )


def batches_of(config: TrainConfig, splits: DataSplits, device: torch.device) -> Batches:
    """What is trained on. A smaller last batch is left out, unless there is no other."""
    how: dict[str, Any] = {
        "shuffle": True,
        "seed": config.seed,
        "augment": config.augment and not methods.get(config.method).augments,
        "device": device,
        "channels_last": config.channels_last,
        "drop_last": len(splits.train) >= config.batch_size,
        "place": processes.place(),
    }
    if isinstance(splits.train, Pictures):
        crop = require_streamable(config, splits)
        return Streamed(splits.train, config.batch_size, crop=crop, workers=config.workers, **how)
    if config.crop == "resized":
        raise ValueError(
            "crop: 'resized' cuts pictures as they lie in their files, which only those do that stream: set "
            "stream=True (dataset folder), or crop='shift'"
        )
    return Batches(splits.train, config.batch_size, extra=splits.extra, extra_share=config.extra_share, **how)


def require_streamable(config: TrainConfig, splits: DataSplits) -> Crop:
    """How pictures that stream are cropped. Raises ValueError for what cannot be had with them."""
    if splits.extra is not None:
        raise ValueError(
            "extra_data: extra images are for data sets that are kept in memory: leave them out, or set stream=False"
        )
    crop = config.crop or ("resized" if min(splits.train.shape[1:]) >= RESIZED else "shift")
    if config.augment and crop == "resized" and methods.get(config.method).augments:
        raise ValueError(
            f"crop: {config.method} shifts the images itself, with what it keeps of them: set crop='shift', or "
            "augment=False"
        )
    return crop


def run_samples(splits: DataSplits) -> int:
    return len(splits.train) + (0 if splits.extra is None else len(splits.extra))


def network_of(config: TrainConfig, splits: DataSplits) -> nn.Module:
    """The network that the configuration names, with weights that torch's generator draws."""
    return models.network(
        config.model,
        normalize=(config.mean, config.std) if config.mean else None if config.mean is None else False,
        activation=config.activation,
        num_classes=splits.num_classes,
        in_channels=splits.train.shape[0],
        width=config.width,
    )


def require_trainable(config: TrainConfig, model: nn.Module) -> tuple[Method, torch.optim.Optimizer]:
    """The method and the optimiser. Raises ValueError where the method cannot have the network, on its device, or what
    the settings of speed ask for."""
    if not any(p.requires_grad for p in model.parameters()):
        name = without_place(config.model) if config.model else type(model).__name__
        raise ValueError(
            f"model {plain(name)} has no parameter that requires grad, so nothing can be trained: call "
            ".requires_grad_() of what is to be trained"
        )
    method = config.build_method()
    method.require(model)
    if config.compile:
        require_compilable(method)
    if config.checkpoint_activations:
        require_recomputable(method, model)
    optimizer = optimizers.make(config, model)
    if config.cuda_graphs == "step":
        require_recordable(method, optimizer, config.on_nonfinite)
    return method, optimizer


def require_shareable(config: TrainConfig, method: Method, device: torch.device) -> None:
    """Raises ValueError where several processes cannot train together so."""
    if processes.count() == 1:
        return
    if config.cuda_graphs == "step":
        raise ValueError(
            "cuda_graphs='step' cannot be had with several processes, whose steps wait for each other: set "
            "cuda_graphs='attack'"
        )
    if not config.sync_batchnorm:
        return
    if device.type != "cuda":
        raise ValueError(
            "sync_batchnorm needs GPUs: torch's SyncBatchNorm has no form for CPUs, whose processes meet by gloo; set "
            "sync_batchnorm=False, and each process normalises by its own rows"
        )
    graphs = "cuda_graphs='attack', whose graphs would wait for other processes"
    if why := method.no_sync or (graphs if config.cuda_graphs == "attack" else ""):
        raise ValueError(f"sync_batchnorm cannot be had with {why}: set sync_batchnorm=False")


def require_recomputable(method: Method, model: nn.Module) -> None:
    """Raises ValueError where ``checkpoint_activations`` cannot be had."""
    if not method.recomputable:
        raise ValueError(
            f"checkpoint_activations: {method.name} looks into the network while it runs, so its forwards cannot be "
            "run again in the backward; set checkpoint_activations=False"
        )
    blocks(model)
