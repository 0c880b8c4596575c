"""The l_inf perturbation operators through the door: all four are one native pass with parts left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import require_apart
from ...layout import compute_dtype, plane_shape
from ...noise import STREAM_NEIGHBOUR, STREAM_START
from . import core
from .door import ABSENT, DoorError, images, vector, where

_NO_NOISE = (None, None, 0)


def _pass(  # type: ignore[no-untyped-def]
    adv: Tensor, grad: Tensor | None, x: Tensor | None, out_x, out_adv, cast, out_z, eps, step_size, radius, bounds,
    active, noise, count, descend=False, project=False, stream=STREAM_NEIGHBOUR,
) -> None:
    shape, device, dtype = adv.shape, adv.device, compute_dtype(adv.dtype)
    batch, channels, pixels = plane_shape(adv)
    key, ids, draw = noise
    if count and key is None:
        raise DoorError("noise needs a key")
    z_shape = shape if count == 1 else torch.Size((count * batch, *shape[1:]))
    core().perturb(
        *images("adv", adv, shape, device),
        *(ABSENT if grad is None else images("grad", grad, shape, device)),
        *(ABSENT if x is None else images("x", x, shape, device)),
        *(ABSENT if out_x is None else images("out", out_x, shape, device)),
        *(ABSENT if out_adv is None else images("out", out_adv, shape, device)),
        *(ABSENT if cast is None else images("cast", cast, shape, device)),
        *(ABSENT if out_z is None else images("out", out_z, z_shape, device)),
        batch, channels, pixels,
        eps[0], eps[1] is not None and vector("eps", eps[1], batch, dtype, device),
        step_size[0], step_size[1] is not None and vector("step_size", step_size[1], batch, dtype, device),
        radius[0], radius[1] is not None and vector("radius", radius[1], batch, dtype, device),
        bounds[0], bounds[1] is not None and vector("clip_min", bounds[1], channels, dtype, device),
        bounds[2], bounds[3] is not None and vector("clip_max", bounds[3], channels, dtype, device),
        active is not None and vector("active", active, batch, torch.bool, device),
        key is not None and vector("key", key, 2, torch.int64, device),
        ids is not None and vector("ids", ids, batch, torch.int64, device),
        count, descend, project, stream, draw & 0xFFFFFFFF, *where(device),
    )  # fmt: skip


_ZERO = (0.0, None)


def random_start(x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out):  # type: ignore[no-untyped-def]
    require_apart("out", out, ("x", x, 0))
    _pass(
        x, None, None, None, None, None, out, _ZERO, _ZERO, (eps, eps_rows), (clip_min, min_rows, clip_max, max_rows),
        None, (key, ids, draw), 1, stream=STREAM_START,
    )  # fmt: skip


def pgd_step(  # type: ignore[no-untyped-def]
    adv, grad, x, eps, eps_rows, step_size, step_rows, clip_min, min_rows, clip_max, max_rows, descend, active, out, cast
):
    require_apart("out", out, ("adv", adv, 0), ("x", x, 0), ("grad", grad, 0))
    if cast is not None:
        require_apart("cast", cast, ("adv", adv, -1), ("x", x, -1), ("grad", grad, -1), ("out", out, -1))
    _pass(
        adv, grad, x, None, out, cast, None, (eps, eps_rows), (step_size, step_rows), _ZERO,
        (clip_min, min_rows, clip_max, max_rows), active, _NO_NOISE, 0, descend,
    )  # fmt: skip


def sample_neighbours(  # type: ignore[no-untyped-def]
    adv, radius, radius_rows, count, x, eps, eps_rows, clip_min, min_rows, clip_max, max_rows, key, ids, draw, out
):
    require_apart("out", out, ("adv", adv, 0 if count == 1 else -1), ("x", x, -1))
    _pass(
        adv, None, x, None, None, None, out if count else None, (eps, eps_rows), _ZERO, (radius, radius_rows),
        (clip_min, min_rows, clip_max, max_rows), None, (key, ids, draw), count, project=x is not None,
    )  # fmt: skip


def pgd_step_neighbours(  # type: ignore[no-untyped-def]
    adv, grad, x, eps, eps_rows, step_size, step_rows, radius, radius_rows, count, project, include_x,
    clip_min, min_rows, clip_max, max_rows, descend, active, key, ids, draw, out
):
    batch, first = adv.shape[0], int(include_x)
    if out.shape[0] != (first + 1 + count) * batch:
        raise DoorError(f"out has {out.shape[0]} rows, expected {(first + 1 + count) * batch}")
    require_apart("out", out, ("adv", adv, first * batch), ("x", x, 0 if include_x else -1), ("grad", grad, -1))
    _pass(
        adv, grad, x, out[:batch] if include_x else None, out[first * batch : (first + 1) * batch], None,
        out[(first + 1) * batch :] if count else None, (eps, eps_rows), (step_size, step_rows), (radius, radius_rows),
        (clip_min, min_rows, clip_max, max_rows), active, (key, ids, draw), count, descend, project,
    )  # fmt: skip
