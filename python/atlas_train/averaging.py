"""Averages of the weights over training: EMA after every batch, SWA after every epoch of the last part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from .checkpoint import load_weights
from .config import TrainConfig
from .options import one_line, plain

#: A share of the first weights with which an EMA is no average of the run.
KEPT = 0.1


class Averaging:
    """A second network that holds the average.

    EMA (exponential moving average): d * average + (1 - d) * weights after each batch, from the weights after the first
    on. d = ``ema_decay``; with ``ema_warmup`` min(ema_decay, (1 + t) / (10 + t)) after t batches, as TensorFlow's
    ExponentialMovingAverage with num_updates: the average remembers a share of the run, about its last tenth, until
    that is as long as ``ema_decay`` says. SWA (Izmailov et al. 2018, arXiv 1803.05407): the mean of the weights at the
    end of each epoch from the share ``swa_start`` of all epochs on.

    BatchNorm's running statistics are averaged as the weights are, so that they are of what the method showed the
    network; ``average_bn.measure`` can make them anew. What holds integers, or infinities from the start (a mask), is
    copied.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        self._config = config
        self._every_batch = config.averaging == "ema"
        # Of SWA torch has another form on CUDA, which refuses BatchNorm's counters.
        means = {"multi_avg_fn": self._ema} if self._every_batch else {"avg_fn": get_swa_avg_fn()}
        self._average = AveragedModel(model, use_buffers=True, **means)
        self._first_epoch = config.swa_start * config.epochs
        self._copied = [not value.is_floating_point() or bool(value.isinf().any()) for value in _values(model)]

    def after_batch(self, model: nn.Module) -> None:
        if self._every_batch:
            self._add(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """epoch: how many are done."""
        if not self._every_batch and epoch > self._first_epoch:
            self._add(model)

    def decay(self, batches: int) -> float:
        """What the average keeps of itself where it has seen so many batches."""
        limit = (1 + batches) / (10 + batches) if self._config.ema_warmup else 1.0
        return min(self._config.ema_decay, limit)

    def notes(self, steps: int) -> list[str]:
        """What the user should know of an average over ``steps`` batches before it begins."""
        c = self._config
        if self._every_batch and (kept := math.prod(self.decay(t) for t in range(1, steps))) > KEPT:
            return [
                f"WARNING: averaging 'ema' with ema_decay {c.ema_decay:g} will hold {100 * kept:.0f} % of the weights "
                f"after the first batch at the end of {steps:,} batches: set ema_warmup, or a smaller ema_decay"
            ]
        return []

    def unbegun(self, epoch: int) -> str | None:
        """What to say where training ends after so many epochs, and there is no average yet."""
        if self._average.n_averaged:
            return None
        first = "batch 1" if self._every_batch else f"epoch {int(self._first_epoch) + 1}"
        return (
            f"WARNING: averaging {self._config.averaging!r} begins with {first}, and training ended after epoch "
            f"{epoch}: what is evaluated and exported are the weights in training. Train further"
            + ("" if self._every_batch else ", or set a smaller swa_start")
        )

    @property
    def holder(self) -> nn.Module:
        """What holds the average, begun or not."""
        return self._average.module

    def network(self) -> nn.Module | None:
        """The network with the average as its weights, or None before there is one."""
        return self._average.module if self._average.n_averaged else None

    def state_dict(self) -> dict[str, Any]:
        return {"count": int(self._average.n_averaged), "model": self._average.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None, source: object) -> None:
        """Raises ValueError, naming ``source``, for another network's average or none."""
        if state is None:
            raise ValueError(f"{plain(source)} holds no average of the weights")
        load_weights(self._average.module, state["model"], source)
        self._average.n_averaged.fill_(state["count"])

    def _ema(self, averages: Any, weights: Any, count: Any) -> None:
        get_ema_multi_avg_fn(self.decay(int(self._average.n_averaged)))(averages, weights, count)

    @torch.no_grad()
    def _add(self, model: nn.Module) -> None:
        self._average.update_parameters(model)
        values = zip(_values(self._average.module), _values(model), self._copied, strict=True)
        for average, value, copied in values:
            if copied:
                average.copy_(value)


def _values(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def make(config: TrainConfig, model: nn.Module) -> Averaging | None:
    """The averaging that the configuration asks for. Raises ValueError for a network that cannot be copied."""
    if config.averaging == "none":
        return None
    try:
        return Averaging(config, model)
    except Exception as error:  # of the network's own copying
        raise ValueError(
            f"averaging {config.averaging!r} needs a copy of the network, and copy.deepcopy of this "
            f"{type(model).__name__} fails ({one_line(error)}): give it a __deepcopy__, or set averaging to 'none'"
        ) from error
