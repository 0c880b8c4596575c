"""What a run does once and for all, done before its first step: a clock that starts then measures training alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice, repeat

import torch

from . import optimizers
from .compiled_step import TrainStep, put_back_later
from .data import Batch, Images
from .descent import OptimizerDescent
from .noise import noise_keys
from .run import Run, batches_of

#: Enough for steps that take turns by twos: one of each is eager and compiles, one is recorded, one is a replay.
STEPS = 6


def warm_up(run: Run, train_step: TrainStep) -> None:
    """Trains on ``STEPS`` batches of random images and labels, and puts back all that this has moved: weights and
    statistics, optimiser, average, what the method remembers, random state. What follows is the same to the bit (with
    dropout and graphs as ``StepGraph`` says).

    So code is compiled, cuDNN has chosen its algorithms, and the graphs of ``train_step`` are recorded; it must be the
    one that trains afterwards (``engine.train`` gives it to ``on_start``). Validation, probe and ``average_bn`` are not
    warmed up. Nor is a graph that only a later epoch needs.
    """
    put_back = _put_back_later(run)
    try:
        run.model.train()
        keys = noise_keys(run.config.seed, run.step, STEPS).to(run.device)
        for number, (batch, key) in enumerate(zip(_random_batches(run), keys, strict=True)):
            descent = OptimizerDescent(run.optimizer, run.rate, deal=batch.deal)
            optimizers.set_momentum(run.optimizer, run.momentum)
            with run.training():
                train_step(run.network, batch, key, replace(run.state, step=run.step + number), descent)
            if run.average:
                run.average.after_batch(run.model)
    finally:
        put_back()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)


def _random_batches(run: Run) -> Iterator[Batch]:
    """As many, and of the kind that the run's own are."""
    rng = torch.Generator().manual_seed(run.config.seed)
    count = min(len(run.splits.train), STEPS * run.config.batch_size)
    pixels = torch.randint(256, (count, *run.splits.train.shape), generator=rng, dtype=torch.uint8)
    images = Images(pixels, torch.randint(run.splits.num_classes, (count,), generator=rng))
    extra = None if run.splits.extra is None else images
    batches = batches_of(run.config, replace(run.splits, train=images, extra=extra), run.device)
    return islice(chain.from_iterable(repeat(batches)), STEPS)  # a set may have fewer


def _put_back_later(run: Run) -> Callable[[], None]:
    """Gives what puts the run back as it is now."""
    undo = put_back_later(run, torch.arange(run.samples, device=run.device))
    optimizer = optimizers.put_back_later(run.optimizer)
    weights = [(weight, weight.detach().clone()) for weight in run.model.parameters()]
    average = copy.deepcopy(run.average.state_dict()) if run.average else None

    def put_back() -> None:
        undo()
        optimizer()
        with torch.no_grad():
            for weight, value in weights:
                weight.copy_(value)
        if run.average:
            run.average.load_state_dict(average, "the run itself")

    return put_back
