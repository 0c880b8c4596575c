"""Argument checks that the operators and the attacks share: each names the argument, the value and the remedy.

Metadata (dtype, device, shape, layout, scalar ranges) is always checked. Values inside tensors are checked always on
the CPU, and on CUDA once per attack, never under capture; ``ATLAS_CHECKS=0|1`` overrides.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .capture import capturing
from .core import first_outside
from .environment import did_you_mean, setting
from .layout import compute_dtype, contiguous, is_supported, plane_shape, require_memory
from .transforms import followed, is_wrapped

_LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def value_checks_enabled(t: Tensor, *, attack: bool = False, name: str = "") -> bool:
    """Whether to look at the values of ``t``: on CUDA only once per ``attack``, since looking waits for the device; not
    at what a transform of torch.func has.

    ``name``: what to call it where its memory was freed, so that looking would end the process.
    """
    if torch.compiler.is_compiling() or capturing(t.is_cuda) or is_wrapped(t):
        return False
    override = setting("ATLAS_CHECKS")
    if override == "0" or (override is None and t.device.type != "cpu" and not (attack and t.is_cuda)):
        return False
    if name:
        require_memory(name, t)
    return True


def kind_of(value: object) -> str:
    """What stands in the place of a tensor, and how to make one of it."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if type(value).__module__ == "numpy" and hasattr(value, "__array_interface__"):
        return "a NumPy array; torch.from_numpy makes a tensor of it"
    return type(value).__name__


def require_strided(name: str, t: Tensor) -> None:
    """A tensor of plain numbers, neither sparse nor nested nor quantized."""
    if t.is_nested:
        raise TypeError(f"{name} must be a strided tensor, got nested; call torch.nested.to_padded_tensor")
    if t.is_quantized:
        raise TypeError(f"{name} must be a strided tensor, got quantized; call .dequantize()")
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {t.layout}; call .to_dense()")


def require_integers(name: str, t: Tensor) -> None:
    """A tensor of class indices, integers of any width."""
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex():
        raise TypeError(f"{name} must be an integer tensor of class indices, got {kind_of(t)}")
    if t.dtype != torch.int64 or t.layout != torch.strided or t.is_nested:
        require_strided(name, t)


def whole(name: str, value: int, least: int, largest: int = 2**31 - 1) -> int:
    """An integer, Python's or NumPy's, in [least, largest]. A tensor is none: reading it would wait for the device."""
    if type(value) is not int:
        try:
            number = None if isinstance(value, (bool, Tensor)) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(f"{name} must be an integer, got {_shown(value)}")
        value = number
    if not least <= value <= largest:
        bound = f"least {least}" if value < least else f"most {largest}"
        raise ValueError(f"{name} must be an integer of at {bound}, got {value}")
    return value


def flag(name: str, value: bool) -> bool:
    """True or False, Python's or NumPy's."""
    if value is True or value is False:
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def _shown(value: object) -> str:
    shown = f"a tensor {list(value.shape)}; call .item()" if isinstance(value, Tensor) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def require_float_images(name: str, t: Tensor) -> None:
    """A dense-layout float tensor with a batch dimension."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind_of(t)}")
    if t.dtype not in FLOATS:
        hint = "; divide images in 0..255 by 255 first" if not t.is_floating_point() and not t.is_complex() else ""
        raise TypeError(f"{name} must be a float tensor, got {t.dtype}{hint}")
    if t.layout != torch.strided or t.is_nested:
        require_strided(name, t)
    if t.ndim == 0:
        raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")


def require_like(name: str, t: Tensor, other: str, like: Tensor, *, dtype: bool) -> None:
    """Images of the same shape and device as ``like`` (and, if ``dtype``, of its dtype)."""
    if (  # the common case, quickly
        isinstance(t, Tensor)
        and not t.is_nested
        and (t.dtype == like.dtype or (not dtype and t.dtype in FLOATS))
        and t.shape == like.shape
        and t.device == like.device
        and t.layout == torch.strided
    ):
        return
    require_float_images(name, t)
    if t.shape != like.shape:
        raise ValueError(f"{name} has shape {list(t.shape)}, {other} has {list(like.shape)}: they must be equal")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, {other} on {like.device}: move them to one device")
    if dtype and t.dtype != like.dtype:
        raise TypeError(f"{name} is {t.dtype}, {other} is {like.dtype}: convert one with .to()")


def require_out(name: str, t: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None) -> None:
    """A tensor that a kernel can write: float, not expanded, contiguous or channels_last."""
    require_float_images(name, t)
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and what is written into it has no gradient: give {name}.detach()")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the images on {like.device}: move them to one device")
    if dtype is not None and t.dtype != dtype:
        raise TypeError(f"{name} is {t.dtype}, expected {dtype}")
    if not is_supported(t):
        raise ValueError(
            f"{name} has strides {t.stride()}: results are written only to tensors that are contiguous or "
            "channels_last and do not overlap themselves; allocate one with torch.empty_like"
        )


def per_sample(name: str, value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A non-negative number, or one per sample, as (number, None) or (0.0, float[B])."""
    if type(value) is float and 0.0 <= value <= _LARGEST:
        return value, None
    if isinstance(value, Tensor) and (value.is_nested or value.ndim or _differentiated(value)):
        require_strided(name, value)
        batch = like.shape[0]
        value = value if value.ndim else value.expand(batch)
        # [B, 1, 1] is no such shape: with images [B, C, H, W] it is one number per channel, by PyTorch's rules.
        if value.numel() != batch or value.shape[0] != batch or value.ndim not in (1, like.ndim):
            raise ValueError(f"{name} has shape {list(value.shape)}, expected one number or [{batch}], one per sample")
        return 0.0, _vector(name, value, like, non_negative=True)
    number = _number(name, value)
    if not number >= 0.0:
        raise ValueError(f"{name} must be a number >= 0, got {number}")
    return _in_range_of(like, number), None


