"""The clean forward kept: methods that tie the network at an adversary to itself at the image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import pgd_step
from atlas_kernels.attacks import attacking
from atlas_kernels.attacks.float16 import are_coupled, pull_back
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..noise import uniform
from ..options import option
from .base import AttackMode, Method, Metrics, State
from .kept import again
from .terms import wide


class Given(NamedTuple):
    """The adversaries of a step, and its ``Method.numbers``."""

    adv: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class CleanKept(Method):
    """A method of one attack step whose attack and whose loss compare the network with itself at the clean image:

        z = z(x);  g = d(attack_loss)/dx0 at x0 = x + noise;  x' = x0 + eps sign(g), in the ball;  L of z and z(x')

    z is made once, by a training forward, and guides the attack and stays in the loss: 8 passes. Published code
    makes it anew for the loss. A subclass says which loss the attack increases (``attack_loss``) and what the
    training loss is (``combine``); ``guided``: which batches have the distance to z in their attack. ``prepare``
    and ``objective`` take one forward more.
    """

    noise_magnitude: float = option(
        0.5, "size of the noise at the attack's start, in eps: each pixel moves by it, up or down at random", low=0
    )
    alternate: bool = option(
        True,
        "the attack uses the distance to the clean logits only in every second batch of an epoch, from the second on; "
        "otherwise in every batch",
    )
    attack_mode: AttackMode | None = option(None, "mode of BatchNorm and dropout in the attack; default: eval")
    bn_compat: bool = option(
        False,
        "BatchNorm's running statistics as in the published code, which runs x, the start of an attack in train mode, "
        "x' and x again (1 pass more); else x and x' once each",
    )

    @property
    def _attack_mode(self) -> AttackMode:
        return self.attack_mode or "eval"

    @abstractmethod
    def attack_loss(self, logits: Tensor, clean_logits: Tensor, batch: Batch, numbers: Tensor, guided: bool) -> Tensor:
        """The loss that the step increases, from the logits at its start; the clean ones have no graph. All in float32
        or float64."""

    @abstractmethod
    def combine(
        self, clean_logits: Tensor, adv_logits: Tensor, batch: Batch, numbers: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics, as ``objective`` gives them, of the logits at x and x', both with their graph."""

    def guided(self, state: State) -> bool:
        """Whether the next batch has the distance to z in its attack; batches are counted from 0 in every epoch."""
        within = state.step - state.epoch * (state.total_steps // max(state.epochs, 1))
        return not self.alternate or within % 2 == 1

    def variant(self, state: State) -> Hashable:
        return self.guided(state)

    def attacked(self, model: nn.Module, clean_logits: Tensor, batch: Batch, key: Tensor, state: State) -> Given:
        """The adversaries of a batch, whose clean logits have no graph."""
        numbers, size = self.numbers(state, batch.x.device), self.noise_magnitude * self.eps
        noise = uniform(batch.x, key, batch.ids, 0)
        start = torch.where(noise < 0, batch.x - size, batch.x + size).clamp_(0.0, 1.0)
        seen = self.bn_compat and self._attack_mode != "eval"
        with attacking(model, self._attack_mode, key, update_buffers=seen):
            leaf = start.requires_grad_()
            logits = logits_of(model(leaf))
            at = wide(logits.detach()).requires_grad_()
            loss = self.attack_loss(at, wide(clean_logits), batch, numbers, self.guided(state))
            (cotangent,) = torch.autograd.grad(loss, at)
            grad = pull_back(model, logits, leaf, cotangent, coupled=are_coupled(model))
        return Given(pgd_step(start.detach(), grad, batch.x, self.eps, self.eps), numbers)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Given:
        with attacking(model, "keep", key):  # in which running statistics move for the attack, and are put back
            with torch.no_grad():
                clean_logits = logits_of(model(batch.x))
            return self.attacked(model, clean_logits, batch, key, state)

    def objective(self, model: nn.Module, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        return self._combined(model, logits_of(model(batch.x)), batch, given)

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        """``objective`` on what ``prepare`` makes, with one forward at x for both."""
        clean_logits = logits_of(model(batch.x))
        given = self.attacked(model, clean_logits.detach(), batch, key, state or State())
        return self._combined(model, clean_logits, batch, given)

    def _combined(self, model: nn.Module, clean_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        adv_logits = again(model, given.adv)
        if self.bn_compat:
            with torch.no_grad():
                again(model, batch.x)
        return self.combine(clean_logits, adv_logits, batch, given.numbers)
