"""The l2 and l1 perturbation operators through the door: all three are one native pass with parts left out."""

from __future__ import annotations

import torch

from ...core import core
from ...layout import compute_dtype, plane_shape
from ...noise import STREAM_START
from ...schema import NORMS
from ..door import ABSENT, DoorError, images, vector, where


def _pass(
    adv, grad, x, out, cast, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows,
    descend=False, active=None, largest=0, key=None, ids=None, draw=0,
) -> None:  # fmt: skip
    shape, device = adv.shape, adv.device
    batch, channels, pixels = plane_shape(shape)
    dtype = compute_dtype(adv.dtype)
    if not (grad is not None or key is not None) <= norm < len(NORMS):
        raise DoorError(f"norm is {norm}, expected an index of {NORMS}, of linf for project alone")
    if not 0 <= largest <= max(0, channels * pixels):
        raise DoorError(f"largest is {largest}, expected 0 to {channels * pixels}, the entries of a sample")
    core().perturb_norm(
        *images("adv", adv, shape, device),
        *(ABSENT if grad is None else images("grad", grad, shape, device)),
        *images("x", x, shape, device),
        *images("out", out, shape, device),
        *(ABSENT if cast is None else images("cast", cast, shape, device)),
        batch, channels, pixels,
        eps, 0 if eps_rows is None else vector("eps", eps_rows, batch, dtype, device),
        step_size, 0 if step_rows is None else vector("step_size", step_rows, batch, dtype, device),
        clip_min, 0 if min_rows is None else vector("clip_min", min_rows, channels, dtype, device),
        clip_max, 0 if max_rows is None else vector("clip_max", max_rows, channels, dtype, device),
        0 if active is None else vector("active", active, batch, torch.bool, device),
        0 if key is None else vector("key", key, 2, torch.int64, device),
        0 if ids is None else vector("ids", ids, batch, torch.int64, device),
        largest, norm, descend, STREAM_START, draw & 0xFFFFFFFF, *where(device),
    )  # fmt: skip


def random_start_norm(x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    bounds = clip_min, min_rows, clip_max, max_rows
    _pass(x, None, x, out, None, norm, eps, eps_rows, 0.0, None, *bounds, key=key, ids=ids, draw=draw)


def pgd_step_norm(
    adv, grad, x, norm, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast, largest,
):  # fmt: skip
    bounds = clip_min, min_rows, clip_max, max_rows
    _pass(adv, grad, x, out, cast, norm, eps, eps_rows, step_size, step_rows, *bounds, descend, active, largest)


def project(v, x, norm, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, out):
    _pass(v, None, x, out, None, norm, eps, eps_rows, 0.0, None, clip_min, min_rows, clip_max, max_rows)