def per_channel(name: str, value: float | Tensor | Sequence[float], like: Tensor) -> tuple[float, Tensor | None]:
    """A number, or one per channel, as (number, None) or (0.0, float[C])."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value, None
    several = not isinstance(value, (str, bytes)) if isinstance(value, Sequence) else isinstance(value, Tensor)
    if several and not (isinstance(value, Tensor) and not value.is_nested and value.ndim == 0):
        channels = plane_shape(like.shape)[1]
        vector = value if isinstance(value, Tensor) else _tensor_of(name, value, like)
        require_strided(name, vector)
        if like.ndim < 3 or vector.numel() != channels:
            last = like.ndim == 4 and like.shape[3] == vector.numel()
            hint = "; make images with the channels last [B, C, H, W] by .permute(0, 3, 1, 2)" if last else ""
            raise ValueError(
                f"{name} has {vector.numel()} values, expected one number, or one per channel of images [B, C, ...] "
                f"(here {list(like.shape)}){hint}"
            )
        return 0.0, _vector(name, vector, like, non_negative=False)
    number = _number(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} must not be NaN")
    return _in_range_of(like, number), None


def _in_range_of(like: Tensor, number: float) -> float:
    """Infinity for what is beyond float32 where images are computed in that."""
    if like.dtype == torch.float64 or abs(number) <= _LARGEST:
        return number
    return math.copysign(math.inf, number)


def _differentiated(t: Tensor) -> bool:
    return (t.requires_grad and torch.is_grad_enabled()) or followed(t)


def _number(name: str, value: object) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a number or a tensor, got the string {value!r}")
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a tensor, got {value}")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be a number or a tensor, got {kind_of(value)}") from error


def _tensor_of(name: str, values: object, like: Tensor) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float64, device=like.device)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must hold numbers, got {_shown(values)}") from error


def _vector(name: str, value: Tensor, like: Tensor, *, non_negative: bool) -> Tensor:
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the images on {like.device}: move them to one device")
    if value.numel() and value_checks_enabled(value, name=name):
        given = value.detach().reshape(-1)
        bad = ~(given >= 0) if non_negative else given.isnan()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"{name}[{row}] = {given[row].item()} is not a number{' >= 0' if non_negative else ''}")
    require_memory(name, value)
    return value.reshape(-1).to(compute_dtype(like.dtype)).contiguous()


def require_bytes(name: str, t: Tensor) -> None:
    """A uint8 set of images [N, C, H, W] or [N, H, W] that the kernels can address as it lies."""
    if not isinstance(t, Tensor) or t.dtype != torch.uint8:
        hint = "; (255 * x).round().to(torch.uint8) makes one of x" if isinstance(t, Tensor) else ""
        raise TypeError(f"{name} must be a uint8 tensor, got {kind_of(t)}{hint}")
    require_strided(name, t)
    if t.ndim not in (3, 4):
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [N, C, H, W] or [N, H, W]")
    require_channels_first(name, t)
    if not is_supported(t):
        raise ValueError(f"{name} has strides {t.stride()}: call .contiguous() once, before training")


def require_channels_first(name: str, t: Tensor) -> None:
    """Of a set of 8-bit images: the last side is no channel; 8 channels or more of 1 or 3 columns are no pictures."""
    if t.ndim == 4 and t.shape[3] in (1, 3) and min(t.shape[1:3]) >= 8:
        raise ValueError(
            f"{name} has shape {list(t.shape)}, which looks like [N, H, W, C], expected [N, C, H, W]: call "
            ".permute(0, 3, 1, 2), which copies nothing"
        )


def require_rows(name: str, index: Tensor, of: Tensor) -> None:
    """Rows of a resident set: int64 [B] on its device, all of which it has."""
    if not isinstance(index, Tensor) or index.is_nested or index.dtype != torch.int64 or index.ndim != 1:
        plain = isinstance(index, Tensor) and not index.is_nested
        got = f"{index.dtype} {list(index.shape)}" if plain else kind_of(index)
        raise TypeError(f"{name} must be an int64 tensor [B] of rows, got {got}; convert it with .long()")
    require_strided(name, index)
    if index.device != of.device:
        raise ValueError(f"{name} is on {index.device}, the images on {of.device}: move them to one device")
    if not index.numel() or not value_checks_enabled(index, name=name):
        return
    first = first_outside(index.contiguous(), of.shape[0])
    if first < index.shape[0]:
        raise ValueError(f"{name}[{first}] = {int(index[first])} is no row of the {of.shape[0]} images, counted from 0")


def require_active(active: Tensor, like: Tensor) -> None:
    """A bool tensor, one value per sample."""
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, got {kind_of(active)}")
    require_strided("active", active)
    if active.shape != like.shape[:1] or active.device != like.device:
        raise ValueError(
            f"active is {list(active.shape)} on {active.device}, expected [{like.shape[0]}] on {like.device}"
        )


def require_noise(key: Tensor, ids: Tensor | None, like: Tensor) -> None:
    """A noise key, and optional sample numbers."""
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be the tensor of noise_key({str(like.device)!r}), got {kind_of(key)}")
    require_strided("key", key)
    if key.dtype != torch.int64 or key.shape != (2,) or key.device != like.device:
        got = f"{key.dtype} {list(key.shape)} on {key.device}"
        raise ValueError(f"key must be the int64 [2] tensor of noise_key({str(like.device)!r}), got {got}")
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be an int64 tensor [{like.shape[0]}], got {kind_of(ids)}")
    require_strided("ids", ids)
    if ids.dtype != torch.int64 or ids.shape != like.shape[:1] or ids.device != like.device:
        raise ValueError(
            f"ids is {ids.dtype} {list(ids.shape)} on {ids.device}, expected int64 [{like.shape[0]}] on {like.device}"
        )


def draw_number(draw: int) -> int:
    """The number of a draw, which is one 32-bit word of the noise's counter."""
    return whole("draw", draw, 0, 2**32 - 1)


