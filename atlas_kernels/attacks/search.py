"""Attacks that ask the network many times about a sample and keep what they found: APGD, FAB, Square and their like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import class_indices, per_channel, per_sample, require_float_images, require_images, require_noise
from ..noise import noise_key
from ..schema import LINF, NORMS
from .arguments import numbers, require_choice, require_count, require_radius
from .batch import AttackResult, Batch
from .execution import run
from .objective import Model, Objective
from .pool import Pool
from .pool import State as State


@dataclass(frozen=True)
class Search:
    """An attack that is a state machine per sample: samples at different iterations share a batch, those that are done
    leave it and waiting ones enter.

    Args:
        eps: radius, a number or a tensor [B], in the unit of the images (8/255 for images in [0, 1]).
        steps: iterations of one round.
        norm: of the ball: "linf", "l2" or "l1".
        restarts: independent random starts.
        clip_min, clip_max: image range, numbers or one value per channel.

    A subclass defines ``begin`` and ``advance`` and, where they are not these, ``rounds`` and ``length``. Both give a
    state: a dict of tensors, each with a row for every sample of the batch and of the same dtype in every state. It has
    at least

    - ``adv`` [B, ...]: the strongest point so far; where ``fooled``, one that is misclassified, in ball and range;
    - ``fooled``, bool[B]. The driver may set it back to False where it does not agree: so set it anew from each
      iterate, and derive nothing else from it;
    - ``number``, int64[B]: iterations done in this round, 0 after ``begin`` and one more after each ``advance``;

    and, if the attack has one, ``objective`` [B], how strong ``adv`` is, larger is stronger. Where the network says
    nothing (NaN), a sample is fooled, as in ``Objective.judge``.

    gradients: whether it follows gradients, or does with forwards alone.

    The model is run in eval mode and left as it was found; the ``Execution`` around counts, but for its graphs.
    """

    eps: float | Tensor
    steps: int = 100
    _: KW_ONLY
    norm: str = LINF
    restarts: int = 1
    clip_min: float | Tensor | Sequence[float] = 0.0
    clip_max: float | Tensor | Sequence[float] = 1.0

    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("steps", self.steps, 1)
        require_count("restarts", self.restarts, 1)
        require_choice("norm", self.norm, NORMS)
        box = {"clip_min": self.clip_min, "clip_max": self.clip_max} if self.norm == LINF else {}
        require_radius("eps", self.eps, **box)

    def begin(self, model: Model, batch: Batch, draw: Tensor) -> State:
        """The state at the start of a round. draw: int64[B], each row's round from 0 on; it fixes what the rounds of a
        sample differ in: target class, noise (see ``row_noise.py``). ``batch.clean`` is the logits of x."""
        raise NotImplementedError(f"{type(self).__name__} has no begin(model, batch, draw): define it")

    def advance(self, model: Model, batch: Batch, state: State) -> State:
        """One iteration of every row, each by its own ``number``; ``state`` is not written to. Nothing in it may depend
        on the other rows, nor wait for the device where that can be helped."""
        raise NotImplementedError(f"{type(self).__name__} has no advance(model, batch, state): define it")

    def rounds(self, classes: int) -> int:
        """How many rounds a sample has at most, for a model of so many classes."""
        return self.restarts

    def target(self, batch: Batch, draw: Tensor) -> Tensor:
        """The other class that each row goes for in its round, in the order of the clean logits: int64[B]."""
        assert batch.clean is not None and batch.goal.labels is not None
        clean = batch.clean.scatter(1, batch.goal.labels[:, None], torch.inf)
        order = clean.sort(dim=1, descending=True, stable=True).indices
        return order.gather(1, (draw // self.restarts + 1)[:, None])[:, 0]

    @property
    def length(self) -> int:
        """Calls of ``advance`` in a round."""
        return self.steps

    @property
    def passes(self) -> int:
        """Forwards and backwards in an ``advance``, by which the time that is left is estimated."""
        return 2 if self.gradients else 1

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> AttackResult:
        """Attack the images x [B, ...] (float, in [clip_min, clip_max]) with the labels y (integers [B]), at most
        ``batch_size`` together (default: all). key, ids, generator: as in ``Attack.run``.

        A sample that is misclassified from the start is not attacked: its adversary is x. One that is fooled leaves.
        """
        size = len(x) if batch_size is None else batch_size
        require_count("batch_size", size, 0 if batch_size is None else 1)

        def whole(model: Model, batch: Batch) -> AttackResult:
            pool = self.pool(model, batch, size)
            pool.run(model)
            return AttackResult(pool.adv, batch.key, pool.fooled, pool.objective)

        batch = self.batch(x, y, key=key, ids=ids, generator=generator)
        why = f"in {type(self).__name__} samples come and go, which a graph cannot follow"
        return run(whole, model, batch, "eval", constant=lambda: None, no_graph=why)

    def __call__(self, model: Model, x: Tensor, y: Tensor, **options: Tensor | torch.Generator | int | None) -> Tensor:
        """The adversaries alone; arguments as in ``run``."""
        return self.run(model, x, y, **options).adv  # type: ignore[arg-type]

    def batch(
        self,
        x: Tensor,
        y: Tensor,
        *,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Check what can be checked before the first forward, and draw the key."""
        if key is not None and generator is not None:
            raise ValueError("key and generator are both given: a key already fixes the noise, so leave one out")
        require_float_images("x", x)
        clips = numbers(per_channel("clip_min", self.clip_min, x), per_channel("clip_max", self.clip_max, x))
        (radius,) = numbers(per_sample("eps", self.eps, x))
        require_images(x, *clips)
        goal = Objective(class_indices("y", y, x))
        with torch.inference_mode(False):
            key = noise_key(x.device, generator=generator) if key is None else key
        require_noise(key, ids, x)
        return Batch(x.detach(), None, goal, key, ids, True, self.norm, True, radius, radius, *clips)

    def pool(self, model: Model, batch: Batch, size: int) -> Pool:
        """All samples of a batch, of which those that are misclassified as they are need no attack."""
        parts = [batch.rows(rows) for rows in batch.every_row().split(max(1, size))]
        clean = torch.cat([part.goal.predict(model, part.x) for part in parts])
        batch.goal.learn(parts[0].goal)
        _, fooled = batch.goal.judge(clean)
        return Pool(self, replace(batch, clean=clean), size, fooled)


def finite(grad: Tensor) -> Tensor:
    """The gradient with 0 for NaN and infinity: one such entry must not keep all others from moving."""
    return grad.nan_to_num(0.0, 0.0, 0.0)
