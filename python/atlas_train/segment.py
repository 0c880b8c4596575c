"""A look within an epoch: whether a network that is right at one-step adversaries is right on the way to them.

That is how catastrophic overfitting begins (Kim, Lee & Lee 2021, arXiv 2010.01799): the network learns the full step
alone, in l_inf, where sign steps end in corners. Of one batch in fifty the accuracies at the adversary and a quarter of
the way to it are compared, in the mode of training. The numbers are read with the losses, so nothing waits for the
device that did not before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_kernels import attack_cotangent, pgd_step, random_start
from atlas_kernels.attacks.held import generators, put_back
from atlas_kernels.outputs import logits_of

from .evaluate import predict
from .machine import autocast
from .methods import Batch
from .run import Run

#: Where one-step ADV collapses, the difference shows more a quarter of the way to the adversary than half-way.
EVERY, POINT, ERRORS = 50, 0.25, 3.0


class Segment:
    """The looks of an epoch. ``inverted``: the largest share of a batch, less three standard errors, by which more
    samples were right at the adversary than a quarter of the way; None before there was a look. Above 0 it is a sign.
    """

    def __init__(self, run: Run) -> None:
        self.inverted: float | None = None
        self._run, self._unread = run, list[Tensor]()
        self._watched = run.method.adversarial and run.config.probe_size > 0 and run.config.norm == "linf"

    def look(self, batch: Batch, key: Tensor) -> None:
        """Looks at this batch if its turn has come: a forward and a backward to the image, and two forwards."""
        if self._watched and (self._run.step + 1) % EVERY == 0:
            near, far = (predicted == batch.y for predicted in self._predict(batch, key))
            counts = [(far & ~near).sum(), (near & ~far).sum(), far.new_full((), len(far), dtype=torch.int64)]
            self._unread.append(batch.deal.summed(torch.stack(counts)))

    def unread(self) -> list[Tensor]:
        """Whole numbers [3] on the device of each look that was not read yet, for ``read``."""
        looks, self._unread = self._unread, []
        return looks

    def read(self, numbers: list[float]) -> None:
        """Takes the numbers of looks, from the host."""
        for more, less, count in zip(*(numbers[i::3] for i in range(3)), strict=True):
            least = (more - less - ERRORS * (more + less) ** 0.5) / count
            self.inverted = least if self.inverted is None else max(self.inverted, least)

    def _predict(self, batch: Batch, key: Tensor) -> list[Tensor]:
        """The classes a quarter of the way to a one-step adversary, and there. What that changes is put back."""
        run, (x, y, ids), eps = self._run, batch, self._run.config.eps
        seeds = dict.fromkeys(generators({x.device.index} if x.is_cuda else set()))
        with (
            put_back(run.model, True, freeze=True, copy_buffers=True, seeds=seeds, alone=False),
            autocast(run.execution.precision, run.device),
        ):
            start = random_start(x, eps, key=key, ids=ids).requires_grad_()
            logits = logits_of(run.model(start))
            (grad,) = torch.autograd.grad(logits, start, attack_cotangent(logits.detach(), y).cotangent)
            adv = pgd_step(start.detach(), grad, x, eps, 1.25 * eps)
            return [predict(run.model, x + POINT * (adv - x)), predict(run.model, adv)]
