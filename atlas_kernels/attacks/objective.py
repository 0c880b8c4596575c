"""What an attack climbs: the objective per sample, and its derivative with respect to the logits (the cotangent).

A sign step needs only the sign of the input gradient, and that is one vector-Jacobian product of the network with the
cotangent: no loss, no loss graph, no mean over the batch. What underflows in float16 all the same: see ``float16.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capture import capturing
from ..checks import class_indices
from ..layout import compute_dtype
from ..objectives import Cotangent, attack_cotangent
from ..outputs import Model as Model
from ..outputs import logits_of, require_rows_of_logits
from ..vjp import vjp
from . import float16
from .held import modules_of

Made = tuple[Tensor, ...]


@dataclass
class Objective:
    """One of the objectives of ``attack_cotangent``, towards ``labels`` or, for "kl", away from ``reference``; or
    "ce_targeted", minus the cross-entropy of ``targets``.

    labels: int64[B] or None (KL only). reference: logits [B, C], a constant, or None. targeted: the labels are where
    the attack wants the prediction to go, so it descends. targets: int64[B], the classes to reach, for "dlr_targeted"
    and "ce_targeted"; what is right goes by the labels. kappa: int64[B] that counts, at every cotangent, where the
    prediction is right. classes: the model's, known from the first forward on. 16-bit logits are computed with in
    float32.

    Of the model, as it is found in the attack: in_float16, whether it runs in that; coupled, whether samples depend on
    each other. watched: who records the attack asks afterwards whether a sample was ``lost`` in float16.
    """

    labels: Tensor | None = None
    reference: Tensor | None = None
    targeted: bool = False
    kind: str = "ce"
    targets: Tensor | None = None
    classes: int | None = None
    kappa: Tensor | None = None
    in_float16: bool | None = None
    coupled: bool | None = None
    watched: bool = False
    lost: Tensor | None = None

    def cotangent(self, logits: Tensor) -> Tensor:
        """d(objective)/d(logits), [B, C] in the dtype of the logits: p - onehot(y) for CE, p - p_ref for KL.

        For a targeted attack this is the derivative of the objective that it descends.
        """
        made = self._of(logits, kappa=self.kappa).cotangent
        assert made is not None
        return made.to(logits.dtype)

    def judge(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How strong a sample is: (objective float[B], larger is stronger, so negated if targeted; fooled bool[B]).

        fooled: the prediction differs from the label, or, if targeted, equals it; all False without labels. Where the
        network says nothing, its logits being NaN, the sample is fooled (without a target) and none is stronger; none
        is weaker where the logit of the label is infinite.
        """
        labelled = self.labels is not None
        _, correct, value = self._of(
            logits, descend=self.targeted, return_cotangent=False, return_value=True, return_correct=labelled
        )
        assert value is not None
        nothing = value.isnan()
        if correct is None:
            return torch.where(nothing, torch.inf, value), torch.zeros_like(nothing)
        fooled = correct if self.targeted else ~correct
        weakest = nothing & correct & (not self.targeted)
        return torch.where(nothing, torch.where(weakest, -torch.inf, torch.inf), value), fooled

    def _of(self, logits: Tensor, **options: Any) -> Cotangent:
        reference = self.reference
        if reference is not None and reference.dtype != logits.dtype:
            dtype = torch.promote_types(reference.dtype, logits.dtype)
            logits, reference = logits.to(dtype), reference.to(dtype)
        logits = logits.detach()
        if self.kind == "ce_targeted":
            return self._towards_targets(logits, **options)
        return attack_cotangent(
            logits, self.labels, objective=self.kind, reference=reference, targets=self.targets, **options
        )

    def _towards_targets(
        self, logits: Tensor, *, descend: bool = False, return_correct: bool = False, **options: Any
    ) -> Cotangent:
        made = attack_cotangent(logits, self.targets, descend=not descend, **options)
        if not return_correct:
            return made
        _, correct, _ = attack_cotangent(logits, self.labels, return_cotangent=False, return_correct=True)
        return made._replace(correct=correct)

    def rows(self, index: Tensor) -> Objective:
        """The same objective for some of the samples."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            reference=None if self.reference is None else self.reference[index],
            targets=None if self.targets is None else self.targets[index],
        )

    def learn(self, other: Objective) -> None:
        """Copies what ``other`` has found out about the model, which is the same."""
        self.classes, self.in_float16, self.coupled = other.classes, other.in_float16, other.coupled

    def logits(self, model: Model, x: Tensor) -> Tensor:
        """Those of model(x), checked to be [B, C]; the first time also the labels' values. An empty batch skips it."""
        if not len(x):
            return x.new_zeros(0, 4 if self.reference is None else self.reference.shape[1])
        z = logits_of(model(x))
        require_rows_of_logits(z, x)
        if self.reference is not None and self.reference.shape != z.shape:
            raise ValueError(
                f"reference_logits has shape {list(self.reference.shape)}, but the model's logits {list(z.shape)}"
            )
        if self.labels is not None and self.classes is None:
            class_indices("y", self.labels, z, z.shape[1], attack=True)
        self.classes = z.shape[1]
        return z

    def gradient(self, model: Model, x: Tensor, *, sized: bool = True) -> tuple[Tensor, Tensor]:
        """One forward and one backward to the input alone: (logits, d(objective)/dx).

        sized: False where only the direction matters: it may then be each sample's gradient times a positive number,
        which does not underflow. In float16 it is float32, and samples that are lost there cost more passes.
        """
        if not len(x):
            return self.logits(model, x), torch.zeros_like(x)
        if self._is_unwatched(model, x):
            self._is_coupled(model)
            with float16.in_float32(model, x) as network:
                return self._gradient(network, x.to(compute_dtype(x.dtype)), sized)
        return self._gradient(model, x, sized)

    def traced(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        """A leaf of x's values, and its logits with their graph."""
        leaf = (x.clone() if x.is_inference() else x).detach().requires_grad_()  # autograd has no use for those
        z = self.logits(model, leaf)
        if not z.requires_grad:
            raise RuntimeError(
                "the model's logits carry no gradient to its input: it runs under no_grad, detaches, or is quantised; "
                "a gradient attack needs a differentiable model"
            )
        return leaf, z

    def _gradient(self, model: Model, x: Tensor, sized: bool) -> tuple[Tensor, Tensor]:
        leaf, z = self.traced(model, x)
        if self.in_float16 is None:
            self.in_float16 = float16.is_used(model, leaf, z)
        if self.in_float16:
            return self._gradient_of_float16(model, leaf, z, sized)
        if z.dtype == torch.bfloat16:
            cotangent = self.cotangent(self.bounded(model, float16.wide(z), sized)) * float16.LIFT
            grad = vjp(z, leaf, cotangent)
            return z, grad / float16.LIFT if sized else grad
        return z, vjp(z, leaf, self.cotangent(self.bounded(model, z.detach(), sized)))

    def _gradient_of_float16(self, model: Model, x: Tensor, z: Tensor, sized: bool) -> tuple[Tensor, Tensor]:
        """``gradient`` in float16: x is the leaf, and z its logits."""
        coupled = self._is_coupled(model)
        cotangent = replace(self, kappa=None).cotangent(self.bounded(model, float16.wide(z), sized))
        grad, unit, lost = float16.pulled_back(z, x, cotangent, coupled)
        z, grad = self._mended(model, x, lost, (z.detach(), grad * unit if sized else grad), Objective._plain_gradient)
        if self.kappa is not None:
            self.count(z)
        return z, grad

    def _plain_gradient(self, model: Model, x: Tensor) -> Made:
        leaf, z = self.traced(model, x)
        grad, unit, _ = float16.pulled_back(z, leaf, self.cotangent(float16.wide(z)), bool(self.coupled))
        return z.detach(), grad * unit

    def _mended(
        self, model: Model, x: Tensor, lost: Tensor, made: Made, make: Callable[[Objective, Model, Tensor], Made]
    ) -> Made:
        """``made`` of float16, with what was lost in the rows ``lost`` (bool [B]) made in float32."""
        if capturing(x.is_cuda):
            self.lost = lost.any() if self.lost is None else self.lost | lost.any()
            return made
        rows = lost.nonzero()[:, 0].to(x.device)
        if not len(rows):
            return made
        x, goal = float16.wide(x), replace(self, kappa=None)
        if goal.coupled:
            rows = torch.arange(len(x), device=x.device)
        else:
            x, goal = x[rows], goal.rows(rows)
        try:
            with float16.leaving_state(model, x, bool(goal.coupled)), float16.in_float32(model, x) as network:
                found = make(goal, network, x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"{len(rows)} images lost their gradient or logits in float16, and the model does not run in float32, "
                f"in which they would be kept ({error}): attack it in bfloat16 or float32",
                stacklevel=2,
            )
            return made
        wide = map(float16.wide, made)
        return tuple(old.index_copy(0, rows, new.to(old.dtype)) for old, new in zip(wide, found, strict=True))

    def _is_coupled(self, model: Model) -> bool:
        """Whether samples depend on each other; looked for once."""
        self.coupled = float16.are_coupled(model) if self.coupled is None else self.coupled
        return self.coupled

    def _is_unwatched(self, model: Model, x: Tensor) -> bool:
        """Whether what is lost in float16 would never be found."""
        return capturing(x.is_cuda) and not self.watched and float16.is_asked_for(model, x)

    def bounded(self, model: Model, z: Tensor, sized: bool) -> Tensor:
        """The logits with that of the label at most 40 above all others, which keeps CE's cotangent from underflow.

        It is (1 - p_y) times (softmax of the others; -1), so only its size changes: by a number of each sample's own,
        which matters where samples depend on each other. A cotangent that is overridden may have any direction there.
        """
        if sized or self.kind != "ce" or self.labels is None or type(self).cotangent is not Objective.cotangent:
            return z
        if self._is_coupled(model):
            return z
        label = self.labels[:, None]
        others = z.scatter(1, label, -torch.inf).amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        return z.scatter(1, label, torch.minimum(z.gather(1, label), others + 40))

    def count(self, logits: Tensor) -> None:
        """Add to ``kappa`` where the prediction is right."""
        self._of(logits, kappa=self.kappa, return_cotangent=False)

    @torch.no_grad()
    def predict(self, model: Model, x: Tensor) -> Tensor:
        """The logits without a graph, of finite value where the model in float32 has one."""
        if not len(x):
            return self.logits(model, x)
        x = x.clone()  # without a graph a network may write into its input, which is the caller's
        if self._is_unwatched(model, x):
            with float16.in_float32(model, x) as network:
                return self.logits(network, x)
        z = self.logits(model, x)
        low = float16.is_used(model, x, z) if self.in_float16 is None else self.in_float16
        if not low:
            return z
        self._is_coupled(model)
        return self._mended(model, x, ~z.isfinite().all(1), (z,), lambda goal, *case: (goal.logits(*case),))[0]


def never_alone(model: Model, x: Tensor) -> Model:
    """``model`` for samples of the batch x, of which a single one is run beside two others if BatchNorm takes its
    statistics from the batch: of one sample it may have none."""
    norms = [m for m in modules_of(model) if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]
    return _Beside(model, x[:2]) if norms and len(x) > 1 else model


class _Beside(nn.Module):
    def __init__(self, model: Model, others: Tensor) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return logits_of(self.model(x))
        return logits_of(self.model(torch.cat([x, self.others.to(x.dtype)])))[:1]
