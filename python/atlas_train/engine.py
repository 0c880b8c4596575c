"""The training loop: batches -> method.loss -> backward -> optimiser. It knows no method by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import average_bn, checkpoint, data, methods, models, optimizers, processes, progress, rescue
from .compiled_step import CompiledStep, TrainStep
from .config import PLACES, TrainConfig, recorded
from .data import Batch, DataSplits, identity
from .descent import OptimizerDescent
from .folders import LOCK, locked, made
from .interrupts import terminable
from .machine import cudnn_benchmark, on_host
from .midway import Midway
from .noise import noise_keys
from .nonfinite import LeftOut, Losses, NonFiniteLoss, NonFiniteWeights
from .options import Switches, in_words, plain, radius, shown, switched_off
from .peak_memory import watched
from .remembered import require_room
from .report import TensorBoard
from .rescue import Collapsed
from .run import Run, prepare
from .saving import as_normalized, discard, export, require_disk, require_network, restore, save
from .schedules import eps_share
from .segment import Segment
from .step_graph import StepGraph
from .validation import better
from .watch import ADVICE, collapse, watch
from .within import Within

OnEpoch = Callable[[dict[str, Any]], bool | None]
OnStart = Callable[[Run, TrainStep], object]


def train(
    config: TrainConfig,
    *,
    splits: DataSplits | None = None,
    model: nn.Module | None = None,
    folder: str | os.PathLike[str] | None = None,
    display: progress.Display | None = None,
    on_epoch: OnEpoch | None = None,
    on_start: OnStart | None = None,
) -> Run:
    """Trains one method (``config.beside`` is for ``compare``) and hands the finished run back.

    Args:
        config: the settings; with ``config.resume`` the run in that checkpoint goes on, to the same bits as if it had
            never stopped, if settings, machine and thread count are the same; on CUDA to rounding, unless
            ``torch.use_deterministic_algorithms`` says otherwise.
        splits: data of your own, by whose name the run is then known; default: ``config.dataset``. ``stored`` has what
            resumes and evaluates such a run.
        model: a network of your own, images in [0, 1] -> logits; default: ``config.model``.
        folder: where last.pt, best.pt, log.csv and the weights go; default: the resumed run's, or none at all. An
            empty one stays empty where the run fails in its first epoch, but for a loss that is not finite.
        display: told of the progress; default: nothing is printed.
        on_epoch: called with each epoch's numbers; returning True ends the training there.
        on_start: called with the run and its training step before the first batch: ``warm_up.warm_up``, say.

    Raises NonFiniteLoss when the loss is NaN or infinite (with ``on_nonfinite="skip"``: for every batch of an epoch),
    ValueError for a checkpoint of another run or of other data, FileExistsError when another run writes to the folder
    or has left its checkpoint there. While it lasts, SIGTERM and SIGHUP raise SystemExit, if they would have ended the
    process without one.
    """
    _require_arguments(config, splits, model)
    display = display if display and processes.is_first() else progress.Silent()
    resumed = checkpoint.locate(config.resume).parent if config.resume else None
    folder = resumed if folder is None else Path(folder)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        stack.enter_context(processes.losses_said())
        stack.enter_context(torch.inference_mode(False))  # also of a notebook in which gradients are off
        stack.enter_context(torch.enable_grad())
        if folder:
            processes.of_first(partial(_enter, stack, folder, resumed))
        empty = folder is not None and processes.is_first() and {path.name for path in folder.iterdir()} == {LOCK}
        run, notes = start(config, splits, model, folder)
        try:
            _train(run, notes, display, on_epoch, on_start)
        except Exception as error:
            if folder and empty and run.epoch == 0 and not (run.within.saved or isinstance(error, NonFiniteLoss)):
                discard(folder)
            if run.step == 0 and not isinstance(error, NonFiniteLoss):  # say so if it is the network that cannot run
                few = run.splits.train.first(2).to(run.device).float() / 255
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


def _enter(stack: ExitStack, folder: Path, resumed: Path | None) -> None:
    """Makes the folder this run's until the stack ends."""
    stack.enter_context(made(folder))
    stack.enter_context(locked(folder))
    _require_free(folder, resumed)


def _require_free(folder: Path, resumed: Path | None) -> None:
    """Raises FileExistsError if another run's checkpoint is there."""
    if (folder / checkpoint.LAST).exists() and not (resumed and resumed.resolve() == folder.resolve()):
        raise FileExistsError(
            f"folder {plain(folder)} already holds a run: go on with it (resume {plain(folder)}) or choose another"
        )