def require_images(x: Tensor, clip_min: float | Tensor = 0.0, clip_max: float | Tensor = 1.0) -> None:
    """Float images whose values lie in [clip_min, clip_max] (values as ``value_checks_enabled`` says, per attack)."""
    require_float_images("x", x)
    if not x.numel() or not value_checks_enabled(x, attack=True, name="x"):
        return
    x = x.detach()
    low, high = (_bound(b, x) for b in (clip_min, clip_max))
    if bool(((x >= low) & (x <= high)).all()):
        return
    if bool(x.isnan().any()):
        raise ValueError(f"x contains NaN, first at index {x.isnan().nonzero()[0].tolist()}: clean the images first")
    least, most = float(low.min()), float(high.max())
    excess = max(float((low - x).max()), float((x - high).max()))
    if excess <= 0.1 * (most - least):  # by rounding, or by what bicubic resizing overshoots
        remedy = f"pass x.clamp({least:g}, {most:g})"
    elif float(x.max()) > 1.5 and least == 0.0:
        remedy = "images in 0..255 must be divided by 255; normalisation belongs inside the model"
    else:
        remedy = "normalisation belongs inside the model"
    digits = 6 if excess > 1e-5 else 9  # enough to see what is outside
    raise ValueError(
        f"x has values in [{float(x.min()):.{digits}g}, {float(x.max()):.{digits}g}], up to {excess:.2g} outside "
        f"[clip_min, clip_max] = [{least:.6g}, {most:.6g}]; {remedy}"
    )


