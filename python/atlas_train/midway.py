"""Checkpoints within an epoch: from time to time, and where the user or the system ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from . import checkpoint, processes
from .interrupts import Terminated, unbroken
from .nonfinite import Losses
from .peak_memory import note
from .run import Run
from .saving import save
from .segment import Segment

#: Batches between two looks at the clock where several processes train: telling each other takes its time.
TOGETHER = 10


class Midway:
    """Saves a run every ``save_every`` minutes while an epoch lasts, always between two batches.

    What is saved has only losses that were seen to be finite, and weights that are.
    """

    def __init__(self, run: Run, losses: Losses, segment: Segment, say: Callable[[str], object]) -> None:
        self._run, self._losses, self._segment, self._say = run, losses, segment, say
        self._every = 60 * run.config.save_every if run.folder else 0.0
        segment.inverted = run.within.segment
        self._begun = time.perf_counter() - run.within.seconds
        self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the epoch, in all sessions of the run."""
        return time.perf_counter() - self._begun

    def after_batch(self) -> None:
        """Saves, if that is due: by the clock of the first process, at which several look at every ``TOGETHER``."""
        if not self._every or (processes.count() > 1 and self._run.within.batches % TOGETHER):
            return
        if processes.agreed(time.perf_counter() - self._saved >= self._every):
            self.save()

    def save(self) -> None:
        """The run as it is now. Raises NonFiniteLoss for a loss that was not looked at before."""
        run = self._run
        self._losses.read()
        if checkpoint.not_finite(run.model) - run.masks:
            return  # the next batch says so, and the checkpoint from before is of use
        run.within.seconds, run.within.segment = self.seconds, self._segment.inverted
        last = run.optimizer.param_groups[0]
        run.within.lr, run.within.momentum = last["lr"], last.get("momentum", 0.0)
        note(run)
        save(run)
        run.within.saved, self._saved = True, time.perf_counter()

    @contextmanager
    def ending(self) -> Iterator[AbstractContextManager[None]]:
        """A batch within the context that this gives is not broken off by a signal that is to end the process; when
        such a signal comes, the run is saved."""
        if not self._every or processes.count() > 1:  # which are not at the same batch when a signal comes
            yield nullcontext()
            return
        with unbroken(self._tell) as whole:
            try:
                yield whole
            except (KeyboardInterrupt, Terminated):
                if not whole.broken and self._run.within.batches:
                    self.save()
                raise

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the signal came while something was printed
            self._say("stopping after this batch, to save it; a second Ctrl-C does not wait")