def _train(
    run: Run, notes: Sequence[str], display: progress.Display, on_epoch: OnEpoch | None, on_start: OnStart | None
) -> None:
    c = run.config
    left_out = checkpoint.require_exportable(run.model) if run.folder else None
    if not c.resume and run.folder:
        save(run)  # so that there is a state from before, whatever happens
    if run.folder and (run.folder / checkpoint.LAST).exists():
        require_disk(run)
    board = TensorBoard(run.folder) if c.tensorboard and processes.is_first() else None
    parameters = sum(p.numel() for p in run.model.parameters())
    size, network = len(run.splits.train), run.arch["name"]
    where = c.device if c.train_precision == "fp32" else f"{c.device} in {c.train_precision}"
    where += f", {many} processes" if (many := processes.count()) > 1 else ""
    title = progress.headline(c.label, run.splits.name, size, network, parameters, radius(c.eps, c.norm), where)
    display.start(title, run.total_steps)
    try:
        for note in (*notes, *([left_out] if left_out else []), *_without_effect(run)):
            display.say(note)
        with on_host(c.threads), cudnn_benchmark(c.cudnn_benchmark):
            fit(run, display, board, on_epoch, on_start)
        if run.average and (unbegun := run.average.unbegun(run.epoch)):
            display.say(unbegun)
        if run.skipped:
            display.say(f"{run.skipped} of {run.step} batches were skipped: their loss was not finite")
    finally:
        run.batches.close()
        display.stop()
        if board:
            board.close()
    if run.folder and processes.is_first():
        export(run)


#: Of the configuration; those of hyper-parameters are ``Method.switches``.
_SWITCHES: Switches = {
    "extra_share": [("extra_data", (None,))],
    "ema_decay": [("averaging", ("none", "swa"))],
    "swa_start": [("averaging", ("none", "ema"))],
    "average_bn": [("averaging", ("none",))],
    "best_of": [("averaging", ("none",))],
    "momentum": [("optimizer", ("adam",))],
    "momentum_low": [("optimizer", ("adam",))],
    "decay_norms": [("weight_decay", (0,))],
    "schedule_step": [("schedule", ("constant",))],
    "mix_steps": [("mix_share", (0,))],
    "crop": [("augment", (False,))],
    "awp_warmup": [("awp", (0,))],
    "autoattack_version": [("autoattack", (0,))],
    "on_compile_error": [("compile", (False,))],
}


def _without_effect(run: Run) -> list[str]:
    """What was asked for and will change little or nothing."""
    notes = run.average.notes(run.total_steps) if run.average else []
    c, hyper = run.config, run.config.hyper_of(run.config.method)
    method = methods.build(c.method, c.eps, hyper, norm=c.norm)
    given = vars(c) | {name: getattr(method, name) for name in hyper}
    default = {field.name: field.default for field in (*fields(method), *fields(c))}
    resident = {} if run.batches.streams else {"workers": "the images are kept in memory"}
    for name, why in (switched_off(_SWITCHES, vars(c)) | method.without_effect() | resident).items():
        if name in given and given[name] not in (None, default[name]):
            notes.append(f"WARNING: {name}={in_words(given[name])} changes nothing, as {why}")
    if run.config.sync_batchnorm and processes.count() == 1:
        notes.append("WARNING: sync_batchnorm changes nothing, as there is one process: start several by torchrun")
    if run.config.mix_share and run.method.in_use().get("steps", 1) == run.config.mix_steps:
        notes.append(
            f"WARNING: mix_steps={run.config.mix_steps} is the number of attack steps of {run.config.method} anyway, "
            "so nothing is mixed: set another number, or mix_share=0"
        )
    return notes


def start(
    config: TrainConfig, splits: DataSplits | None, model: nn.Module | None, folder: Path | None
) -> tuple[Run, list[str]]:
    """The run before its first step, or where its checkpoint left off; and what the user should know of it."""
    if not config.resume:
        splits = data.with_extra(splits or load_splits(config), config.extra_data)
        run = prepare(config, splits, model, folder)
        rescue.require_possible(run.config, folder is not None)
        run.data = identity.record(splits) if folder or processes.count() > 1 else {}
        _require_alike(run)
        processes.make_alike(run.model)
        return run, [*splits.notes, *_beginnings(run)]
    source = checkpoint.locate(config.resume)
    state = checkpoint.load(source, ("arch", "config"))
    require_network(state, model, config.model, source)
    checkpoint.require_resumable(state, source)
    config = as_normalized(rescue.as_left(config, state), state)
    splits = data.with_extra(splits or load_splits(config, state, source), config.extra_data)
    images = identity.record(splits)
    notes = identity.require_same(state, images, source, "resume")
    run = prepare(config, splits, model, folder)
    rescue.require_possible(run.config, folder is not None)
    run.data = images
    _require_alike(run)
    notes = [*splits.notes, *notes, *restore(run, state, source)]
    if processes.count() > 1:
        where = {"epoch": run.epoch, "step": run.step, "weights": checkpoint.fingerprint(run.model)}
        processes.require_same("checkpoint", where)
    return run, [*splits.notes, *notes]


