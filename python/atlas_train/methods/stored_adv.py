"""Adversarial training without an attack: the backward that trains the weights also moves a stored perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atlas_kernels import consistency_loss
from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import Switches, option
from .base import Descent, Method, Metrics, State
from .stored_noise import StoredNoise, StoreType, first_places
from .terms import accuracy, wide
from .views import Views


class Given(NamedTuple):
    """The images that are trained on, their logits the last time, if there was one, and the views that they are of, if
    they are views."""

    adv: Tensor
    last: Tensor | None
    views: Views | None


@dataclass(frozen=True)
class StoredADV(Method):
    """Training on stored adversaries: with a perturbation d_i, a momentum m_i and the logits z_i of the last time, kept
    for each training image i,

        x' = clip(x + d_i);  L = CE(z(x'), y) + local_weight D(z_i, z(x'));  g = dL/dx'
        m_i <- g / ||g||_1 + decay m_i;  d_i <- [d_i + step_size sign m_i] within +-eps, x + d_i in the image range
        z_i <- z(x')

    One backward gives the weights their gradients and g, so a step takes 3 passes, as standard training does (and the
    gradient of the first layer to its input). The price: d_i is an adversary of the network of an epoch ago, and the
    network of today may have learned to see through it. D, a distance of ``consistency_loss`` whose gradient goes to
    z(x') alone, is against that: it is ATLAS's LOCAL, of two points around the image and two networks. It counts from
    an image's second epoch on. ``replays`` makes so many updates on each batch, of 3 passes each, d_i moving between.

    The method is ours. Its relatives: Free (Shafahi et al. 2019), which keeps a perturbation for each place in a batch
    and relies on replays; ATTA (Zheng et al. 2020, arXiv 1912.11969), which keeps one for each image and makes steps of
    an attack from there before it trains; FGSM-PGI (Jia et al. 2022), whose store this is, for the start of an attack.

    d_i stays with the pixels of the image: where the run crops and flips, the method does so after it has added d_i,
    and takes g back, as ATTA does. (FGSM-PGI's d_i stays where it is while the image moves; its attack makes up for
    it.) A pixel that is out of sight has a gradient of 0.
    """

    name: ClassVar[str] = "stored_adv"
    augments: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = (*StoredNoise.stores, "logits")

    switches: ClassVar[Switches] = {"local_objective": [("local_weight", (0,))]}

    step_size: float | None = option(None, "step of the perturbations; default: eps", above=0)
    decay: float = option(0.3, "share of the momentum that each step keeps", low=0)
    local_weight: float = option(1.0, "weight of the distance to the logits of the last time", low=0)
    local_objective: Literal["kl", "js", "logit", "prob"] = option(
        "logit", "that distance, as with local=start of atlas"
    )
    replays: int = option(1, "updates on each batch, m in free", low=1)
    reset: float = option(1.0, "share of training after which all perturbations begin anew; 1: never", above=0, high=1)
    store: StoreType = option("float32", "type of perturbations and momentum; bfloat16 takes half the memory")

    @property
    def updates(self) -> int:
        return self.replays

    @property
    def _step_size(self) -> float:
        return self.eps if self.step_size is None else self.step_size

    @cached_property
    def _noise(self) -> StoredNoise:
        return StoredNoise(self.eps, self.decay, self.reset, type=self.store, step_size=self._step_size)

    def store_bytes(self, shape: Sequence[int]) -> int:
        """Without the logits, which are few numbers."""
        return self._noise.bytes(shape)

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        self._noise.require_memory(memory, shape)
        logits = memory.get("logits")
        if (logits is None) != (memory.get(self._noise.stores[0]) is None):
            raise ValueError("memory holds perturbations without logits, or logits without perturbations")
        if logits is not None and not (
            logits.dim() == 2 and len(logits) == shape[0] and logits.is_floating_point() and not logits.isinf().any()
        ):
            raise ValueError(f"memory logits is {logits.dtype} {list(logits.shape)}, expected floats [{shape[0]}, C]")

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        self._noise.before_step(batch, key, state)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Given:
        self.remembered(state, "perturbations")
        adv, logits = self._noise.start(batch, state), state.memory.get("logits")
        views = Views(batch, key) if state.augment else None
        return Given(views.of(adv) if views else adv, None if logits is None else logits[batch.ids], views)

    def objective(self, model: nn.Module, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        return self._tied(wide(logits_of(model(given.adv))), batch, given)

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        """The loss is the mean over the replays; the metrics are of the last one."""
        losses = []
        for _ in range(self.replays):
            given = self.prepare(model, batch, key, state)
            leaf = given.adv.requires_grad_()
            logits = wide(logits_of(model(leaf)))
            loss, metrics = self._tied(logits, batch, given)
            descent.backward(loss, metrics)
            assert leaf.grad is not None
            grad = given.views.back(leaf.grad) if given.views else leaf.grad
            self._noise.step(batch, grad, state, of_mean=True)
            self._keep(logits.detach(), batch, state)
            descent.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean(), metrics

    def _keep(self, logits: Tensor, batch: Batch, state: State) -> None:
        if "logits" not in state.memory:
            size = len(state.memory["perturbations"])
            state.memory["logits"] = logits.new_full((size, logits.shape[1]), torch.nan)  # not seen yet
        logits, ids = batch.deal.gathered(logits), batch.deal.gathered(batch.ids)
        state.memory["logits"][ids] = logits[first_places(ids)] if state.repeats else logits

    def _tied(self, logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        metrics: Metrics = {"adv": accuracy(logits, batch)}
        last = here = logits.detach()
        if given.last is not None:
            last = torch.where(given.last.isnan(), here, given.last)

        def loss_of(y: Tensor) -> Tensor:
            loss, terms = consistency_loss(
                logits,
                last,
                y,
                distance=self.local_objective,
                weight=self.local_weight,
                label_smoothing=self.label_smoothing,
                return_terms=True,
            )
            metrics.setdefault("local", terms[1].mean())
            return loss

        return batch.over_labels(loss_of), metrics
