"""Free: adversarial training that replays each batch (Shafahi et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from atlas_kernels import pgd_step
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import option
from .base import Descent, Method, Metrics, State
from .terms import accuracy


@dataclass(frozen=True)
class Free(Method):
    """Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843): m updates on CE(z(x + delta), y) per batch.

    One backward pass gives both gradients: the weights descend, and delta climbs by one sign step, within the ball.
    delta starts at 0 and stays from batch to batch, by place in the batch (``state.memory["delta"]``). 3m passes.

    An epoch makes m updates per batch, so published runs have m times fewer of them: Free-8 of Shafahi et al. is 80,000
    updates on 10,000 batches, that of Wong, Rice & Kolter (2020) 10 epochs.
    """

    name: ClassVar[str] = "free"

    replays: int = option(8, "updates on each batch, m in the paper", low=1)
    step_size: float | None = option(None, "step of delta; default: eps", above=0)
    clip: Literal["delta", "sum"] = option(
        "delta",
        "what keeps images in [0, 1]. delta: it is clipped to eps and then for x + delta to be in range, as Wong, Rice "
        "& Kolter do; on a new batch x + delta may leave it. sum: delta is clipped to eps alone, and x + delta on its "
        "way into the network, so that pixels out of range get no gradient, as Shafahi et al. do",
    )

    @property
    def updates(self) -> int:
        return self.replays

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        delta = memory.get("delta")
        if delta is not None and not (
            delta.dim() == 4
            and list(delta.shape[1:]) == list(shape[1:])
            and delta.is_floating_point()
            and bool((delta.abs() <= self.eps * (1 + 1e-3)).all())  # 16 bits round
        ):
            raise ValueError(f"memory delta must be perturbations [B, {', '.join(map(str, shape[1:]))}] within eps")

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        """What moves: x + delta or, clipped as a sum, delta."""
        return self._centre(batch) + self._delta(batch, state)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given if self.clip == "delta" else (batch.x + given).clamp(0, 1)))
        return self.ce(logits, batch), {"adv": accuracy(logits, batch)}

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        """The loss is the mean over the replays, "adv" that of the last one, as published."""
        step_size = self._step_size
        centre, low = self._centre(batch), 0.0 if self.clip == "delta" else -1.0
        moving, losses = self.prepare(model, batch, key, state), []
        for _ in range(self.replays):
            leaf = moving.requires_grad_()
            loss, metrics = self.objective(model, batch, leaf)
            descent.backward(loss, metrics)
            assert leaf.grad is not None
            moving = pgd_step(leaf.detach(), leaf.grad, centre, self.eps, step_size, clip_min=low)
            descent.step()
            losses.append(loss.detach())
        delta = batch.deal.gathered(moving - centre)  # all rows, for the next batch may be dealt out otherwise
        state.memory["delta"][: len(delta)] = delta
        return torch.stack(losses).mean(), metrics

    def _centre(self, batch: Batch) -> Tensor:
        return batch.x if self.clip == "delta" else torch.zeros_like(batch.x)

    def _delta(self, batch: Batch, state: State) -> Tensor:
        """The rows of delta that belong to this batch; a batch larger than all before gets new ones."""
        total, kept = batch.deal.total(batch.x), state.memory.get("delta", batch.x[:0])
        if len(kept) < total:
            delta = torch.zeros_like(batch.deal.gathered(batch.x))
            delta[: len(kept)] = kept
            kept = state.memory["delta"] = delta
        return batch.deal.own(kept[:total])
