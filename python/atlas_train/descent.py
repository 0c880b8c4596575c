"""How a batch moves the weights: backwards, and steps of the run's optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from .deal import WHOLE, Whole
from .methods import Metrics

Look = Callable[[Tensor, Metrics], None]


def nobody(loss: Tensor, metrics: Metrics) -> None:
    """Takes a loss as it is."""


class OptimizerDescent:
    """The ``Descent`` of one batch, for eager steps and for those that a graph records.

    Args:
        optimizer: moves the weights; gradients from before are dropped.
        rate: the learning rate of the batch's first, second, ... update; in a graph a tensor on the device.
        look: is shown a loss, and the metrics that explain it, before its backward; raises where it is not finite.
        deal: how the batch is dealt out; a step is along the gradient of all of it, and its losses are shown.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float | Tensor],
        look: Look = nobody,
        deal: Whole = WHOLE,
    ) -> None:
        self.rate, self.look, self._optimizer, self._deal = rate, look, optimizer, deal
        self._updates: Iterator[int] = count()
        optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradients of ``loss``, outside of autocast."""
        self.look(*self._deal.settled(loss.detach(), metrics or {}))
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()

    def step(self) -> None:
        """One step at the next learning rate."""
        rate = self.rate(next(self._updates))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._deal.average_gradients(weight for group in self._optimizer.param_groups for weight in group["params"])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a method that goes on with this batch must not see the old weights in 16 bits
