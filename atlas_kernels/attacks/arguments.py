"""Checks of what attacks are given, in the words of their users."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from ..checks import require_choice as require_choice
from ..checks import require_strided, value_checks_enabled, whole


def require_count(name: str, value: int, least: int) -> None:
    """An integer of at least ``least``."""
    whole(name, value, least)


def require_radius(
    name: str,
    value: float | Tensor,
    *,
    clip_min: float | Tensor | Sequence[float] | None = None,
    clip_max: float | Tensor | Sequence[float] | None = None,
) -> None:
    """Finite and not negative; below 1 if the image range is given and is [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor [B], got {value!r}")
    if isinstance(value, Tensor):
        require_strided(name, value)
        if not value.numel() or not value_checks_enabled(value, name=name):
            return
        low, high = float(value.min()), float(value.max())
    else:
        low = high = float(value)
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {high if low >= 0 else low}")
    bounds = [bound for bound in (clip_min, clip_max) if isinstance(bound, Real)]
    if bounds == [0, 1] and high >= 1:
        raise ValueError(
            f"{name}={high:g} covers all of [0, 1]: it has the unit of the images, so write 8/255 for 8 grey levels; "
            "give clip_min and clip_max if your images have another range"
        )


def numbers(*values: tuple[float, Tensor | None]) -> list[float | Tensor]:
    """Numbers, or tensors of numbers, that no graph hangs on."""
    return [number if rows is None else rows.detach() for number, rows in values]
