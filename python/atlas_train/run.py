"""A training run: what it is made of, and how it is written to its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atlas_kernels import Execution, keep_memory
from atlas_kernels.checks import whole

from . import answers, averaging, checkpoint, data, models
from .config import MOST_THREADS, TrainConfig, recorded, resolved
from .data import Batches, DataSplits
from .imported import without_place
from .methods import Method, State
from .options import one_line, plain, shown
from .recompute import Recomputed, blocks
from .report import write_csv
from .step_graph import require_recordable
from .writing import builtin

LOG = "log.csv"


@dataclass
class Run:
    """A training run under way or done: what a checkpoint keeps, and what the loop needs beside it.

    network: what methods are given, ``model`` or its compiled form. execution: how attacks are run. data: the record
    of its images (``data.identity``). changes: settings that a resumed run has changed, each with its epoch.
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
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    average: averaging.Averaging | None = None
    data: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def final_model(self) -> nn.Module:
        """What training came to: the average of the weights where there is one, else the network itself."""
        average = self.average.network() if self.average else None
        return self.model if average is None else average

    @property
    def answers(self) -> list[list[float]] | None:
        """What a network of the user's own says to fixed images; one of ours is known by its name."""
        ours = self.arch["by_name"] and not models.is_import_path(self.arch["name"])
        return None if ours else answers.answers(self.final_model, self.splits.train.shape)

    @property
    def hyper(self) -> dict[str, Any]:
        """The method's hyper-parameters as used."""
        return self.method.in_use()

    @property
    def total_steps(self) -> int:
        return self.config.epochs * len(self.batches)

    @property
    def skipped(self) -> int:
        """Batches left out so far, for their loss was not finite."""
        return sum(row.get("skipped", 0) for row in self.history)

    @property
    def state(self) -> State:
        """What a method may know of the run."""
        return State(self.step, self.total_steps, self.epoch, self.config.epochs, len(self.splits.train), self.memory)

    @contextmanager
    def training(self) -> Iterator[None]:
        """How the forwards and backwards of a step are run: its attacks, and the rest."""
        with autocast(self.config.train_precision, self.device), self.execution, self.recomputed(self.model):
            yield

    def recomputed(self, model: nn.Module) -> AbstractContextManager[None]:
        """In which training forwards of ``model`` keep what the settings say."""
        return Recomputed(model) if self.config.checkpoint_activations else nullcontext()


def prepare(config: TrainConfig, splits: DataSplits | None, model: nn.Module | None, folder: Path | None) -> Run:
    """Data, network, optimiser and method as the configuration says, before the first step."""
    splits = splits or data.load(config.dataset, config.data_dir, config.download)
    config = resolved(config, splits, own_model=model is not None)
    if folder is None and config.resume:
        folder = checkpoint.locate(config.resume).parent
    device = usable_device(config.device)
    if config.train_size is not None:
        splits = replace(splits, train=splits.train.subset(config.train_size, config.seed))
    arch: dict[str, Any] = {
        "name": without_place(config.model) if model is None else type(model).__name__,
        "by_name": model is None,
        "num_classes": splits.num_classes,
        "in_channels": splits.train.shape[0],
        "width": config.width,
    }
    torch.manual_seed(config.seed)
    if model is None:
        normalize = (config.mean, config.std) if config.mean else None
        sizes = {name: arch[name] for name in ("num_classes", "in_channels", "width")}
        model = models.network(config.model, normalize=normalize, **sizes)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"model {plain(arch['name'])} has no parameter that requires grad, so nothing can be trained: call "
            ".requires_grad_() of what is to be trained"
        )
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(
        splits.train,
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        augment=config.augment,
        device=device,
        channels_last=config.channels_last,
        drop_last=len(splits.train) >= config.batch_size,
    )
    if arch["by_name"]:
        few = splits.train.images[:2].to(device).float() / 255
        models.require_usable(model, arch["name"], few, splits.num_classes)
    method = config.build_method()
    method.require(model)
    if config.checkpoint_activations:
        require_recomputable(method, model)
    if config.cuda_graphs == "step":
        require_recordable(method, config.on_nonfinite)
    network = cast(nn.Module, torch.compile(model)) if config.compile else model
    optimizer = _optimizer(config, model)
    run = Run(config, method, model, network, _execution(config), optimizer, batches, splits, device, folder, arch)
    run.average = averaging.make(config, model)
    return run


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one. Raises ValueError for a CUDA device that is not there."""
    known = "write cpu, cuda or cuda:N"
    try:
        device = torch.device(name.lower() if name else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:  # with a list of all that torch has a word for
        raise ValueError(f"device {shown(name)} cannot be used: {known}") from error
    try:
        if device.type != "cuda":
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {shown(name)} cannot be used ({one_line(error)}): {known}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {shown(name)} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def require_recomputable(method: Method, model: nn.Module) -> None:
    """Raises ValueError where ``checkpoint_activations`` cannot be had."""
    if not method.recomputable:
        raise ValueError(
            f"checkpoint_activations: {method.name} looks into the network while it runs, so its forwards cannot be "
            "run again in the backward; set checkpoint_activations=False"
        )
    blocks(model)


def _execution(config: TrainConfig) -> Execution:
    precision = config.attack_precision or config.train_precision
    return Execution(precision, fold_batchnorm=config.fold_batchnorm, cuda_graphs=config.cuda_graphs == "attack")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The network in "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)


@contextmanager
def on_host(threads: int | None) -> Iterator[None]:
    """torch with so many CPU threads (None: as it is) and with freed memory kept, and then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else whole("threads", threads, 1, MOST_THREADS))
    try:
        with keep_memory():
            yield
    finally:
        torch.set_num_threads(before)


def save(run: Run) -> None:
    """last.pt and log.csv in the run's folder."""
    assert run.folder
    state = {
        "config": recorded(run.config),
        "data": run.data,
        "hyper": run.hyper,
        "changes": run.changes,
        "versions": checkpoint.versions(),
        "arch": run.arch,
        "answers": run.answers,
        "epoch": run.epoch,
        "step": run.step,
        "seconds": run.seconds,
        "history": run.history,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "memory": run.memory,
        "average": run.average and run.average.state_dict(),
        "rng": checkpoint.rng_state(),
    }
    checkpoint.save(run.folder / checkpoint.LAST, state)
    write_csv(run.folder / LOG, run.history)


def discard(folder: Path) -> None:
    """Takes away what ``save`` and TensorBoard wrote, for a run of which nothing came, into an empty folder."""
    for path in (folder / checkpoint.LAST, folder / LOG, *folder.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)


def export(run: Run) -> Path:
    """The bare weights of ``final_model``, for others to load; returns the file."""
    assert run.folder
    path = run.folder / checkpoint.export_name()
    own = {"arch": run.arch, "config": recorded(run.config), "data": run.data, "answers": run.answers}
    description = json.dumps(builtin(own))
    checkpoint.export_state_dict(run.final_model, path, {"atlas": description, "format": "pt"})
    return path
