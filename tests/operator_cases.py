"""Inputs and bitwise comparison that the operator tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_kernels as ak
from atlas_kernels.backends import BackendUnavailable, forced_backend
from atlas_kernels.layout import is_channels_last

SHAPES = [
    (2, 3, 8, 8),
    (1, 1, 28, 28),
    (5, 3, 7, 5),
    (3, 4, 1, 1),
    (2, 5, 3, 3),
    (4, 10),
    (7,),
    (2, 3, 9),
    (2, 2, 3, 2, 3),
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN equal to any NaN; +0 and -0 differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.isnan()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    a, b, both = a.contiguous().view(integers), b.contiguous().view(integers), nan & b.isnan()
    return bool(torch.equal(nan, both)) and bool(((a == b) | both).all())


def to_layout(t: Tensor, channels_last: bool) -> Tensor:
    """``t`` in the asked memory order, where it has one."""
    return t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t.contiguous()


def problem(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layouts: str = "ccc",
    special: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(adv, grad, x) of one attack step; layouts: "c" contiguous or "l" channels_last, one letter each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    adv = (x + 0.1 * (2 * torch.rand(shape, generator=g) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.1)
    if special:
        for t in (adv, grad, x):
            values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, 1e-45])
            pick = torch.randint(len(values), shape, generator=g)
            t.copy_(torch.where(torch.rand(shape, generator=g) < 0.2, values[pick], t))
    made = (adv.to(dtype), grad.to(grad_dtype or dtype), x.to(dtype))
    adv, grad, x = (to_layout(t.to(device), c == "l") for t, c in zip(made, layouts, strict=True))
    return adv, grad, x


def label_start(x: Tensor, noise: Tensor, eps: float | Tensor, **how: Any) -> Tensor:
    """``label_noise_start`` with the images of ``noise`` as the noise of as many classes."""
    if not len(noise):
        noise = torch.ones(1, *noise.shape[1:], dtype=noise.dtype, device=noise.device)
    labels = torch.arange(len(x), device=x.device).flip(0) // 2
    return ak.label_noise_start(x, labels, noise, eps, **how)


def apgd_step(adv: Tensor, grad: Tensor, x: Tensor, eps: Any, step: Any, **how: Any) -> Tensor:
    """``apgd_step`` whose iterate before has the pixels of ``adv`` in reverse, in the order of memory of ``grad``."""
    old = to_layout(adv.flip(tuple(range(adv.ndim))), is_channels_last(grad))
    momentum = torch.linspace(0, 1, len(adv), device=adv.device) if isinstance(step, Tensor) else 0.75
    if how.get("norm") == "l1":
        how = {"largest": 1 + 7 * torch.arange(len(adv), device=adv.device) % max(1, adv[:1].numel()), **how}
    return ak.apgd_step(adv, old, grad, x, eps, step, momentum, **how)


def same_within_ulps(a: Tensor, b: Tensor, x: Tensor) -> bool:
    """Equal to four units in the last place of the largest of a, b and x (one, where 16 bits were rounded to; fp64,
    whose sums are not exact: to 1e-13), with NaN and infinities at the same places."""
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    size = torch.stack([a, b, x]).double().abs().nan_to_num(0, 0).amax(0)
    unit = torch.finfo(a.dtype).eps
    allowed = {2: size * unit, 4: size * 4 * unit, 8: size.clamp(min=1) * 1e-13}[a.element_size()]
    return bool(((a == b) | a.isnan() | ((a.double() - b.double()).abs() <= allowed)).all())


def refused(dtype: torch.dtype, call: Callable[[], object]) -> bool:
    """Whether the forced backend has no kernels for ``dtype``, which ``call`` must say: Triton has none for float64."""
    if dtype != torch.float64 or forced_backend() != "triton":
        return False
    with pytest.raises(BackendUnavailable, match="got float64"):
        call()
    return True


class Dispatched(TorchDispatchMode):
    """Keeps the names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))
