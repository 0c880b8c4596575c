"""Losses that are NaN or infinite: the run stops, or leaves the batch out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import LAST
from .methods import Batch, Descent, Method, Metrics, State
from .options import plain
from .remembered import put_back_later
from .run import Run
from .segment import Segment

#: On CUDA the losses of so many steps are read together: reading one waits for all the work that is queued.
STEPS = 8


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
        self.step, self.ids, self.checkpoint = run.step, [], run.folder / LAST if run.folder else None
        kept = f"the state from before is in {self.checkpoint}" if run.folder else "no checkpoint was asked for"
        RuntimeError.__init__(
            self,
            f"the network holds NaN or infinity after epoch {run.epoch}, in {plain(names[0])} for one; {kept}. "
            "Try a smaller lr or weights of the terms, or train_precision fp32",
        )


class LeftOut:
    """``method.step`` of a run that leaves batches out: what the method remembers is then as before ``train_step``.

    What ``before_step`` did stays: it is due, whatever the batch.
    """

    def __init__(self, method: Method) -> None:
        self._method = method

    def __call__(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        self._method.before_step(model, batch, key, state)
        put_back = put_back_later(self._method, state.memory, batch.deal.gathered(batch.ids))
        try:
            return self._method.train_step(model, batch, key, state, descent)
        except NonFiniteLoss:
            put_back()
            raise


class Losses:
    """Looks at the losses of a run, and raises NonFiniteLoss for the first that is not finite.

    On a CPU, and where such a batch is to be skipped, each loss is read at once, before it reaches the weights. On CUDA
    a loss that stops the run is read up to ``STEPS`` steps later: the checkpoint is from before in any case. What
    ``segment`` has counted is read with them.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.segment: Segment | None = None
        self._steps = STEPS if run.device.type == "cuda" and run.config.on_nonfinite == "stop" else 1
        self._unread: list[tuple[int, Tensor, Metrics]] = []

    def add(self, ids: Tensor, loss: Tensor, metrics: Metrics) -> None:
        """A loss of this step, on the images ``ids``; ``metrics`` explain it."""
        self._unread.append((self._run.step, ids, {"loss": loss, **metrics}))
        if self._run.step - self._unread[0][0] + 1 >= self._steps:
            self.read()

    def read(self) -> None:
        """Every loss so far has been looked at; waits for the device."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        finite = torch.stack([values["loss"].reshape(()) for _, _, values in unread]).isfinite()
        looks = self.segment.unread() if self.segment else []
        numbers = torch.cat([finite.long(), *looks]).tolist()  # one wait for all
        if self.segment:
            self.segment.read(numbers[len(unread) :])
        for (step, ids, values), fine in zip(unread, numbers, strict=False):
            if not fine:
                saved = self._run.folder / LAST if self._run.folder else None
                raise NonFiniteLoss(step, ids, {name: value.item() for name, value in values.items()}, saved)
