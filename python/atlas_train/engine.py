"""The training loop: batches -> method.loss -> backward -> optimiser. It knows no method by name."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, data, models, progress
from .arrivals import Arrivals
from .config import TrainConfig
from .data import DataSplits, identity
from .folders import LOCK, locked, made
from .interrupts import terminable
from .methods import Batch, Metrics, State
from .noise import noise_keys
from .options import plain, shown
from .report import TensorBoard
from .resuming import as_normalized, require_network, restore
from .run import Run, discard, export, on_host, prepare, save
from .schedules import learning_rate
from .step_graph import StepGraph
from .watch import watch

OnEpoch = Callable[[dict[str, Any]], bool | None]
TrainStep = Callable[[nn.Module, Batch, Tensor, State, "OptimizerSteps"], tuple[Tensor, Metrics]]
#: Steps that the CPU may be ahead of the last loss it has looked at: enough to keep CUDA's queue full.
LAG = 2


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite at ``step``, for the images ``ids``; ``checkpoint`` is the state from before."""

    def __init__(self, step: int, ids: Tensor, metrics: dict[str, float], saved: Path | None) -> None:
        self.step, self.ids, self.checkpoint = step, ids.tolist(), saved
        shown = ", ".join(str(i) for i in self.ids[:8]) + (", ..." if len(self.ids) > 8 else "")
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        kept = f"the state from before is in {saved}" if saved else "no checkpoint was asked for"
        super().__init__(
            f"the loss is not finite at step {step} ({values}); training images {shown}; {kept}. "
            "Try a smaller lr or weights of the terms, or train_precision fp32"
        )


class NonFiniteWeights(NonFiniteLoss):
    """Every loss was finite, and the last update of an epoch left NaN or infinity in ``names`` of the network."""

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        self.step, self.ids, self.checkpoint = run.step, [], run.folder / checkpoint.LAST if run.folder else None
        kept = f"the state from before is in {self.checkpoint}" if run.folder else "no checkpoint was asked for"
        RuntimeError.__init__(
            self,
            f"the network holds NaN or infinity after epoch {run.epoch}, in {plain(names[0])} for one; {kept}. "
            "Try a smaller lr or weights of the terms, or train_precision fp32",
        )


