"""The l_inf perturbation operators through the door: all four are one native pass with parts left out."""

from __future__ import annotations

import torch

from ...core import core
from ...layout import compute_dtype, plane_shape
from ...noise import STREAM_NEIGHBOUR, STREAM_START
from ..door import ABSENT, DoorError, images, vector, where


def _pass(
    adv, grad, x, out_x, out_adv, cast, out_z, eps, eps_rows, step_size, step_rows, radius, radius_rows,
    clip_min, min_rows, clip_max, max_rows, active, key, ids, draw, count, descend, project, stream,
) -> None:  # fmt: skip
    shape, device = adv.shape, adv.device
    batch, channels, pixels = plane_shape(shape)
    dtype = compute_dtype(adv.dtype)
    core().perturb(
        *images("adv", adv, shape, device),
        *(ABSENT if grad is None else images("grad", grad, shape, device)),
        *(ABSENT if x is None else images("x", x, shape, device)),
        *(ABSENT if out_x is None else images("out", out_x, shape, device)),
        *(ABSENT if out_adv is None else images("out", out_adv, shape, device)),
        *(ABSENT if cast is None else images("cast", cast, shape, device)),
        *(ABSENT if out_z is None else images("out", out_z, (count * batch, *shape[1:]), device)),
        batch, channels, pixels,
        eps, 0 if eps_rows is None else vector("eps", eps_rows, batch, dtype, device),
        step_size, 0 if step_rows is None else vector("step_size", step_rows, batch, dtype, device),
        radius, 0 if radius_rows is None else vector("radius", radius_rows, batch, dtype, device),
        clip_min, 0 if min_rows is None else vector("clip_min", min_rows, channels, dtype, device),
        clip_max, 0 if max_rows is None else vector("clip_max", max_rows, channels, dtype, device),
        0 if active is None else vector("active", active, batch, torch.bool, device),
        0 if key is None else vector("key", key, 2, torch.int64, device),
        0 if ids is None else vector("ids", ids, batch, torch.int64, device),
        count, descend, project, stream, draw & 0xFFFFFFFF, *where(device),
    )  # fmt: skip


def random_start(x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):
    _pass(
        x, None, None, None, None, None, out, 0.0, None, 0.0, None, eps, eps_rows,
        clip_min, min_rows, clip_max, max_rows, None, key, ids, draw, 1, False, False, STREAM_START,
    )  # fmt: skip


def pgd_step(
    adv, grad, x, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active,
    out, cast,
):  # fmt: skip
    _pass(
        adv, grad, x, None, out, cast, None, eps, eps_rows, step_size, step_rows, 0.0, None,
        clip_min, min_rows, clip_max, max_rows, active, None, None, 0, 0, descend, False, STREAM_NEIGHBOUR,
    )  # fmt: skip


def sample_neighbours(
    adv, radius, radius_rows, count, x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out
):
    _pass(
        adv, None, x, None, None, None, out if count else None, eps, eps_rows, 0.0, None, radius, radius_rows,
        clip_min, min_rows, clip_max, max_rows, None, key, ids, draw, count, False, x is not None, STREAM_NEIGHBOUR,
    )  # fmt: skip


def pgd_step_neighbours(
    adv, grad, x, eps, eps_rows, step_size, step_rows, radius, radius_rows, count, project, include_x, clip_min,
    min_rows, clip_max, max_rows, descend, active, key, ids, draw, out,
):  # fmt: skip
    batch, first = adv.shape[0], int(include_x)
    if out.shape[0] != (first + 1 + count) * batch:
        raise DoorError(f"out has {out.shape[0]} rows, expected {(first + 1 + count) * batch}")
    _pass(
        adv, grad, x, out[:batch] if include_x else None, out[first * batch : (first + 1) * batch], None,
        out[(first + 1) * batch :] if count else None, eps, eps_rows, step_size, step_rows, radius, radius_rows,
        clip_min, min_rows, clip_max, max_rows, active, key, ids, draw, count, descend, project, STREAM_NEIGHBOUR,
    )  # fmt: skip
