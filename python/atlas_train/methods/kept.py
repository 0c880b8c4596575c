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
    """Images at the start of the attack and at its end, the noise key of the step, its ``Method.numbers``, the logits
    of the attack's forward at the start, which are a constant, and what ``further`` gives beside x'."""

    start: Tensor
    adv: Tensor
    key: Tensor
    numbers: Tensor
    logits: Tensor
    between: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class KeptForward(Method):
    """A method of one attack step whose loss compares the network at the start x0 of that step and at its end x':

        z0 = z(x0);  g = d(attack's loss)/dx0 of z0;  x' = a step along g;  L of z0 and z(x')

    z0 is made once, by a training forward, and serves attack and loss; g is taken of it to the input alone: 7 passes.
    A subclass says what the start is (``start``), which loss the step increases (``cotangent``), what the adversary is
    (``adversary``) and what the training loss is (``combine``). In a training loop of your own, with ``Batch`` and
    ``State`` of ``atlas_train.methods``::

        method = MyMethod(eps=8 / 255)
        memory = {}  # what the method keeps from batch to batch
        for step, (x, y, ids) in enumerate(loader):  # ids: the numbers of the images in the training set
            batch, key = Batch(x, y, ids), noise_key(x.device)
            state = State(step, total_steps, epoch, epochs, len(images), memory)
            method.before_step(model, batch, key, state)
            loss, metrics = method.loss(model, batch, key, state)  # then backward and the optimiser, as always

    ``prepare`` and ``objective``, the same with the attack apart, take one forward more (AWP needs them). So does
    ``loss`` on a compiled network: there a backward to the input makes the gradients of all weights too, which takes as
    long as that forward, and torch would have to keep what it frees by default.

    The forward at x0 is one of training: in its precision and mode, with its hooks and dropout, seen by BatchNorm's
    running statistics. So settings of attacks, such as ``Execution``, apply to ``prepare`` alone, not to ``loss``.
    """

    @abstractmethod
    def start(self, batch: Batch, key: Tensor, state: State) -> tuple[Tensor, Any]:
        """x0, in a tensor of its own and in the dtype of ``batch.x``; and what ``adversary`` needs of it, or None."""

    def cotangent(self, logits: Tensor, batch: Batch, key: Tensor) -> Tensor:
        """The derivative of the loss that the step increases, summed over the batch, by ``logits`` [B, C]: those of x0
        in float32 or float64, without a graph. Here: of the cross-entropy, with the label smoothing of the run."""
        return batch.over_labels(lambda y: self._of_cross_entropy(logits, y))

    @abstractmethod
    def adversary(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Tensor:
        """x', from x0, from what ``start`` gave (``known``) and from the gradient at x0; also stores what the next step
        needs."""

    @abstractmethod
    def combine(self, start_logits: Tensor, adv_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        """Loss and metrics, as ``objective`` gives them, of the logits at x0 and x', both with their graph."""

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Given:
        return self._attacked(model, batch, key, state, keep=False)[1]

    def objective(self, model: nn.Module, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        return self.tied(model, logits_of(model(given.start)), batch, given)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        """``objective`` on what ``prepare`` makes, with one forward at x0 for both."""
        state = state or State()
        if any(map(is_compiled, model.modules())):
            return super().loss(model, batch, key, state)
        logits, given = self._attacked(model, batch, key, state, keep=True)
        return self.tied(model, logits, batch, given)

    def _attacked(self, model: nn.Module, batch: Batch, key: Tensor, state: State, keep: bool) -> tuple[Tensor, Given]:
        """The logits at x0, with their graph if ``keep``, and what the attack has made."""
        start, known = self.start(batch, key, state)
        logits, grad = self.gradient(model, batch, start, key, keep)
        adv, between = self.further(model, batch, self.adversary(batch, start, known, grad, key, state), key, keep)
        return logits, Given(start, adv, key, self.numbers(state, start.device), logits.detach(), between)

    def gradient(self, model: nn.Module, batch: Batch, at: Tensor, key: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Logits, and the gradient of the attack's loss at these images. keep: by a training forward, whose graph is
        kept for the loss; else by a forward of the attack, and the logits are a constant."""
        if not keep:
            with attacking(model, "keep", key):
                leaf, logits = _traced(model, at)
                cotangent = self.cotangent(wide(logits.detach()), batch, key)
                return logits.detach(), pull_back(model, logits, leaf, cotangent, coupled=True)
        leaf, logits = _traced(model, at)
        cotangent = self.cotangent(wide(logits.detach()), batch, key)
        with torch.autocast(at.device.type, enabled=False):
            return logits, pull_back(model, logits, leaf, cotangent, coupled=True, retain_graph=True)

    def further(
        self, model: nn.Module, batch: Batch, adv: Tensor, key: Tensor, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x' after further attack steps from ``adv``, each of two passes, and what ``tied`` needs of them; here there
        are none. keep: whether their forwards may be kept."""
        return adv, ()

    def tied(self, model: nn.Module, start_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        """The forward at x', and the loss."""
        return self.combine(start_logits, again(model, given.adv), batch, given)

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
    with without_broadcast(model):
        return logits_of(model(x))


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
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
