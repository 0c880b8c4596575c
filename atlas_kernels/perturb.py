"""The perturbation operators: random start, projected-gradient step and projection in the l_inf, l2 or l1 ball; in the
l_inf ball also local-neighbour sampling, and all in one.

Images are batches [B, C, H, W] (contiguous or channels_last; layouts may differ between arguments) or [B, ...]; other
strides are copied first. Values and radii are in one unit, images usually in [0, 1] and eps = 8/255 or 0.3. Images are
float32 or float64. 16-bit images are computed in float32 and rounded once on the way out, so they may leave the ball by
half a unit in the last place of the pixel: for bfloat16 at eps = 8/255 up to 0.002 near 1.0, which is 6 % of eps.

In l2 and l1 the length of a sample is taken in float64, where squares of float32 neither over- nor underflow, and
rounded once: the backends agree to 4 units in the last place (of the larger of pixel and way), usually to the bit, and
the number of threads does not matter. Clean images must lie in the range. A sample at no finite distance from its clean
image (a pixel is NaN or infinite) is clipped to the range but not projected.

Every operator is differentiable in its images and radii (not in the gradient, the clip bounds or the noise), with the
exact masks of the clips, any number of times. Where noise is drawn, ``key`` is a ``noise_key`` (default: a fresh one),
``ids`` the samples' numbers (default: base + row) and ``draw`` the number of the step or restart. In l2 and l1 the
gradients are those of the plain PyTorch definition, which also makes the result wherever one is asked for; in forward
mode and under the transforms of torch.func it does so in every norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.reference import perturb as plain_linf
from .backends.reference import perturb_norms as plain
from .checks import (
    class_indices,
    draw_number,
    flag,
    per_channel,
    per_sample,
    require_active,
    require_choice,
    require_float_images,
    require_like,
    require_noise,
    require_out,
    require_strided,
    value_checks_enabled,
    whole,
)
from .core import advise_huge_pages, alike
from .layout import column, compute_dtype, contiguous, dense, is_channels_last, require_memory
from .noise import noise_key
from .schema import L1, LINF, NORMS, SHARES, STREAM_START
from .transforms import followed

_random_start = backends.caller("random_start")
_label_noise_start = backends.caller("label_noise_start")
_pgd_step = backends.caller("pgd_step")
_sample_neighbours = backends.caller("sample_neighbours")
_pgd_step_neighbours = backends.caller("pgd_step_neighbours")
_random_start_norm = backends.caller("random_start_norm")
_pgd_step_norm = backends.caller("pgd_step_norm")
_apgd_step = backends.caller("apgd_step")
_apgd_step_norm = backends.caller("apgd_step_norm")
_project = backends.caller("project")

SPARSITY = 0.99  # of an l1 step; cleverhans' grad_sparsity (99 %) and foolbox's quantile
_Bound = float | Tensor | Sequence[float]
_MOST_NEIGHBOURS = 2**24 - 1  # that three bytes of the noise's counter can number
_INFINITE = (float("-inf"), None, float("inf"), None)


def random_start(
    x: Tensor,
    eps: float | Tensor,
    *,
    norm: str = LINF,
    key: Tensor | None = None,
    ids: Tensor | None = None,
    draw: int = 0,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Uniform start in the ball: ``clip(x + eps * u)`` (Madry et al. 2018, section 2).

    In l_inf ``u`` is uniform in [-1, 1). In l2 and l1 it is ``U^(1/D) z / ||z||``, U uniform in (0, 1), D the pixels of
    a sample with its channels, z normal (l2) or Laplace (l1), which is uniform in the unit ball. The clip only shortens
    the way from an x in the range, so the start stays in the ball. z is drawn from the words of the l_inf noise: two
    make two normal numbers (Box & Muller 1958), one makes a Laplace number; U is word 0 of the sample's own counter
    (c0 = 0, neighbour 1).

    Args:
        x: images [B, ...].
        eps: radius, one finite number or float [B].
        norm: "linf", "l2" or "l1".
        key, ids, draw: the noise (see the module's text); ``draw`` is the restart.
        clip_min, clip_max: image range, one number or one per channel.
        out: result tensor like ``x``, or ``x`` itself.

    Returns a tensor of x's dtype and layout. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    require_float_images("x", x)
    x = dense(x)
    radius = per_sample("eps", eps, x)
    _require_finite("eps", *radius)
    bounds = (*per_channel("clip_min", clip_min, x), *per_channel("clip_max", clip_max, x))
    noise = _noise(x, key, ids, draw)
    number = _number_of(norm)
    seen = followed(x, radius[1])
    if seen or _needs_grad(x, radius[1]):
        _refuse_out(out)
        if number:
            return plain.start(x, norm, radius, bounds, *noise).to(x.dtype)
        if seen:
            (start,) = plain_linf.neighbours(x, *radius, 1, None, 0.0, None, bounds, *noise, STREAM_START)
            return start.to(x.dtype)
        return _Neighbours.apply(x, None, radius[1], None, radius[0], 0.0, 1, bounds, noise, True)
    out = _like(x) if out is None else _checked(out, x.shape, x, x.dtype)
    if number:
        _random_start_norm(x, number, *radius, *bounds, *noise, out)
    else:
        _random_start(x, *radius, *bounds, *noise, out)
    return out


def label_noise_start(
    x: Tensor,
    labels: Tensor,
    label_noise: Tensor,
    eps: float | Tensor,
    *,
    share: tuple[float, float] = (0.1, 0.5),
    key: Tensor | None = None,
    ids: Tensor | None = None,
    draw: int = 0,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Start from the noise of the label (LIET, ICCV 2025): ``clip(x + sign * noise)``. The noise of a pixel is
    ``eps * u``, u uniform in [-1, 1), with probability r, else ``label_noise[label]`` at its place. r, uniform between
    the two numbers of ``share``, and the sign, 1 or -1, are drawn once a call, from the key and ``draw`` alone.

    Both draws of a pixel are of one word of noise: its 12 high bits say whether u takes the place of the label's noise,
    its 20 low bits are u, so r lies on a grid of 1/4096 and u on one of 2^-19. r and the sign are words 0 and 1 of the
    counter of sample 0 (c0 = 0, neighbour 1). Differentiable in ``label_noise`` too, by the plain PyTorch definition,
    which also makes the result wherever a gradient is asked for.

    Args:
        x: images [B, ...].
        labels: class indices [B].
        label_noise: a noise for each class, [classes, ...], of any float dtype.
        eps: radius of the uniform noise, one finite number or float [B].
        share: least and largest r, in [0, 1].
        key, ids, draw: the noise (see the module's text).
        clip_min, clip_max: image range, one number or one per channel.
        out: result tensor like ``x``, or ``x`` itself.

    Returns a tensor of x's dtype and layout. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    require_float_images("x", x)
    x = dense(x)
    require_float_images("label_noise", label_noise)
    if label_noise.shape[1:] != x.shape[1:] or label_noise.device != x.device or not len(label_noise):
        raise ValueError(
            f"label_noise is {list(label_noise.shape)} on {label_noise.device}, expected one image for each class, "
            f"[classes, {', '.join(map(str, x.shape[1:]))}] on {x.device}"
        )
    label_noise = dense(label_noise)
    labels = class_indices("labels", labels, x, label_noise.shape[0], of="label_noise has")
    radius = per_sample("eps", eps, x)
    _require_finite("eps", *radius)
    shares = _shares(share)
    bounds = (*per_channel("clip_min", clip_min, x), *per_channel("clip_max", clip_max, x))
    noise = _noise(x, key, ids, draw)
    if followed(x, label_noise, radius[1]) or _needs_grad(x, label_noise, radius[1]):
        _refuse_out(out)
        return plain_linf.label_start(x, labels, label_noise, *radius, *shares, bounds, *noise).to(x.dtype)
    out = _like(x) if out is None else _checked(out, x.shape, x, x.dtype)
    _label_noise_start(x, labels, label_noise, *radius, *shares, *bounds, *noise, out)
    return out


def _shares(share: tuple[float, float]) -> tuple[int, int]:
    """As the operator counts them."""
    try:
        low, high = map(float, share)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise ValueError(f"share must be two numbers, 0 <= least <= largest <= 1, got {share!r}")
    return round(SHARES * low), round(SHARES * high)


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    *,
    norm: str = LINF,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    descend: bool = False,
    sparsity: float | None = SPARSITY,
    active: Tensor | None = None,
    out: Tensor | None = None,
    cast: Tensor | None = None,
) -> Tensor:
    """One projected-gradient step: ``adv + step_size * sign(grad)``, into the eps-ball of x, into the image range
    (Madry et al. 2018, equation 2). A pixel whose gradient is 0 or NaN does not move.

    In l2 the step is ``adv + step_size * grad / ||grad||``. In l1 it is sparse as in SLIDE (Tramer & Boneh 2019, arXiv
    1904.13000): the entries at or above the ``sparsity`` quantile of ``|grad|`` move by equal shares in the direction
    of their signs, ``step_size`` in all. An entry goes no further than the image range; what it leaves of its share
    goes to the next largest entry, and entries that tie for the last place share what is left. In l2 and l1 a sample
    whose gradient is zero or has a NaN or an infinity does not move; the projection is that of ``project``.

    Args:
        adv, x: current iterate and clean images [B, ...], one dtype.
        grad: gradient of the objective at ``adv``, any float dtype.
        eps, step_size: one number or float [B].
        norm: "linf", "l2" or "l1".
        clip_min, clip_max: image range, one number or one per channel.
        descend: step down the gradient.
        sparsity: of l1 steps, in [0, 1]; 0.99 is the default of cleverhans and foolbox, AdverTorch has 0.95. None: the
            dense step along the gradient, ``adv + step_size * grad / ||grad||``. No other norm uses it.
        active: bool [B]; rows that are False keep ``adv`` as it is.
        out: result tensor like ``adv``, or ``adv`` itself (in place).
        cast: a second result of another float dtype or memory format with the same values, for the network to read.

    Returns a tensor of adv's dtype and layout. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    adv, x, grad = _stepping(adv, x, grad)
    ball, step = per_sample("eps", eps, adv), per_sample("step_size", step_size, adv)
    bounds = (*per_channel("clip_min", clip_min, adv), *per_channel("clip_max", clip_max, adv))
    descend = flag("descend", descend)
    if active is not None:
        require_active(active, adv)
        active = contiguous("active", active)
    if cast is not None:
        require_out("cast", cast, adv.shape, adv, None)
    number = _number_of(norm)
    if number:
        _require_finite("step_size", *step, " in l2 and l1")
        grad = _in_fp32_range(grad.detach(), adv)
        largest = _largest(sparsity, adv) if norm == L1 else 0
    seen = followed(adv, x, ball[1], step[1])
    if seen or _needs_grad(adv, x, ball[1], step[1]):
        _refuse_out(out, cast)
        if number:
            return plain.step(adv, grad, x, norm, ball, step, bounds, descend, active, largest).to(adv.dtype)
        if seen:
            return plain_linf.step(adv, grad.detach(), x, *ball, *step, bounds, descend, active).to(adv.dtype)
        return _PGDStep.apply(adv, x, ball[1], step[1], grad, ball[0], step[0], bounds, descend, active)
    out = _like(adv) if out is None else _checked(out, adv.shape, adv, adv.dtype)
    if number:
        _pgd_step_norm(adv, grad, x, number, *ball, *step, *bounds, descend, active, out, cast, largest)
    else:
        _pgd_step(adv, grad, x, *ball, *step, *bounds, descend, active, out, cast)
    return out


