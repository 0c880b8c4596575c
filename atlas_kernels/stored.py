"""The operators of a perturbation that is kept for each training image from epoch to epoch (FGSM-PGI; Jia et al. 2022,
"Prior-guided adversarial initialization for fast adversarial training", arXiv 2207.08859): the start of the attack, and
its step, which also updates the image's perturbation. l_inf only.

The store is two tensors with a row for each image: ``stored``, the perturbations, and ``momentum``, by which they move;
``index`` says which rows the batch has. Both may be of any float type, but for float16 momentum: computed is in float32
(float64 for such images), and rounded once on the way back. bfloat16 halves the memory. float16 is refused for
``momentum``, whose entries are about 1 over the pixels of a batch, too small for it.

The bits are the same on every backend, for float32 images (``||g||_1`` is summed in float64 and then rounded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .backends.reference import stored as plain
from .checks import (
    per_channel,
    per_sample,
    require_float_images,
    require_like,
    require_out,
    require_rows,
    value_checks_enabled,
)
from .core import advise_huge_pages
from .layout import compute_dtype, dense, is_supported
from .transforms import followed

_stored_start = backends.caller("stored_start")
_stored_step = backends.caller("stored_step")

_Bound = float | Tensor | Sequence[float]


def stored_start(
    x: Tensor,
    stored: Tensor,
    index: Tensor,
    *,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """The start at each image's stored perturbation: ``clip(x + stored[index])``.

    Args:
        x: images [B, ...].
        stored: perturbations [N, ...], a row for each image of the set.
        index: rows of the store, int64 [B] in [0, N).
        clip_min, clip_max: image range, one number or one per channel; infinite: no clip, as in the authors' code.
        out: result tensor of x's shape, of any float type and either layout (the network's), or ``x`` itself.

    Returns a tensor of x's dtype and layout, unless ``out`` says otherwise. Differentiable in ``x`` and ``stored``.
    Raises ``TypeError`` and ``ValueError`` that name the argument. Where the values of ``index`` are not checked (on
    CUDA, by default), a sample whose row the store lacks becomes NaN.
    """
    require_float_images("x", x)
    x = dense(x)
    _require_store("stored", stored, x)
    require_rows("index", index, stored)
    _require_batch(index, x)
    bounds = (*per_channel("clip_min", clip_min, x), *per_channel("clip_max", clip_max, x))
    if followed(x, stored) or (torch.is_grad_enabled() and (x.requires_grad or stored.requires_grad)):
        if out is not None:
            raise ValueError("out= does not work with arguments that require grad: leave it out, or detach first")
        return plain.start(x, stored, index, bounds).to(x.dtype)
    out = _result(x, out)
    _stored_start(x, stored, index.contiguous(), *bounds, out)
    return out


def stored_step(
    x: Tensor,
    grad: Tensor,
    stored: Tensor,
    momentum: Tensor,
    index: Tensor,
    eps: float | Tensor,
    *,
    step_size: float | Tensor | None = None,
    decay: float = 0.3,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """FGSM-PGI's adversary, and the update of the images' perturbations, in one pass after one sum.

    With ``d`` and ``m`` the rows ``index`` of ``stored`` and ``momentum``, and ``ball`` the clip to +-eps::

        adv = clip(x + ball(d + step_size * sign(grad)))
        m <- grad / ||grad||_1 + decay * m            ||grad||_1 of the whole batch
        d <- ball(d + step_size * sign(m))            and so that x + d stays in the image range

    The step goes on from ``d``, not from the start, which may have been clipped. Where ``||grad||_1`` is 0, infinite or
    NaN the store stays as it is. A pixel whose gradient is 0 or NaN has no step.

    Args:
        x: clean images [B, ...].
        grad: gradient of the attack's loss at ``stored_start``, any float dtype.
        stored, momentum: the store, [N, ...] each; their rows ``index`` are written. No float16 for ``momentum``.
        index: rows of the store, int64 [B] in [0, N), no row twice.
        eps: radius, one number or float [B].
        step_size: one number or float [B]; default: eps.
        decay: of the momentum, at least 0.
        clip_min, clip_max: image range, one number or one per channel.
        out: result tensor of x's shape, of any float type and either layout (the network's), or ``x`` or ``grad``.

    Returns the adversaries in x's dtype and layout, unless ``out`` says otherwise; a constant for autograd. Raises
    ``TypeError`` and ``ValueError`` that name the argument. Where the values of ``index`` are not checked (on CUDA, by
    default), a sample whose row the store lacks becomes NaN and writes none, and where several samples share a row,
    each pixel of the row keeps the numbers of any one of them.
    """
    require_float_images("x", x)
    require_like("grad", grad, "x", x, dtype=False)
    x, grad = dense(x.detach()), dense(grad.detach())
    for name, store in (("stored", stored), ("momentum", momentum)):
        _require_store(name, store, x)
        if store.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and what is written into it has no gradient: give .detach()")
    if momentum.dtype == torch.float16:
        raise TypeError(
            "momentum is torch.float16, and its entries, about 1 over the pixels of a batch, are too small for that: "
            "make it float32 or bfloat16"
        )
    if momentum.shape != stored.shape:
        raise ValueError(f"momentum has shape {list(momentum.shape)}, stored has {list(stored.shape)}: make them equal")
    require_rows("index", index, stored)
    _require_batch(index, x)
    if len(index) > 1 and value_checks_enabled(index):
        ordered = index.sort().values
        if bool((ordered[1:] == ordered[:-1]).any()):
            row = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
            raise ValueError(f"index has row {row} twice: a batch may write each row of the store once")
    radius = per_sample("eps", eps, x)
    step = radius if step_size is None else per_sample("step_size", step_size, x)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < math.inf:
        raise ValueError(f"decay must be a finite number >= 0, got {decay!r}")
    bounds = (*per_channel("clip_min", clip_min, x), *per_channel("clip_max", clip_max, x))
    if grad.dtype == torch.float64 != x.dtype and grad.numel():
        largest = grad.abs().amax()  # a common factor changes nothing, and float32 holds what is left
        grad = (grad / torch.where((largest > 0) & (largest < math.inf), largest, 1.0)).to(compute_dtype(x.dtype))
    out = _result(x, out)
    _stored_step(x, grad, stored, momentum, index.contiguous(), *radius, *step, float(decay), *bounds, out)
    return out


def _require_store(name: str, t: Tensor, x: Tensor) -> None:
    require_float_images(name, t)
    if t.ndim != x.ndim or t.shape[1:] != x.shape[1:]:
        shape = ", ".join(["N", *map(str, x.shape[1:])])
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [{shape}]: a row for each image of the set")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, the images on {x.device}: move them to one device")
    if not is_supported(t):
        raise ValueError(f"{name} has strides {t.stride()}: call .contiguous() once, before training")


def _require_batch(index: Tensor, x: Tensor) -> None:
    if index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {list(index.shape)}, expected [{x.shape[0]}], one row for each image")


def _result(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return advise_huge_pages(torch.empty_like(x))
    require_out("out", out, x.shape, x, None)
    return out
