"""The kept forward: the logits at the start of an attack stay in the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from atlas_kernels import attack_cotangent
from atlas_kernels.attacks import attacking
from atlas_kernels.attacks.cast_weights import is_compiled
from atlas_kernels.attacks.float16 import pull_back
from atlas_kernels.outputs import logits_of, require_rows_of_logits

from ..data import Batch
from .base import Method, Metrics, State
from .terms import wide


class Given(NamedTuple):
    """Images at the start of the attack and at its end, the noise key of the step, and its ``Method.numbers``."""

    start: Tensor
    adv: Tensor
    key: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class KeptForward(Method):
    """A method of one attack step whose loss compares the network at the start x0 of that step and at its end x':

        z0 = z(x0);  g = d(attack's loss)/dx0 of z0;  x' = a step along g;  L of z0 and z(x')

    z0 is made once, by a training forward, and serves attack and loss; g is taken of it to the input alone: 7 passes.
    A subclass says what the start is (``start``), what the step climbs (``cotangent``), where it leads (``adversary``)
    and what the loss is (``combine``). ``prepare`` and ``objective``, the same with the attack apart, take one forward
    more (AWP needs them). So does ``loss`` on a compiled network, whose backward to the input would make the gradients
    of all weights besides, and its forward keep more.
    """

    @abstractmethod
    def start(self, batch: Batch, key: Tensor, state: State) -> tuple[Tensor, Any]:
        """x0, in a tensor of its own and in the dtype of ``batch.x``, and what ``adversary`` is to know of it."""

    def cotangent(self, logits: Tensor, batch: Batch, key: Tensor) -> Tensor:
        """What the step climbs: the derivative of its loss, summed over the batch, by ``logits`` [B, C], those of x0 in
        float32 or float64 and without a graph. Here of the cross-entropy of the labels, smoothed as the run says."""
        return batch.over_labels(lambda y: self._of_cross_entropy(logits, y))

    @abstractmethod
    def adversary(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Tensor:
        """x', made of x0, of what ``start`` said of it and of the gradient there; keeps what the next step needs."""

    @abstractmethod
    def combine(self, start_logits: Tensor, adv_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        """Loss and metrics, as ``objective`` gives them, of the logits at x0 and x', both with their graph."""

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Given:
        start, known = self.start(batch, key, state)
        with attacking(model, "keep", key):
            leaf, logits = _traced(model, start)
            grad = pull_back(model, logits, leaf, self.cotangent(wide(logits.detach()), batch, key), coupled=True)
        return self._given(batch, start, known, grad, key, state)

    def objective(self, model: nn.Module, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        start_logits = logits_of(model(given.start))
        return self._combined(model, start_logits, batch, given)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        """``objective`` on what ``prepare`` makes, with one forward at x0 for both."""
        state = state or State()
        if any(map(is_compiled, model.modules())):
            return super().loss(model, batch, key, state)
        start, known = self.start(batch, key, state)
        leaf, logits = _traced(model, start)
        cotangent = self.cotangent(wide(logits.detach()), batch, key)
        with torch.autocast(start.device.type, enabled=False):
            grad = pull_back(model, logits, leaf, cotangent, coupled=True, retain_graph=True)
        return self._combined(model, logits, batch, self._given(batch, start, known, grad, key, state))

    def _given(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Given:
        adv = self.adversary(batch, start, known, grad, key, state)
        return Given(start, adv, key, self.numbers(state, start.device))

    def _combined(self, model: nn.Module, start_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        with _without_broadcast(model):
            adv_logits = logits_of(model(given.adv))
        return self.combine(start_logits, adv_logits, batch, given)

    def _of_cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """softmax(z) - (1 - s) onehot(y) - s / C."""
        made = attack_cotangent(logits, y).cotangent
        assert made is not None
        if not self.label_smoothing:
            return made
        at_label = torch.zeros_like(made).scatter_(1, y[:, None], self.label_smoothing)
        return made + at_label - self.label_smoothing / made.shape[1]


def _traced(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf of x's values, and its logits with their graph."""
    leaf = x.detach().requires_grad_()
    logits = logits_of(model(leaf))
    require_rows_of_logits(logits, leaf)
    return leaf, logits


def again(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a further forward in a step."""
    with _without_broadcast(model):
        return logits_of(model(x))


@contextmanager
def _without_broadcast(model: nn.Module) -> Iterator[None]:
    """For the second forward of a step: DistributedDataParallel has written the first rank's buffers to all before the
    first one. A second time would touch what the graph of the first forward keeps, and its backward would fail."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_forward_param_sync = model.require_forward_param_sync, False
    try:
        yield
    finally:
        model.require_forward_param_sync = before