def apgd_step(
    adv: Tensor,
    old: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    momentum: float | Tensor,
    *,
    norm: str = LINF,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    descend: bool = False,
    largest: int | Tensor | None = None,
    active: Tensor | None = None,
    out: Tensor | None = None,
    cast: Tensor | None = None,
) -> Tensor:
    """One step of Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1) from ``adv``, whose iterate before was
    ``old``: ``z = P(adv + step_size * direction)``, then ``P(adv + m (z - adv) + (1 - m) (adv - old))`` with m the
    ``momentum``. P is the projection of ``project``; the direction is that of ``pgd_step``: the gradient's sign in
    l_inf, ``grad / ||grad||`` in l2. Where that is zero or no number, the momentum alone moves.

    In l1 there is no momentum, and ``old`` and ``momentum`` are not used (Croce & Hein 2021, arXiv 2103.01208, section
    4): the ``largest`` largest entries of ``|grad|``, and those that tie with the last of them, move by equal shares of
    ``step_size`` in the direction of their signs; entries of 0 do not. P is the nearest point of ball and range.

    Args:
        adv, old, x: current iterate, the one before (``adv`` itself in a first step) and clean images [B, ...], one
            dtype.
        grad: gradient of the objective at ``adv``, any float dtype.
        eps, step_size: one number or float [B].
        momentum: share of the step, in [0, 1]: one number or float [B]. The paper has 1 in the first step, then 0.75.
        norm: "linf", "l2" or "l1".
        clip_min, clip_max: image range, one number or one per channel.
        descend: step down the gradient.
        largest: of l1 steps: how many entries move, at least 1: an integer or int64 [B]. No other norm uses it.
        active: bool [B]; rows that are False keep ``adv`` as it is.
        out: result tensor like ``adv``, or ``adv`` or ``old`` itself (in place).
        cast: a second result of another float dtype or memory format with the same values, for the network to read.

    Returns a tensor of adv's dtype and layout. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    adv, x, grad = _stepping(adv, x, grad)
    if not alike(adv, old):
        require_like("old", old, "adv", adv, dtype=True)
        old = dense(old)
    ball, step = per_sample("eps", eps, adv), per_sample("step_size", step_size, adv)
    share = _momentum(momentum, adv)
    bounds = (*per_channel("clip_min", clip_min, adv), *per_channel("clip_max", clip_max, adv))
    descend = flag("descend", descend)
    if active is not None:
        require_active(active, adv)
        active = contiguous("active", active)
    if cast is not None:
        require_out("cast", cast, adv.shape, adv, None)
    number = _number_of(norm)
    counts = _counts(largest, adv) if norm == L1 else None
    if number:
        _require_finite("step_size", *step, " in l2 and l1")
        grad = _in_fp32_range(grad.detach(), adv)
    inputs = adv, old, x, ball[1], step[1], share[1]
    if followed(*inputs) or _needs_grad(*inputs):
        _refuse_out(out, cast)
        if number:
            return plain.apgd(adv, old, grad, x, norm, ball, step, share, bounds, descend, active, counts).to(adv.dtype)
        found = plain_linf.apgd(adv, old, grad.detach(), x, *ball, *step, *share, bounds, descend, active)
        return found.to(adv.dtype)
    out = _like(adv) if out is None else _checked(out, adv.shape, adv, adv.dtype)
    if number:
        _apgd_step_norm(
            adv, old, grad, x, number, *ball, *step, *share, *bounds, descend, active, out, cast, counts
        )  # fmt: skip
    else:
        _apgd_step(adv, old, grad, x, *ball, *step, *share, *bounds, descend, active, out, cast)
    return out


def project(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    *,
    norm: str = LINF,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``v`` brought into the eps-ball of ``x`` and into the image range.

    l_inf: clipped to both, which is the nearest point of their intersection. l2: scaled back to the ball, then clipped
    to the range (Rice et al. 2020, arXiv 2002.11569): in both, though not the nearest such point. l1: the nearest point
    of the intersection (Croce & Hein 2021, arXiv 2103.01208): every pixel loses the same lambda, and goes no further
    than the range; lambda is found by bracketed Newton steps and solved exactly on its linear piece.

    Args:
        v, x: points and clean images [B, ...], one dtype.
        eps: radius, one number or float [B].
        norm: "linf", "l2" or "l1".
        clip_min, clip_max: image range, one number or one per channel.
        out: result tensor like ``v``, or ``v`` itself (in place).

    Returns a tensor of v's dtype and layout. Raises ``TypeError`` and ``ValueError`` that name the argument.
    """
    if not alike(v, x):
        require_float_images("v", v)
        require_like("x", x, "v", v, dtype=True)
        v, x = dense(v), dense(x)
    ball = per_sample("eps", eps, v)
    bounds = (*per_channel("clip_min", clip_min, v), *per_channel("clip_max", clip_max, v))
    number = _number_of(norm)
    if followed(v, x, ball[1]) or _needs_grad(v, x, ball[1]):
        _refuse_out(out)
        return plain.inside(v, x, norm, ball, bounds).to(v.dtype)
    out = _like(v) if out is None else _checked(out, v.shape, v, v.dtype)
    _project(v, x, number, *ball, *bounds, out)
    return out


