"""Jacobian regularisation (Hoffman, Roberts & Yaida 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from atlas_kernels.outputs import logits_of

from ..data import Batch
from ..options import Norm, Switches, option
from .base import EVERY_NORM, Method, Metrics, State
from .double_backward import jacobian_penalty, twice_differentiable, unit_vectors
from .terms import accuracy, uncompiled


@dataclass(frozen=True)
class Jacobian(Method):
    """Jacobian regularisation (Hoffman, Roberts & Yaida 2019, arXiv 1908.02729): L = CE(z(x), y) + weight R,

        R = C / (2 n B) sum_k sum_i ||d(v_ki . z_i) / dx_i||^2,    an estimate of mean_i ||dz_i / dx_i||_F^2 / 2

    with n random unit vectors v per sample, or exactly, with the C basis vectors. One forward serves CE and R, with
    BatchNorm as it is; in train mode it couples the rows, here as there. There is no attack and eps plays no part.
    3 + 3n passes.

    The published README has weight 0.01; its MNIST example has 0.1 for images divided by 0.3081, which is 0.0095 for
    images in [0, 1].
    """

    name: ClassVar[str] = "jacobian"
    no_compile: ClassVar[str] = "jacobian, which differentiates a gradient at the input once more"
    norms: ClassVar[tuple[Norm, ...]] = EVERY_NORM
    adversarial: ClassVar[bool] = False

    switches: ClassVar[Switches] = {"projections": [("weight", (0,))]}

    weight: float = option(0.01, "weight of R", low=0)
    projections: int = option(1, "random projections n; -1: the C basis vectors, which is exact", low=-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projections == 0:
            raise ValueError("jacobian: projections must be an integer >= 1, or -1 for the exact norm, got 0")

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        """The key, from which the projections are drawn once the number of classes is seen."""
        return key

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        leaf = batch.x.detach().requires_grad_()
        with twice_differentiable():
            logits = logits_of(uncompiled(model)(leaf))
        penalty = jacobian_penalty(logits, leaf, self._directions(logits, given, batch.ids)).mean()
        loss = self.ce(logits, batch) + self.weight * penalty
        return loss, {"clean": accuracy(logits, batch), "jacobian": penalty.detach()}

    def _directions(self, logits: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        """Unit vectors [B, n, C]."""
        if self.projections > 0:
            return unit_vectors(logits, key, ids, self.projections)
        return torch.eye(logits.shape[1], device=logits.device).expand(len(logits), -1, -1)
