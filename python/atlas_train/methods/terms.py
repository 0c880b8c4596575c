"""The terms that losses are made of, on logits [B, C]: plain PyTorch, float32 inside (float64 stays float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32, as every term computes, autocast or not."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of CE(logits, y). logits [k * B, C] and y [B]: the labels repeat k times."""
    if len(logits) != len(y):
        y = y.repeat(len(logits) // len(y))
    return F.cross_entropy(wide(logits), y)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Mean over the batch of KL(p || q) = sum_c p_c (log p_c - log q_c); gradients to both sides.

    From logits on both sides, so that a class of probability zero gives 0 and not NaN. q_logits may be [k * B, C]: the
    mean is then over its rows, and row k * B + i is compared with row i of p.
    """
    log_p, log_q = F.log_softmax(wide(p_logits), 1), F.log_softmax(wide(q_logits), 1)
    log_q = log_q.view(-1, *log_p.shape)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of ||b - a||^2 (summed over the classes). b may be [k * B, C], as in ``kl``."""
    return (wide(b).view(-1, *a.shape) - wide(a)).square().sum(-1).mean()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the batch whose largest logit is the label's; a 0-dim float32 tensor, detached."""
    return (logits.detach().argmax(1) == y).float().mean()
