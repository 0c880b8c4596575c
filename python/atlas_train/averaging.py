"""Averages of the weights over training: EMA after every batch, SWA after every epoch of the last part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpoint import load_weights
from .config import TrainConfig
from .options import one_line, plain


class Averaging:
    """A second network that holds the average.

    EMA (exponential moving average): decay * average + (1 - decay) * weights after each batch, from the weights after
    the first on. SWA (Izmailov et al. 2018, arXiv 1803.05407): the mean of the weights at the end of each epoch from
    the share ``swa_start`` of all epochs on.

    BatchNorm's running statistics are averaged as the weights are. A pass over the training images at the end, the
    usual alternative, would have to choose what BatchNorm sees: clean images, adversaries or both; so it sees what the
    method showed it. What holds integers, or infinities from the start (a mask), is copied.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        ema = get_ema_multi_avg_fn(config.ema_decay) if config.averaging == "ema" else None
        self._average = AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
        self._every_batch = config.averaging == "ema"
        self._first_epoch = config.swa_start * config.epochs
        self._copied = [not value.is_floating_point() or bool(value.isinf().any()) for value in _values(model)]

    def after_batch(self, model: nn.Module) -> None:
        if self._every_batch:
            self._add(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """epoch: how many are done."""
        if not self._every_batch and epoch > self._first_epoch:
            self._add(model)

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
