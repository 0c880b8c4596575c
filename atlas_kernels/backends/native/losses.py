"""The losses through the door: all of them are one native function, told apart by a number (``AtlasLoss`` in api.h)."""

from __future__ import annotations

import torch

from ...core import core
from ...layout import compute_dtype
from ..door import DoorError, float_code, rows, where

_CROSS_ENTROPY, _KL_DIV, _TRADES, _MART, _ENTROPY, _MARGIN, _DLR, _LOGIT_PAIRING, _ATLAS = range(9)
_NONE = 3  # AtlasTerm


def _run(
    loss, batch, logits, adv_logits, labels, targets, weights, parameter, scale, value, total, grad, adv_grad,
    atlas=(0, 0, 0.0, _NONE, 0.0), terms=None,
) -> None:  # fmt: skip
    if logits.ndim != 2 or not logits.shape[1]:
        raise DoorError(f"logits are {list(logits.shape)}, expected [batch, classes]")
    shape, dtype, device = logits.shape, logits.dtype, logits.device
    wide, size = compute_dtype(dtype), (batch,)
    core().losses(
        loss, batch, shape[1], float_code("logits", logits),
        rows("logits", logits, shape, dtype, device),
        0 if adv_logits is None else rows("adv_logits", adv_logits, shape, dtype, device),
        0 if labels is None else rows("labels", labels, size, torch.int64, device),
        0 if targets is None else rows("targets", targets, size, torch.int64, device),
        0 if weights is None else rows("weights", weights, size, wide, device),
        parameter, scale,
        rows("value", value, size, wide, device),
        0 if total is None else rows("total", total, (), wide, device),
        0 if grad is None else rows("grad", grad, shape, dtype, device),
        0 if adv_grad is None else rows("adv_grad", adv_grad, shape, dtype, device),
        *atlas, 0 if terms is None else rows("terms", terms, (3, batch), wide, device), *where(device),
    )  # fmt: skip


def cross_entropy(logits, labels, label_smoothing, weights, scale, value, total, grad):
    _run(
        _CROSS_ENTROPY, logits.shape[0], logits, None, labels, None, weights, label_smoothing, scale, value, total,
        grad, None,
    )  # fmt: skip


def kl_div(p_logits, q_logits, weights, scale, value, total, p_grad, q_grad):
    batch = p_logits.shape[0]
    _run(_KL_DIV, batch, p_logits, q_logits, None, None, weights, 0.0, scale, value, total, p_grad, q_grad)


def trades_loss(logits, adv_logits, labels, beta, weights, scale, value, total, grad, adv_grad):
    batch = logits.shape[0]
    _run(_TRADES, batch, logits, adv_logits, labels, None, weights, beta, scale, value, total, grad, adv_grad)


def mart_loss(logits, adv_logits, labels, beta, weights, scale, value, total, grad, adv_grad):
    batch = logits.shape[0]
    _run(_MART, batch, logits, adv_logits, labels, None, weights, beta, scale, value, total, grad, adv_grad)


def entropy(logits, weights, scale, value, total, grad):
    _run(_ENTROPY, logits.shape[0], logits, None, None, None, weights, 0.0, scale, value, total, grad, None)


def margin_loss(logits, labels, weights, scale, value, total, grad):
    _run(_MARGIN, logits.shape[0], logits, None, labels, None, weights, 0.0, scale, value, total, grad, None)


def dlr_loss(logits, labels, targets, weights, scale, value, total, grad):
    _run(_DLR, logits.shape[0], logits, None, labels, targets, weights, 0.0, scale, value, total, grad, None)


def logit_pairing(logits, adv_logits, weights, scale, value, total, grad, adv_grad):
    batch = logits.shape[0]
    _run(_LOGIT_PAIRING, batch, logits, adv_logits, None, None, weights, 0.0, scale, value, total, grad, adv_grad)


def atlas_loss(
    logits, labels, local, local_weight, global_term, global_weight, weights, scale, value, total, grad, terms
):
    batch, first = labels.shape[0], 1 if global_term == _NONE else 2
    parts = logits.shape[0] // batch if batch else first
    if parts < first or parts * batch != logits.shape[0] or local == _NONE:
        raise DoorError(f"logits have {logits.shape[0]} rows for {batch} labels, local {local}, global {global_term}")
    atlas = (parts - first, local, local_weight, global_term, global_weight)
    _run(_ATLAS, batch, logits, None, labels, None, weights, 0.0, scale, value, total, grad, None, atlas, terms)


def gairat_weights(kappa, steps, lam, out):
    size, device = kappa.shape[:1], kappa.device
    addresses = rows("kappa", kappa, size, torch.int64, device), lam, rows("out", out, size, torch.float32, device)
    core().gairat_weights(kappa.shape[0], steps, *addresses, *where(device))
