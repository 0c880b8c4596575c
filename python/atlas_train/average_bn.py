"""BatchNorm's running statistics of an average of the weights, anew from a pass over the training images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .machine import autocast
from .noise import noise_keys
from .remembered import unchanged
from .run import Run


def measure(run: Run) -> None:
    """Computes the statistics of the averaged weights as ``average_bn`` says, on images and noise of the last epoch.

    clean: forwards on the images (Izmailov et al. 2018). method: the forwards by which the method would train the
    average, attacks included. Each statistic is the mean over all forwards. Weights, memory and
    random state of the run stay as they are. The time counts as training.
    """
    network = run.average.network() if run.average else None
    how = run.config.average_bn
    if how == "average" or network is None or not _layers(network):
        return
    started = time.perf_counter()
    cuda = range(torch.cuda.device_count()) if run.device.type == "cuda" else []
    with (
        _from_nothing(network),
        torch.random.fork_rng(devices=cuda),
        autocast(run.config.train_precision, run.device),
        run.execution,
        run.recomputed(network),
    ):
        _forwards(run, network, attack=how == "method")
    if cuda:
        torch.cuda.synchronize(run.device)
    run.seconds += time.perf_counter() - started


def _forwards(run: Run, network: nn.Module, attack: bool) -> None:
    first = run.step - len(run.batches)
    run.batches.set_epoch(run.epoch - 1)
    keys = noise_keys(run.config.seed, first, len(run.batches)).to(run.device)
    for number, (batch, key) in enumerate(zip(run.batches, keys, strict=True)):
        if attack:
            state = replace(run.state, step=first + number, epoch=run.epoch - 1)
            with unchanged(run.method, run.memory, batch.deal.gathered(batch.ids)):
                run.method.loss(network, batch, key, state)
        else:
            with torch.no_grad():
                network(batch.x)
    batch.deal.settled(batch.x.new_zeros(()), {}, network)  # the means of the processes' means


def _layers(network: nn.Module) -> list[_BatchNorm]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _from_nothing(network: nn.Module) -> Iterator[None]:
    """In train mode, statistics begin anew and become the mean over the forwards."""
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in _layers(network)}
    try:
        for layer in momenta:
            layer.reset_running_stats()
            layer.momentum = None
        network.train()
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
