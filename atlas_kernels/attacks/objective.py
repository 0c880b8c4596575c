"""What an attack climbs: the objective per sample, and its derivative with respect to the logits (the cotangent).

A sign step needs only the sign of the input gradient, and that is one vector-Jacobian product of the network with the
cotangent: no loss, no loss graph, no mean over the batch whose 1/B underflows in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import require_labels

Model = Callable[[Tensor], Tensor]


@dataclass
class Objective:
    """Cross-entropy towards ``labels``, or KL(p_ref || p) where ``reference`` holds log p_ref.

    labels: int64[B] or None (KL only). reference: float[B, C] or None. targeted: the labels are where the attack wants
    the prediction to go, so it descends their cross-entropy. 16-bit logits are computed with in float32.
    """

    labels: Tensor | None = None
    reference: Tensor | None = None
    targeted: bool = False
    checked: bool = False

    def cotangent(self, logits: Tensor) -> Tensor:
        """d(objective)/d(logits), [B, C] in the dtype of the logits: p - onehot(y) for CE, p - p_ref for KL.

        For a targeted attack this is the derivative of the cross-entropy that it descends.
        """
        p = _wide(logits).softmax(1)
        if self.reference is not None:
            return (p - self.reference.exp()).to(logits.dtype)
        assert self.labels is not None
        classes = torch.arange(p.shape[1], device=p.device)
        return torch.where(self.labels[:, None] == classes, p - 1, p).to(logits.dtype)

    def judge(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How strong a sample is: (objective float[B], larger is stronger, so -CE if targeted; fooled bool[B]).

        fooled: the prediction differs from the label, or, if targeted, equals it; all False without labels.
        """
        z = _wide(logits.detach())
        if self.reference is not None:
            value = F.kl_div(z.log_softmax(1), self.reference, reduction="none", log_target=True).sum(1)
            if self.labels is None:
                return value, torch.zeros_like(value, dtype=torch.bool)
        assert self.labels is not None
        fooled = (z.argmax(1) == self.labels) == self.targeted
        if self.reference is None:
            value = F.cross_entropy(z, self.labels, reduction="none") * (-1 if self.targeted else 1)
        return value, fooled

    def rows(self, index: Tensor) -> Objective:
        """The same objective for some of the samples."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            reference=None if self.reference is None else self.reference[index],
        )

    def logits(self, model: Model, x: Tensor) -> Tensor:
        """model(x), checked to be [B, C]; the first time also the labels' values. An empty batch skips the model."""
        if not len(x):
            return x.new_zeros(0, 1)
        z = model(x)
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(x):
            got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise TypeError(f"model must return logits [{len(x)}, classes], got {got}: wrap it in a function that does")
        if self.reference is not None and self.reference.shape != z.shape:
            raise ValueError(
                f"reference_logits has shape {list(self.reference.shape)}, but the model's logits {list(z.shape)}"
            )
        if self.labels is not None and not self.checked:
            require_labels(self.labels, z.shape[1])
        self.checked = True
        return z

    def gradient(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        """One forward and one backward to the input alone: (logits, d(objective)/dx)."""
        if not len(x):
            return self.logits(model, x), torch.zeros_like(x)
        leaf = x.detach().requires_grad_()
        z = self.logits(model, leaf)
        if not z.requires_grad:
            raise RuntimeError(
                "the model's logits carry no gradient to its input: it runs under no_grad, detaches, or is quantised; "
                "a gradient attack needs a differentiable model"
            )
        return z, torch.autograd.grad(z, leaf, self.cotangent(z.detach()))[0]


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax, in float32 for 16-bit logits; a constant."""
    return _wide(logits.detach()).log_softmax(1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