def sample_neighbours(
    adv: Tensor,
    radius: float | Tensor,
    count: int,
    *,
    x: Tensor | None = None,
    eps: float | Tensor | None = None,
    key: Tensor | None = None,
    ids: Tensor | None = None,
    draw: int = 0,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``count`` points uniform in the local l_inf ball around each adversary: ``clip(adv + radius * u_k)``; l_inf only.

    The local balls of ATLAS (Lu & Kumar 2021, arXiv 2110.14030). Whether they may leave the eps-ball of the clean image
    is not known from the paper: they may here, unless ``x`` and ``eps`` are given, which project them onto it.

    Args:
        adv: adversaries [B, ...].
        radius: one finite number or float [B].
        count: neighbours of each adversary, at least 0.
        x, eps: clean images like ``adv`` and the radius of their ball; both or neither.
        key, ids, draw, clip_min, clip_max: as in ``random_start``.
        out: result tensor [count * B, ...].

    Returns [count * B, ...]: neighbour k of sample i is row ``k * B + i``. Raises ``TypeError`` and ``ValueError`` that
    name the argument.
    """
    require_float_images("adv", adv)
    count = whole("count", count, 0, _MOST_NEIGHBOURS)
    if (x is None) != (eps is None):
        raise ValueError("x and eps go together: give both to project the neighbours onto x's eps-ball, or neither")
    adv = dense(adv)
    local = per_sample("radius", radius, adv)
    _require_finite("radius", *local)
    ball = per_sample("eps", 0.0 if eps is None else eps, adv)
    if x is not None:
        require_like("x", x, "adv", adv, dtype=True)
        x = dense(x)
    bounds = (*per_channel("clip_min", clip_min, adv), *per_channel("clip_max", clip_max, adv))
    noise = _noise(adv, key, ids, draw)
    seen = followed(adv, x, local[1], ball[1])
    if seen or _needs_grad(adv, x, local[1], ball[1]):
        _refuse_out(out)
        if seen:
            found = plain_linf.neighbours(adv, *local, count, x, *ball, bounds, *noise)
            return torch.cat([adv[:0], *found]).to(adv.dtype)
        return _Neighbours.apply(adv, x, local[1], ball[1], local[0], ball[0], count, bounds, noise, False)
    shape = (count * adv.shape[0], *adv.shape[1:])
    out = _stacked(shape, adv) if out is None else _checked(out, shape, adv, adv.dtype)
    _sample_neighbours(adv, *local, count, x, *ball, *bounds, *noise, out)
    return out


def pgd_step_neighbours(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    radius: float | Tensor,
    count: int,
    *,
    project: bool = False,
    include_x: bool = True,
    key: Tensor | None = None,
    ids: Tensor | None = None,
    draw: int = 0,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    descend: bool = False,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The last attack step, both clips and the neighbours in one pass, as the batch ``[x; adv'; z_1; ...; z_count]``;
    l_inf only.

    ``adv'`` is ``pgd_step(adv, grad, x, ...)`` and ``z_k`` the k-th slice of ``sample_neighbours(adv', ...)`` with the
    same noise; no noise tensor is made and nothing is concatenated.

    Args:
        project: also project the neighbours onto the eps-ball of ``x``.
        include_x: begin the batch with the clean images.
        out: result tensor [(include_x + 1 + count) * B, ...] of any float dtype and either layout (the network's).
            ``x`` and ``adv`` may already lie in their own slices of it.
        The others as in ``pgd_step`` and ``sample_neighbours``.

    Returns the batch, in adv's dtype and layout unless ``out`` says otherwise. Raises ``TypeError`` and ``ValueError``
    that name the argument.
    """
    adv, x, grad = _stepping(adv, x, grad)
    count = whole("count", count, 0, _MOST_NEIGHBOURS)
    project, include_x = flag("project", project), flag("include_x", include_x)
    descend = flag("descend", descend)
    ball, step = per_sample("eps", eps, adv), per_sample("step_size", step_size, adv)
    local = per_sample("radius", radius, adv)
    _require_finite("radius", *local)
    inputs = adv, x, ball[1], step[1], local[1]
    if followed(*inputs) or _needs_grad(*inputs):
        _refuse_out(out)
        wide, dtype = compute_dtype(adv.dtype), adv.dtype
        bounds: dict[str, Any] = {"clip_min": clip_min, "clip_max": clip_max}
        adv, x = adv.to(wide), x.to(wide)
        adv = pgd_step(adv, grad, x, eps, step_size, descend=descend, active=active, **bounds)
        around = {"x": x, "eps": eps} if project else {}
        z = sample_neighbours(adv, radius, count, key=key, ids=ids, draw=draw, **around, **bounds)  # type: ignore[arg-type]
        return torch.cat([*([x] if include_x else []), adv, z]).to(dtype)
    limits = (*per_channel("clip_min", clip_min, adv), *per_channel("clip_max", clip_max, adv))
    if active is not None:
        require_active(active, adv)
        active = contiguous("active", active)
    noise = _noise(adv, key, ids, draw)
    batch = adv.shape[0]
    shape = ((include_x + 1 + count) * batch, *adv.shape[1:])
    out = _stacked(shape, adv) if out is None else _checked(out, shape, adv, None)
    _pgd_step_neighbours(
        adv, grad, x, *ball, *step, *local, count, project, include_x, *limits, descend, active, *noise, out
    )
    return out


def _stepping(adv: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images of a step, checked, as the kernels can address them."""
    if alike(adv, x, grad):
        return adv, x, grad
    require_float_images("adv", adv)
    require_like("x", x, "adv", adv, dtype=True)
    require_like("grad", grad, "adv", adv, dtype=False)
    return dense(adv), dense(x), dense(grad)


def _noise(like: Tensor, key: Tensor | None, ids: Tensor | None, draw: int) -> tuple[Tensor, Tensor | None, int]:
    key = noise_key(like.device) if key is None else key
    require_noise(key, ids, like)
    return key.contiguous(), None if ids is None else contiguous("ids", ids), draw_number(draw)


def _number_of(norm: str) -> int:
    """What the operators call the norm."""
    if norm != LINF:
        require_choice("norm", norm, NORMS)
    return NORMS.index(norm)


def require_sparsity(sparsity: float | None) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if sparsity is not None and not (number and 0 <= sparsity <= 1):
        raise ValueError(f"sparsity must be a number in [0, 1], or None for a dense step, got {sparsity!r}")


def _largest(sparsity: float | None, like: Tensor) -> int:
    """How many entries lie at or above the quantile ``sparsity`` of a sample's; 0 for a dense step."""
    require_sparsity(sparsity)
    entries = math.prod(like.shape[1:])
    return 0 if sparsity is None or not entries else entries - math.ceil(sparsity * (entries - 1))


def _momentum(value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    number, rows = per_sample("momentum", value, like)
    wrong = number
    if rows is not None and value_checks_enabled(rows) and rows.numel():
        wrong = float(rows.detach().max())
    if wrong > 1:
        raise ValueError(f"momentum must be in [0, 1], got {wrong:g}: it is the share of the step, 0.75 in the paper")
    return number, rows


def _counts(largest: int | Tensor | None, like: Tensor) -> Tensor:
    """How many entries of each sample an l1 step of APGD moves."""
    entries = math.prod(like.shape[1:])
    if largest is None:
        raise ValueError(f"largest must be given in l1: how many of the {entries} entries of a sample's gradient move")
    if not isinstance(largest, Tensor):
        return torch.full(like.shape[:1], whole("largest", largest, 1, max(entries, 1)), device=like.device)
    require_strided("largest", largest)
    if largest.dtype != torch.int64 or largest.shape != like.shape[:1] or largest.device != like.device:
        raise ValueError(
            f"largest is {largest.dtype} {list(largest.shape)} on {largest.device}, expected an integer, or int64 "
            f"[{like.shape[0]}] on {like.device}, one per sample"
        )
    if largest.numel() and entries and value_checks_enabled(largest, name="largest"):
        least, most = (int(bound) for bound in largest.aminmax())
        if not 1 <= least <= most <= entries:
            wrong = least if least < 1 else most
            raise ValueError(f"largest must be 1 to {entries}, the entries of a sample, got {wrong}")
    return contiguous("largest", largest)


def _require_finite(name: str, number: float, rows: Tensor | None, where: str = "") -> None:
    """For what is multiplied by noise, or in l2 and l1 by a gradient: zeros times infinity are NaN."""
    unbounded = rows is not None and value_checks_enabled(rows) and not bool(rows.isfinite().all())
    if unbounded or not math.isfinite(number):
        raise ValueError(f"{name} must be finite{where}, got inf")


def _in_fp32_range(grad: Tensor, like: Tensor) -> Tensor:
    """An fp64 gradient over its sample's largest entry: then its length fits fp64, and its entries fp32."""
    if grad.dtype != torch.float64 or not grad.numel():
        return grad
    require_memory("grad", grad)
    largest = column(plain.flat(grad).abs().amax(1), grad)
    scaled = grad / torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    return scaled.to(compute_dtype(like.dtype))


def _needs_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False


def _refuse_out(*outs: Tensor | None) -> None:
    if any(out is not None for out in outs):
        raise ValueError(
            "out= and cast= do not work with arguments that require grad or have a tangent, nor in torch.func: leave "
            "them out, or detach first"
        )


def _checked(out: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None) -> Tensor:
    if shape != like.shape or not alike(like, out) or out.requires_grad:
        require_out("out", out, shape, like, dtype)
    return out


def _like(t: Tensor) -> Tensor:
    """A new tensor in the shape, dtype and layout of ``t``."""
    return advise_huge_pages(torch.empty_like(t))


def _stacked(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new tensor of several batches in the dtype and layout of ``like``."""
    layout = torch.channels_last if is_channels_last(like) and like.ndim == 4 else torch.contiguous_format
    return advise_huge_pages(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout))


def _over(values: Tensor, per_row: Tensor | None) -> Tensor | None:
    """Sum over everything but the batch, for a radius that has a gradient."""
    return None if per_row is None else values.flatten(1).sum(1)


def _column(value: float, per_row: Tensor | None, like: Tensor, dim: int = 0) -> Tensor | float:
    return value if per_row is None else per_row.view([-1 if i == dim else 1 for i in range(like.ndim)])


def _inside(v: Tensor, bounds: tuple[float, Tensor | None, float, Tensor | None]) -> Tensor:
    """Where the clip to the image range lets ``v`` (and its gradient) through."""
    low, low_rows, high, high_rows = bounds
    return ~((v < _column(low, low_rows, v, 1)) | (v > _column(high, high_rows, v, 1)))


class _Ball:
    """The projection on [x - eps, x + eps]: its value, and how a cotangent splits between point, centre and radius."""

    def __init__(self, v: Tensor, x: Tensor, eps: Tensor | float) -> None:
        low, high = x - eps, x + eps
        self.below = v < low
        self.value = torch.where(self.below, low, v)
        self.above = self.value > high
        self.value = torch.where(self.above, high, self.value)
        self.outside = self.below | self.above

    def split(self, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.where(self.outside, 0.0, cotangent)
        # Above, the point moves with the radius; below, against it.
        signed = torch.where(self.above, cotangent, -cotangent)
        return kept, cotangent - kept, torch.where(self.outside, signed, 0.0)


class _PGDStep(torch.autograd.Function):
    """``pgd_step`` with the gradients of its clips: a plain formula, so it can be differentiated again."""

    @staticmethod
    def forward(ctx, adv, x, eps_rows, step_rows, grad, eps, step_size, bounds, descend, active):  # type: ignore[no-untyped-def]
        out = _like(adv)
        _pgd_step(adv, grad, x, eps, eps_rows, step_size, step_rows, *bounds, descend, active, out, None)
        ctx.save_for_backward(adv, x, eps_rows, step_rows, grad, active)
        ctx.rest = eps, step_size, bounds, descend
        return out

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        adv, x, eps_rows, step_rows, grad, active = ctx.saved_tensors
        eps, step_size, bounds, descend = ctx.rest
        wide = compute_dtype(adv.dtype)
        g, centre = cotangent.to(wide), x.detach().to(wide)
        with torch.no_grad():
            direction = torch.sign(grad).to(wide) * (-1.0 if descend else 1.0)
            moved = adv.to(wide) + _column(step_size, step_rows, adv) * direction
            ball = _Ball(moved, centre, _column(eps, eps_rows, adv))
            passed = _inside(ball.value, bounds)
        kept_rows = None if active is None else column(active, adv)
        passing = torch.where(passed if kept_rows is None else passed & kept_rows, g, 0.0)
        to_adv, to_x, to_eps = ball.split(passing)
        to_step = _over(to_adv * direction, step_rows)
        if kept_rows is not None:
            to_adv = torch.where(kept_rows, to_adv, g)
        return to_adv.to(adv.dtype), to_x.to(x.dtype), _over(to_eps, eps_rows), to_step, *[None] * 6


class _Neighbours(torch.autograd.Function):
    """``sample_neighbours`` and ``random_start`` with the gradients of their clips; the noise is drawn again."""

    @staticmethod
    def forward(ctx, adv, x, radius_rows, eps_rows, radius, eps, count, bounds, noise, start):  # type: ignore[no-untyped-def]
        out = _stacked((count * adv.shape[0], *adv.shape[1:]), adv)
        if start:
            _random_start(adv, radius, radius_rows, *bounds, *noise, out)
        else:
            _sample_neighbours(adv, radius, radius_rows, count, x, eps, eps_rows, *bounds, *noise, out)
        ctx.save_for_backward(adv, x, radius_rows, eps_rows, *noise[:2])
        ctx.rest = radius, eps, count, bounds, noise[2], start
        return out

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        adv, x, radius_rows, eps_rows, key, ids = ctx.saved_tensors
        radius, eps, count, bounds, draw, start = ctx.rest
        wide = compute_dtype(adv.dtype)
        many = (count, *adv.shape)
        g = cotangent.to(wide).reshape(many)
        with torch.no_grad():
            zero = torch.zeros(adv.shape, dtype=wide, device=adv.device)
            noise = torch.empty((count * adv.shape[0], *adv.shape[1:]), dtype=wide, device=adv.device)
            if start:
                _random_start(zero, 1.0, None, *_INFINITE, key, ids, draw, noise)
            else:
                _sample_neighbours(zero, 1.0, None, count, None, 0.0, None, *_INFINITE, key, ids, draw, noise)
            noise = noise.view(many)
            v = adv.to(wide) + _column(radius, radius_rows, adv) * noise
            ball = None if x is None else _Ball(v, x.to(wide), _column(eps, eps_rows, adv))
            value = v if ball is None else ball.value
            passed = torch.stack([_inside(slice, bounds) for slice in value]) if count else value > 0
        to_adv = torch.where(passed, g, 0.0)
        to_x = to_eps = None
        if ball is not None:
            to_adv, to_x, to_eps = ball.split(to_adv)
            to_x, to_eps = to_x.sum(0).to(x.dtype), _over(to_eps.sum(0), eps_rows)
        to_radius = _over((to_adv * noise).sum(0), radius_rows)
        return to_adv.sum(0).to(adv.dtype), to_x, to_radius, to_eps, *[None] * 6
