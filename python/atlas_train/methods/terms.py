"""What methods report of logits [B, C]."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the batch whose largest logit is the label's; a 0-dim float32 tensor, detached."""
    return (logits.detach().argmax(1) == y).float().mean()