def train(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    model: nn.Module | None = None,
    folder: str | os.PathLike[str] | None = None,
    display: progress.Display | None = None,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Trains one method (``config.beside`` is for ``compare``) and hands the finished run back.

    Args:
        config: the settings; with ``config.resume`` the run in that checkpoint goes on, to the same bits as if it had
            never stopped, if settings, machine and thread count are the same.
        splits: data of your own, by whose name the run is then known; default: ``config.dataset``. ``stored`` has what
            resumes and evaluates such a run.
        model: a network of your own, images in [0, 1] -> logits; default: ``config.model``.
        folder: where last.pt, log.csv and the weights go; default: the resumed run's, or none at all. An
            empty one stays empty where the run fails in its first epoch, but for a loss that is not finite.
        display: told of the progress; default: nothing is printed.
        on_epoch: called with each epoch's numbers; returning True ends the training there.

    Raises NonFiniteLoss when the loss is NaN or infinite (with ``on_nonfinite="skip"``: for every batch of an epoch),
    ValueError for a checkpoint of another run or of other data, FileExistsError when another run writes to the folder
    or has left its checkpoint there. While it lasts, SIGTERM and SIGHUP raise SystemExit, if they would have ended the
    process without one.
    """
    _require_arguments(config, splits, model)
    display = display or progress.Silent()
    resumed = checkpoint.locate(config.resume).parent if config.resume else None
    folder = resumed if folder is None else Path(folder)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        stack.enter_context(torch.inference_mode(False))  # also of a notebook in which gradients are off
        stack.enter_context(torch.enable_grad())
        if folder:
            stack.enter_context(made(folder))
            stack.enter_context(locked(folder))
            _require_free(folder, resumed)
        empty = folder is not None and {path.name for path in folder.iterdir()} == {LOCK}
        run, notes = start(config, splits, model, folder)
        try:
            _train(run, notes, display, on_epoch)
        except Exception as error:
            if folder and empty and run.epoch == 0 and not isinstance(error, NonFiniteLoss):
                discard(folder)
            if run.step == 0 and not isinstance(error, NonFiniteLoss):  # say so if it is the network that cannot run
                few = run.splits.train.images[:2].to(run.device).float() / 255
                models.require_usable(run.model, run.arch["name"], few, run.splits.num_classes)
            raise
    return run


def _require_arguments(config: object, splits: object, model: object) -> None:
    """Raises ValueError for what is of another type than ``train`` says."""
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config must be a TrainConfig, got {shown(config)}")
    if splits is not None and not isinstance(splits, DataSplits):
        raise ValueError(f"splits must be a DataSplits (atlas_train.data), got {type(splits).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        remedy = "; give an instance: call it first" if callable(model) else "; a name goes into config.model"
        raise ValueError(f"model must be a torch.nn.Module, got {shown(model)}{remedy}")


def _require_free(folder: Path, resumed: Path | None) -> None:
    """Raises FileExistsError if another run's checkpoint is there."""
    if (folder / checkpoint.LAST).exists() and not (resumed and resumed.resolve() == folder.resolve()):
        raise FileExistsError(
            f"folder {plain(folder)} already holds a run: go on with it (resume {plain(folder)}) or choose another"
        )


def _train(run: Run, notes: Sequence[str], display: progress.Display, on_epoch: OnEpoch | None) -> None:
    c = run.config
    left_out = checkpoint.require_exportable(run.model) if run.folder else None
    if not c.resume and run.folder:
        save(run)  # so that there is a state from before, whatever happens
    board = TensorBoard(run.folder) if c.tensorboard else None
    parameters = sum(p.numel() for p in run.model.parameters())
    size, network = len(run.splits.train), run.arch["name"]
    title = progress.headline(c.label, run.splits.name, size, network, parameters, c.eps, c.device)
    display.start(title, run.total_steps)
    try:
        for note in (*notes, *([left_out] if left_out else [])):
            display.say(note)
        with on_host(c.threads):
            fit(run, display, board, on_epoch)
        if run.skipped:
            display.say(f"{run.skipped} of {run.step} batches were skipped: their loss was not finite")
    finally:
        display.stop()
        if board:
            board.close()
    if run.folder:
        export(run)


def start(
    config: TrainConfig, splits: DataSplits | None, model: nn.Module | None, folder: Path | None
) -> tuple[Run, list[str]]:
    """The run before its first step, or where its checkpoint left off; and what the user should know of it."""
    if not config.resume:
        splits = splits or load_splits(config)
        run = prepare(config, splits, model, folder)
        run.data = identity.record(splits) if folder else {}
        return run, []
    source = checkpoint.locate(config.resume)
    state = checkpoint.load(source, ("arch", "config"))
    require_network(state, model, config.model, source)
    checkpoint.require_resumable(state, source)
    config = as_normalized(config, state)
    splits = splits or load_splits(config, state, source)
    images = identity.record(splits)
    notes = identity.require_same(state, images, source, "resume")
    run = prepare(config, splits, model, folder)
    run.data = images
    return run, notes + restore(run, state, source)


def load_splits(
    config: TrainConfig,
    state: Mapping[str, Any] | None = None,
    source: object = None,
    function: str = "resume",
) -> DataSplits:
    """The data that ``config.dataset`` names; for a run that goes on, those by the loader that its checkpoint names.

    function: of ``stored``, which takes data of the user's own.
    """
    name = config.dataset
    if state and name == state.get("data", {}).get("name"):
        name = identity.loader(state, source, function)
    return data.load(name, config.data_dir, config.download)


def fit(run: Run, display: progress.Display, board: TensorBoard | None, on_epoch: OnEpoch | None) -> None:
    """Epoch after epoch, each with its look back, its checkpoint and its line in the logs."""
    step = train_step(run, display)
    masks = checkpoint.not_finite(run.model)
    while run.epoch < run.config.epochs:
        row = train_epoch(run, display, step)
        if broken := checkpoint.not_finite(run.model) - masks:
            raise NonFiniteWeights(run, sorted(broken))
        if run.average:
            run.average.after_epoch(run.model, run.epoch)
        watch(run, row, display)
        run.history.append({name: value for name, value in row.items() if name not in ("epochs", "eta")})
        if run.folder:
            save(run)
        if board:
            board.write(row)
        if on_epoch and on_epoch(row):
            return


def train_step(run: Run, display: progress.Display) -> TrainStep:
    """What trains on a batch: the method itself, or graphs of its step."""
    if run.config.cuda_graphs == "step":
        return StepGraph(run.method, run.optimizer, display.say)
    return run.method.train_step


def train_epoch(run: Run, display: progress.Display, train_step: TrainStep) -> dict[str, Any]:
    """One pass over the data; returns the epoch's numbers (means over its steps)."""
    config, device = run.config, run.device
    run.batches.set_epoch(run.epoch)
    run.model.train()
    keys = noise_keys(config.seed, run.step, len(run.batches)).to(device)
    steps: list[dict[str, Tensor]] = []
    descent = OptimizerSteps(run)
    started, images = time.perf_counter(), 0
    for batch, key in zip(run.batches, keys, strict=True):
        descent.start(batch)
        try:
            with run.training():
                loss, metrics = train_step(run.network, batch, key, run.state, descent)
            steps.append({"loss": loss, **metrics})
            if run.average:
                run.average.after_batch(run.model)
        except NonFiniteLoss:
            if config.on_nonfinite == "stop" or descent.skipped + 1 == len(keys):
                raise
            descent.undo()
        run.step += 1
        images += len(batch.y)
        if display.wants_step() and steps:
            seconds = time.perf_counter() - started
            display.step(_row(run, run.epoch + 1, steps[-1:], descent, images / seconds, run.seconds + seconds))
    descent.finish()
    seconds = time.perf_counter() - started
    run.epoch += 1
    run.seconds += seconds
    return _row(run, run.epoch, steps, descent, images / seconds, run.seconds)


class OptimizerSteps:
    """The ``Descent`` that methods are given: backward, outside autocast, and steps at the schedule's rate.

    A loss that is not finite stops the run, or leaves the batch out, before it reaches the weights. On CUDA a loss that
    would stop the run is looked at when it has arrived, at the latest ``LAG`` steps later, so that nothing waits for
    the device; the checkpoint is from before in any case.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.lr, self.skipped = run, 0.0, 0
        self._skips = run.config.on_nonfinite == "skip"
        self._losses = Arrivals(self._look, LAG if run.device.type == "cuda" and not self._skips else 0)

    def start(self, batch: Batch) -> None:
        """A new batch: no gradients, no updates yet."""
        self._batch, self._update = batch, 0
        self._buffers = [buffer.clone() for buffer in self.run.model.buffers()] if self._skips else []
        self.run.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        self.look_at(loss, metrics)
        with torch.autocast(self.run.device.type, enabled=False):
            loss.backward()

    def look_at(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        """Has the loss of this batch checked; ``metrics`` explain it if it is not finite."""
        self._losses.add(self.run.step, loss.detach(), (self._batch, metrics or {}))

    def rate(self) -> float:
        """The learning rate of the batch's next update, which is then the optimiser's."""
        run = self.run
        update = run.step * run.method.updates + self._update
        total = run.total_steps * run.method.updates
        self.lr = learning_rate(run.config.schedule, run.config.lr, update, total, run.config.cyclic_peak)
        for group in run.optimizer.param_groups:
            group["lr"] = self.lr
        self._update += 1
        return self.lr

    def step(self) -> None:
        self.rate()
        self.run.optimizer.step()
        self.run.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a method that goes on with this batch must not see the old weights in 16 bits

    @torch.no_grad()
    def undo(self) -> None:
        """The batch is left out: BatchNorm's statistics are as before it."""
        self.skipped += 1
        for buffer, before in zip(self.run.model.buffers(), self._buffers, strict=True):
            buffer.copy_(before)

    def finish(self) -> None:
        """The end of an epoch: every loss has been looked at."""
        self._losses.finish()

    def _look(self, step: int, loss: Tensor, about: tuple[Batch, Mapping[str, Tensor]]) -> None:
        batch, metrics = about
        require_finite(self.run, step, batch, {"loss": loss, **metrics})


def require_finite(run: Run, step: int, batch: Batch, metrics: dict[str, Tensor]) -> None:
    """Stops the run if this step's loss is NaN or infinite."""
    if not math.isfinite(metrics["loss"].item()):
        values = {name: value.item() for name, value in metrics.items()}
        raise NonFiniteLoss(step, batch.ids, values, run.folder / checkpoint.LAST if run.folder else None)


def _row(
    run: Run,
    epoch: int,
    steps: Sequence[dict[str, Tensor]],
    descent: OptimizerSteps,
    images_per_s: float,
    seconds: float,
) -> dict[str, Any]:
    """The numbers of a step or an epoch; the one place that waits for the device."""
    names = list(steps[0])
    means = torch.stack([torch.stack([step[name].float() for step in steps]).mean() for name in names]).tolist()
    return {
        "epoch": epoch,
        "epochs": run.config.epochs,
        "step": run.step,
        "lr": descent.lr,
        **dict(zip(names, means, strict=True)),
        **({"skipped": descent.skipped} if run.config.on_nonfinite == "skip" else {}),
        "images_per_s": images_per_s,
        "seconds": seconds,
        "eta": seconds / run.step * (run.total_steps - run.step),
    }