def _require_alike(run: Run) -> None:
    """Raises ValueError where another process has other settings, data or another network."""
    if processes.count() == 1:
        return
    processes.require_same("settings", {k: v for k, v in recorded(run.config).items() if k not in PLACES})
    processes.require_same("data", run.data)
    shapes = {name: list(value.shape) for name, value in run.model.named_parameters()}
    processes.require_same("weights in its network", shapes)


def _beginnings(run: Run) -> list[str]:
    """What the user should know of a run that begins."""
    config, extra = run.config, run.splits.extra
    share = f"{config.extra_share:.0%} of every batch from {0 if extra is None else len(extra):,} extra images"
    init = f"begins with the weights of {plain(config.init)}"
    kept = require_room(run.method, (run.samples, *run.splits.train.shape), run.device)
    recipe = f"settings that you did not give are those of {data.declared(run.splits).like}"
    own = run.splits.loader in data.FORMS
    pairs = ((recipe, own), (init, config.init), (share, extra is not None), (kept, kept))
    return [text for text, said in pairs if said]


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
    pictures = {key: getattr(config, key) for key in data.READING}
    if config.download and processes.count() > 1:  # by one of them
        processes.of_first(lambda: data.load(name, config.data_dir, True, **pictures).name)
    return data.load(name, config.data_dir, config.download, **pictures)


def fit(
    run: Run,
    display: progress.Display,
    board: TensorBoard | None,
    on_epoch: OnEpoch | None,
    on_start: OnStart | None = None,
) -> None:
    """Epoch after epoch, each with its look back, its checkpoint and its line in the logs; a collapse may be taken
    back, or end the run."""
    step = make_train_step(run, display)
    if on_start:
        on_start(run, step)

    def told(row: dict[str, Any]) -> bool:
        return bool(on_epoch and on_epoch(row))

    run.masks = checkpoint.not_finite(run.model)
    while run.epoch < run.config.epochs and not run.ended:
        epoch = run.epoch + 1
        try:
            row, sign = processes.agreed(watched_epoch(run, display, step))
        except (Collapsed, NonFiniteLoss) as error:
            if not rescue.goes_back(run):
                raise
            collapsed = isinstance(error, Collapsed)
            sign = str(error) if collapsed else "a loss or a weight that is not finite"
            display.say(rescue.take_back(run, epoch, sign, stronger=collapsed))
            step = make_train_step(run, display)  # of the method with its new attack
            continue
        run.history.append({name: value for name, value in row.items() if name not in ("epochs", "eta")})
        if better(row, run.history[run.best - 1] if run.best else None):
            run.best, run.best_raw = run.epoch, bool(row.get("val_raw"))
        run.ended = _ended(run, sign)
        if run.ended:
            display.say(f"{run.ended}: the run ends after epoch {run.epoch} of {run.config.epochs}")
        if run.folder:
            save(run)
        if board:
            board.write(row)
        if processes.of_first(partial(told, row)):
            return


def watched_epoch(run: Run, display: progress.Display, step: TrainStep) -> tuple[dict[str, Any], str | None]:
    """An epoch and what is looked at after it: its numbers, and the sign of a collapse.

    Raises NonFiniteWeights for weights that are no longer finite, and Collapsed for a collapse if the run can go back.
    """
    with watched(run):
        row = train_epoch(run, display, step)
    if broken := checkpoint.not_finite(run.model) - run.masks:
        raise NonFiniteWeights(run, sorted(broken))
    if run.average:
        run.average.after_epoch(run.model, run.epoch)
        average_bn.measure(run)
    sign = watch(run, row, display)
    if sign and rescue.goes_back(run):
        raise Collapsed(sign)
    if sign:
        display.say(f"WARNING: {sign} in epoch {run.epoch}: {ADVICE}")
    if sign and run.config.on_collapse == "rollback":
        display.say("there is nothing to go back to, as no epoch before was validated: training goes on")
    return row, sign


