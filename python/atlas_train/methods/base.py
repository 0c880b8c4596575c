"""What a training method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from atlas_kernels import cross_entropy
from atlas_kernels.attacks import PGD
from atlas_kernels.schema import L1

from ..data import Batch
from ..options import OF_RUN, Norm, Switches, check, option, switched_off
from .terms import smoothing

Metrics = dict[str, Tensor]
AttackMode = Literal["train", "eval", "keep"]
#: For methods whose adversary is that of PGD, or that have none.
EVERY_NORM: tuple[Norm, ...] = ("linf", "l2", "l1")


@dataclass
class State:
    """Where training stands, and what a method remembers from one batch to the next.

    step: batches so far, of ``total_steps``. epoch: from 0, of ``epochs``. size: images in the training set. repeats:
    whether a batch may hold an image twice, as extra images may come.
    augment: whether a method that crops and flips the images itself (``Method.augments``) is to do so.
    memory: tensors by name, put there by the method; they are part of a checkpoint. numbers: in a graph of the step,
    what ``Method.numbers`` gives.
    """

    step: int = 0
    total_steps: int = 1
    epoch: int = 0
    epochs: int = 1
    size: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None
    repeats: bool = False
    augment: bool = False


class Descent(Protocol):
    """How a method moves the weights; the engine makes one."""

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradients of ``loss``, once it is seen to be finite; ``metrics`` explain it if it is not."""

    def step(self) -> None:
        """One step of the optimiser with the gradients added so far, which are then gone."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to train on a batch: hyper-parameters, ``prepare``, which attacks, and ``objective``, which is the loss.

    The two are apart so that a loss can be taken twice on one attack (AWP does). A method that interleaves attack and
    weight updates (Free, YOPO) defines ``train_step`` instead. What has to last from batch to batch goes to
    ``state.memory``; of optimisers, schedules and devices a method knows nothing. Hyper-parameters out of range raise
    ValueError at construction, with the allowed range.
    """

    name: ClassVar[str] = ""
    #: Whether the method trains against an attack; the catastrophic-overfitting alarm watches only those.
    adversarial: ClassVar[bool] = True
    #: Defaults that differ by data set, where the published code has them: {"mnist": {"steps": 40}}. What the data set
    #: declares for the method (``Dataset.methods``) wins over them.
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Why a step cannot be one CUDA graph, where it cannot: "name, which waits for ...".
    no_graph: ClassVar[str] = ""
    #: Why the network cannot be compiled, where it cannot: "name, which looks into ...".
    no_compile: ClassVar[str] = ""
    #: Whether the network meets batches of sizes that depend on the data.
    sizes_vary: ClassVar[bool] = False
    #: Whether it crops and flips images itself, if the run wants that (``state.augment``): batches come without.
    augments: ClassVar[bool] = False
    #: What of ``state.memory`` has a row for each training image. It is in last.pt alone, and is never copied whole.
    stores: ClassVar[tuple[str, ...]] = ()
    #: Norms of the ball that its adversaries can live in.
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)

    #: Hyper-parameters that choose a form of the method. Where one is set, or in l2 and l1, ``defaults`` apply no more,
    #: but for lengths.
    form_options: ClassVar[tuple[str, ...]] = ()
    #: Of these, the ones that bring a step of their own: where one is set, that of ``defaults`` applies no more either.
    step_options: ClassVar[tuple[str, ...]] = ()
    #: Hyper-parameters that are lengths of perturbations of images, as eps is.
    lengths: ClassVar[tuple[str, ...]] = ("step_size",)
    #: Hyper-parameters that another one switches off.
    switches: ClassVar[Switches] = {}

    eps: float = option(
        help="radius of the ball, in the unit of images in [0, 1]",
        above=0,
        below=1,
        of_linf=True,
        hint="images are in [0, 1], so write 8/255 instead of 8",
    )
    norm: Norm = option("linf", "as the setting of the run", kw_only=True)
    label_smoothing: float = option(0.0, "as the setting of the run", low=0, below=1, kw_only=True)

    def __post_init__(self) -> None:
        check(self, self.name)
        if self.norm not in self.norms:
            raise ValueError(f"{self.name}: norm {self.norm!r} cannot be had: the method is of the l_inf ball alone")

    def in_use(self) -> dict[str, Any]:
        """All hyper-parameters with the values in use: for one that is None, say ``name``, the property ``_name``."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in OF_RUN}
        return {name: getattr(self, f"_{name}", None) if value is None else value for name, value in given.items()}

    def without_effect(self) -> dict[str, str]:
        """The settings, of the method or of the run, that change nothing beside the others, each with the reason."""
        return switched_off(self.switches, self.in_use())

    @property
    def _step_size(self) -> Any:
        """The step of an attack that leaves it to PGD."""
        steps = getattr(self, "steps", 1)
        if self.norm == L1 and steps > 1:
            return None  # from step to step another one
        return PGD(self.eps, steps=steps, norm=self.norm).effective_step_size

    def ce(self, logits: Tensor, batch: Batch, weights: Tensor | None = None) -> Tensor:
        """The cross-entropy that trains the network, its labels smoothed as the run says."""
        smoothing = self.label_smoothing
        return batch.over_labels(lambda y: cross_entropy(logits, y, weights=weights, label_smoothing=smoothing))

    def smoothed(self, loss: Tensor, logits: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        """A loss that holds ``weight`` times the cross-entropy of ``logits``, its labels smoothed likewise."""
        return loss + weight * self.label_smoothing * smoothing(logits, y) if self.label_smoothing else loss

    def scaled(self, share: float) -> Method:
        """The method at a share of eps, its steps and other lengths too."""
        values = {name: getattr(self, name, None) for name in self.lengths}
        lengths = {name: share * value for name, value in values.items() if value is not None}
        return replace(self, eps=share * self.eps, **lengths)

    def with_steps(self, steps: int) -> Method:
        """The method with so many attack steps, each PGD's own. Raises ValueError for one that does not choose."""
        if "steps" not in self.in_use():
            raise ValueError(
                f"mix_share needs a method that attacks in steps of a number that can be chosen, which {self.name} is "
                "not: set mix_share=0, or choose another method, for example atlas or one_step_adv"
            )
        changed: dict[str, Any] = {"steps": steps, "step_size": None, "wide_start": 0.0}  # which is of one step
        if getattr(self, "start_noise", "") == "wide":
            changed["start_noise"] = "uniform"
        return replace(self, **{name: value for name, value in changed.items() if hasattr(self, name)})

    @property
    def updates(self) -> int:
        """Optimiser steps per batch."""
        return 1

    @property
    def recomputable(self) -> bool:
        """Whether parts of its training forwards may run again in the backward, unseen by hooks of the method's."""
        return True

    @property
    def one_label(self) -> str:
        """Why an image must have one label, where it must: "name, which counts ..."."""
        return ""

    @property
    def no_sync(self) -> str:
        """Why BatchNorm cannot take its statistics of all processes' rows, where it cannot: "name, which ..."."""
        varies = f"{self.name}, whose forwards differ from process to process" if self.sizes_vary else ""
        return self.no_compile or varies

    def phase(self, state: State) -> Hashable:
        """What a step takes from ``state``, its memory's tensors apart, or from elsewhere on the host.

        A CUDA graph of a step is recorded anew when this changes; None: the step is not to be recorded. A number that a
        tensor can hold, such as a growing weight, is better given by ``changing``.
        """
        return ()

    def changing(self, state: State) -> tuple[float, ...]:
        """Numbers of a step that change over training, such as a growing weight; the step reads them by ``numbers``."""
        return ()

    def numbers(self, state: State, device: torch.device) -> Tensor:
        """``changing``, float32 on the device. Nothing waits for it, and a graph of the step takes them as an input."""
        return on_device(self.changing(state), device) if state.numbers is None else state.numbers

    def variant(self, state: State) -> Hashable:
        """Which of the steps that take turns within a phase this one is: each keeps its graph."""
        return ()

    def parts(self, state: State) -> Sequence[tuple[float, Method]]:
        """The methods whose steps take turns, each with its share."""
        return [(1.0, self)]

    def require(self, model: nn.Module) -> None:  # noqa: B027 (most methods train any network)
        """Raises ValueError, naming what is missing and how to provide it, for a network the method cannot train."""

    def require_memory(self, memory: Mapping[str, Tensor], shape: Sequence[int]) -> None:  # noqa: B027 (most keep none)
        """Raises ValueError for a checkpoint's memory that this method cannot have left.

        shape: of the training images, [N, C, H, W].
        """

    def store_bytes(self, shape: Sequence[int]) -> int:
        """The memory that ``stores`` take for training images [N, C, H, W]."""
        return 0

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:  # noqa: B027 (as above)
        """Does what is due now and then, for the batch that comes next: makes and renews what ``state.memory`` keeps.

        It runs eagerly, outside of graphs of the step. A tensor of the memory is written to in place, so that graphs
        stay valid. Images are as the loader gives them, before any are mixed.
        """

    def remembered(self, state: State, name: str) -> Tensor:
        """A tensor of ``state.memory`` that ``before_step`` makes. Raises ValueError where it was not called."""
        if name not in state.memory:
            raise ValueError(
                f"{self.name}: state.memory has no {name!r}: before each step call before_step(model, batch, key, "
                "state) with the same state, or take step(), which does"
            )
        return state.memory[name]

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Any:
        """What the loss takes as given: adversaries, weights of samples, directions. No gradient flows through it.

        Args:
            model: takes images [B, C, H, W] in [0, 1], gives logits; in the mode that the training forward needs.
            batch: x [B, C, H, W] float, y int64 [B], ids int64 [B] (the samples' numbers in the set).
            key: the noise key of this step, int64 [2]. Same key, weights and batch: same loss, bit for bit.
        """
        return None

    @abstractmethod
    def objective(self, model: nn.Module, batch: Batch, given: Any) -> tuple[Tensor, Metrics]:
        """The loss, with a graph to the parameters, and detached 0-dim tensors worth logging.

        ``given`` is what ``prepare`` made of this batch. Nothing waits for the device. Metrics "clean" and "adv" are
        accuracies in [0, 1] on forwards made anyway.
        """

    def loss(self, model: nn.Module, batch: Batch, key: Tensor, state: State | None = None) -> tuple[Tensor, Metrics]:
        """``objective`` on what ``prepare`` makes."""
        return self.objective(model, batch, self.prepare(model, batch, key, state or State()))

    def step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        """``before_step``, then ``train_step``: what a training loop calls for every batch."""
        self.before_step(model, batch, key, state)
        return self.train_step(model, batch, key, state, descent)

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        """Trains on one batch: ``updates`` steps of the optimiser. Returns the (detached) loss and metrics."""
        loss, metrics = self.loss(model, batch, key, state)
        descent.backward(loss, metrics)
        descent.step()
        self.after_step(model, batch)
        return loss.detach(), metrics

    def after_step(self, model: nn.Module, batch: Batch) -> None:  # noqa: B027 (most methods do nothing)
        """What a method does to the model once the weights are updated: some published code runs it once more."""


def on_device(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Numbers of the host, float32 [n], without a wait for the device."""
    made = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