def _bound(value: float | Tensor | Sequence[float], x: Tensor) -> Tensor:
    number, vector = per_channel("clip bound", value, x)
    if vector is None:
        return torch.full((), number, dtype=x.dtype, device=x.device)
    return vector.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the names on offer; the error proposes the nearest."""
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def number_in(name: str, value: float, low: float, high: float = math.inf) -> float:
    """A number in [low, high]."""
    if isinstance(value, Tensor) and _differentiated(value):
        raise ValueError(f"{name} has no gradient: it is a constant of the loss, so pass float({name}.detach())")
    number = value if type(value) is float else _number(name, value)
    if not low <= number <= high:
        allowed = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a number {allowed}, got {number}")
    return number


def dense_logits(name: str, t: Tensor, other: str = "", like: Tensor | None = None) -> Tensor:
    """Float logits [B, C] of at least two classes, contiguous; of the shape, dtype and device of ``like``."""
    if not isinstance(t, Tensor) or t.dtype not in FLOATS:
        hint = "; pass its .logits" if isinstance(getattr(t, "logits", None), Tensor) else ""
        raise TypeError(f"{name} must be a float tensor, got {kind_of(t)}{hint}")
    if t.layout != torch.strided or t.is_nested:
        require_strided(name, t)
    if t.ndim != 2 or t.shape[1] < 2:
        hint = "; stack a single logit z of two classes as [-z/2, z/2]" if t.ndim == 2 and t.shape[1] == 1 else ""
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [batch, classes], two classes or more{hint}")
    if like is not None:
        require_like(name, t, other, like, dtype=True)
    return contiguous(name, t)


def class_indices(
    name: str, t: Tensor, like: Tensor, classes: int | None = None, *, batch: int | None = None, attack: bool = False,
    of: str = "the logits have",
) -> Tensor:  # fmt: skip
    """int64 [batch] class indices, contiguous, below ``classes`` where their number is known; integers of any width are
    welcome.

    like: logits or images, on whose device they lie; batch: how many there are (default: one for each of its rows).
    attack: on CUDA too their values are looked at (see ``value_checks_enabled``). of: what the message says has them.
    """
    require_integers(name, t)
    batch = like.shape[0] if batch is None else batch
    if t.ndim != 1 or t.shape[0] != batch or t.device != like.device:
        raise ValueError(
            f"{name} is {list(t.shape)} on {t.device}, expected [{batch}] on {like.device}, one per sample"
        )
    bound = classes if batch and classes is not None and value_checks_enabled(t, attack=attack, name=name) else None
    if t.dtype != torch.int64:
        require_memory(name, t)
        t = t.to(torch.int64)
    t = contiguous(name, t)
    if bound is not None and (row := first_outside(t, bound)) < batch:
        raise ValueError(f"{name}[{row}] = {int(t[row])} is not a class: {of} {bound}, from 0 on")
    return t


def target_distributions(name: str, t: Tensor, like: Tensor) -> Tensor:
    """A distribution over the classes per row of ``like``: numbers >= 0, in the dtype that it is computed in."""
    if t.layout != torch.strided or t.is_nested:
        require_strided(name, t)
    if t.shape != like.shape or t.device != like.device:
        raise ValueError(
            f"{name} is {t.dtype} {list(t.shape)} on {t.device}, expected integers [{like.shape[0]}], or distributions "
            f"{list(like.shape)} like the logits, on {like.device}"
        )
    require_memory(name, t)
    made = contiguous(name, t.to(compute_dtype(like.dtype)))
    if t.numel() and value_checks_enabled(t):
        found = made.detach()
        least, most = (float(bound) for bound in found.aminmax())  # NaN, where there is any
        if not 0.0 <= least <= most < math.inf:
            row, c = (int(i) for i in (~((found >= 0) & (found < math.inf))).nonzero()[0])
            number = t.detach()[row, c].item()
            remedy = f"give numbers >= 0, finite in {made.dtype}"
            raise ValueError(f"{name}[{row}, {c}] = {number} is no share of a class: {remedy}")
    return made


def sample_weights(weights: Tensor, batch: int, like: Tensor) -> Tensor:
    """A weight per sample, [batch], in the dtype that ``like`` is computed in."""
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"weights must be a real tensor [{batch}], got {kind_of(weights)}")
    require_strided("weights", weights)
    if weights.ndim != 1 or weights.shape[0] != batch or weights.device != like.device:
        raise ValueError(
            f"weights is {list(weights.shape)} on {weights.device}, expected [{batch}] on {like.device}, one per sample"
        )
    require_memory("weights", weights)
    made = weights.to(compute_dtype(like.dtype)).contiguous()
    if made.dtype != weights.dtype == torch.float64 and value_checks_enabled(weights):
        lost = made.isinf() & weights.isfinite()
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"weights[{row}] = {float(weights[row])} does not fit {made.dtype}, which the logits are computed in: "
                "give smaller ones, or float64 logits"
            )
    return made
