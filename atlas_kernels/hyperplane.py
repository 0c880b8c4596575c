"""The step of FAB (Croce & Hein 2020, arXiv 1907.02044, section 3): towards the plane on which a linearised classifier
changes its decision, inside the image range, in l_inf, l2 or l1.

The projection onto a plane inside a box is exact. It takes one number for each sample, at which what the pixels gain
towards the plane adds up to the distance from it. In l_inf and l2 that sum is a concave, piecewise linear function of
the number, so Newton's steps from 0 never pass the root and end on it; each halves the slope or what is missing, so
they are few. In l1 the number is a threshold of the normal, found by bisection over its bits.

Sums are taken in float64 and rounded once: the backends agree to 4 units in the last place (of the larger of pixel and
way), usually to the bit, and the number of threads does not matter. 16-bit images are computed in float32 and rounded
once on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .backends.reference.perturb_norms import flat
from .checks import number_in, per_channel, require_choice, require_float_images, require_like, require_out
from .core import advise_huge_pages, alike
from .layout import column, compute_dtype, dense, require_memory
from .schema import LINF, NORMS

_hyperplane_step = backends.caller("hyperplane_step")

_Bound = float | Tensor | Sequence[float]


def hyperplane_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    gap: Tensor,
    *,
    norm: str = LINF,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    clip_min: _Bound = 0.0,
    clip_max: _Bound = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """FAB's next iterate. Its plane is that of the points z with ``gap + <grad, z - adv> = 0``.

    With ``d`` the shortest way from ``adv`` to the plane inside the image range, and ``d0`` that from ``x``::

        alpha = min(||d|| / (||d|| + ||d0||), alpha_max)
        clip((1 - alpha) (adv + overshoot d) + alpha (x + overshoot d0))

    so that the iterate stays near x. Where the range does not reach the plane, the way goes as near as it can: to a
    corner. Where several ways are shortest, in l_inf every pixel goes as far as the largest, and in l1 pixels of equal
    gradient go the same part of their room. With ``alpha_max=0, overshoot=1`` the result is the projection of ``adv``.

    Args:
        adv, x: current iterate and clean images [B, ...] in the image range, one dtype.
        grad: gradient of the gap at ``adv``, any float dtype. Where it is zero there is no way: ``d = d0 = 0``; and
            where it or the gap is NaN or infinite.
        gap: float [B], what is to become 0: a difference of two logits, say.
        norm: "linf", "l2" or "l1".
        alpha_max: largest weight of the step from x, in [0, 1].
        overshoot: how far beyond the plane, a factor of at least 0; eta in the paper.
        clip_min, clip_max: image range, one number or one per channel.
        out: result tensor like ``adv``, or ``adv``, ``grad`` or ``x`` itself.

    Returns a tensor of adv's dtype and layout; a constant for autograd. Raises ``TypeError`` and ``ValueError`` that
    name the argument.
    """
    adv, grad, x, gap = adv.detach(), grad.detach(), x.detach(), gap.detach()
    if not alike(adv, x, grad):
        require_float_images("adv", adv)
        require_like("x", x, "adv", adv, dtype=True)
        require_like("grad", grad, "adv", adv, dtype=False)
        adv, x, grad = dense(adv), dense(x), dense(grad)
    require_float_images("gap", gap)
    if gap.shape != adv.shape[:1] or gap.device != adv.device:
        raise ValueError(
            f"gap is {list(gap.shape)} on {gap.device}, expected [{adv.shape[0]}] on {adv.device}, one per sample"
        )
    require_choice("norm", norm, NORMS)
    alpha_max, overshoot = number_in("alpha_max", alpha_max, 0.0, 1.0), number_in("overshoot", overshoot, 0.0)
    bounds = (*per_channel("clip_min", clip_min, adv), *per_channel("clip_max", clip_max, adv))
    dtype = compute_dtype(adv.dtype)
    if grad.dtype == torch.float64:
        grad, gap = _scaled(grad, gap)
        grad = grad.to(dtype)
    gap = gap.to(dtype).contiguous()
    if out is None:
        out = advise_huge_pages(torch.empty_like(adv))
    else:
        require_out("out", out, adv.shape, adv, adv.dtype)
    _hyperplane_step(adv, grad, x, gap, NORMS.index(norm), alpha_max, overshoot, *bounds, out)
    return out


def _scaled(grad: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The same plane by gradients near 1, of which no square leaves the range of float64 and none is lost in float32:
    both over a power of two of the sample."""
    if not grad.numel():
        return grad, gap
    require_memory("grad", grad)
    largest = flat(grad).abs().amax(1)
    power = largest / torch.frexp(largest).mantissa
    power = torch.where(power.isfinite(), power, 1.0)
    return grad / column(power, grad), gap.double() / power