def _ended(run: Run, sign: str | None) -> str:
    """Why the run is to end before its last epoch, if it is."""
    if run.epoch == run.config.epochs:
        return ""
    if sign and run.config.on_collapse == "stop":
        return f"training collapsed in epoch {run.epoch}"
    since, patience = run.epoch - run.best, run.config.early_stop
    late = 0 < patience <= since
    return f"validation was no better for {since} epochs than in epoch {run.best}" if late else ""


def make_train_step(run: Run, display: progress.Display) -> TrainStep:
    """What trains on a batch: the method itself, or graphs of its step; on a compiled network under its watch."""
    graphs = run.config.cuda_graphs == "step"
    plain = LeftOut(run.method) if run.config.on_nonfinite == "skip" else run.method.step
    step: TrainStep = StepGraph(run.method, run.optimizer, display.say) if graphs else plain
    return CompiledStep(run, step, display.say) if run.config.compile else step


def train_epoch(run: Run, display: progress.Display, train_step: TrainStep) -> dict[str, Any]:
    """One pass over the data, or what is left of it; returns the epoch's numbers (means over its steps).

    Raises Collapsed as soon as that shows, if the run can go back.
    """
    within = run.within
    run.batches.set_epoch(run.epoch)
    run.batches.take_wait()  # of others
    run.model.train()
    processes.seed_others(run.config.seed, run.step)
    keys = noise_keys(run.config.seed, run.step, len(run.batches) - within.batches).to(run.device)
    losses = Losses(run)
    losses.segment = segment = Segment(run)
    midway = Midway(run, losses, segment, display.say)
    with midway.ending() as whole:
        for batch, key in zip(run.batches.starting(within.batches), keys, strict=True):
            with whole:
                within.waited += run.batches.take_wait()
                segment.look(batch, key)
                _train_batch(run, train_step, batch, key, losses)
                if rescue.goes_back(run) and (sign := collapse({"segment": segment.inverted}, ())):
                    run.seconds += midway.seconds
                    raise Collapsed(sign)
                if display.wants_step() and within.steps:
                    display.step(_row(run, run.epoch + 1, within.steps[-1:], midway.seconds))
                midway.after_batch()
        losses.read()
    run.epoch += 1
    row = _row(run, run.epoch, within.steps, seconds := midway.seconds)
    run.seconds += seconds
    run.within = Within()
    return row | ({} if segment.inverted is None else {"segment": segment.inverted})


def _train_batch(run: Run, train_step: TrainStep, batch: Batch, key: Tensor, losses: Losses) -> None:
    """Trains on a batch and counts it; one whose loss is not finite is left out, if the settings say so."""
    within, skips = run.within, run.config.on_nonfinite == "skip"
    buffers = [buffer.clone() for buffer in run.model.buffers()] if skips else []
    descent = OptimizerDescent(run.optimizer, run.rate, partial(losses.add, batch.ids), batch.deal)
    optimizers.set_momentum(run.optimizer, run.momentum)
    try:
        with run.training():
            loss, metrics = train_step(run.network, batch, key, run.state, descent)
        loss, metrics = batch.deal.settled(loss, metrics, run.model)
        within.steps.append({"loss": loss, **metrics})
        if run.average:
            run.average.after_batch(run.model)
    except NonFiniteLoss:
        within.skipped += 1
        if not skips or within.skipped == len(run.batches):
            raise
        with torch.no_grad():
            for buffer, before in zip(run.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
    run.step += 1
    within.batches += 1
    within.images += batch.deal.total(batch.y)


def _row(run: Run, epoch: int, steps: Sequence[dict[str, Tensor]], seconds: float) -> dict[str, Any]:
    """The numbers of a step or an epoch; waits for the device, as only a look at the losses does besides.

    seconds: that the epoch has taken so far.
    """
    names = list(steps[0])
    means = torch.stack([torch.stack([step[name].float() for step in steps]).mean() for name in names]).tolist()
    total = run.seconds + seconds
    return {
        "epoch": epoch,
        "epochs": run.config.epochs,
        "step": run.step,
        "lr": run.optimizer.param_groups[0]["lr"],
        **({"momentum": run.optimizer.param_groups[0]["momentum"]} if run.momentum is not None else {}),
        **dict(zip(names, means, strict=True)),
        **({"eps": run.config.eps * share} if (share := eps_share(epoch, run.config.eps_warmup)) < 1 else {}),
        **({"skipped": run.within.skipped} if run.config.on_nonfinite == "skip" else {}),
        "images_per_s": run.within.images / seconds,
        **({"data_wait": run.within.waited / seconds} if run.batches.streams else {}),
        "seconds": total,
        "eta": total / run.step * (run.total_steps - run.step),
    }
