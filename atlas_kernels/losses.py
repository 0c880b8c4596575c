"""The losses of adversarial training on logits: per-sample values and logit gradients in one pass over the logits.

Logits are float [B, C], C at least 2; strides other than contiguous are copied first. 16-bit logits are computed with
in float32 and the loss is float32 (float64 for float64), so no cast is needed under autocast; gradients come in the
dtype of the logits. A gradient in float16 is rounded after the scale of a ``GradScaler`` has multiplied it; without
one, a small one underflows, as in PyTorch. Labels are integers [B] of any width; ``cross_entropy`` and
``consistency_loss`` also take target distributions, float [B, C] of any width, which are computed with in the type of
the loss.

Finite logits of any size keep their digits: each is compared with the largest of its row. A class of probability 0
contributes 0, also at a logit of -inf. A NaN among the logits makes its sample's loss NaN and no other's (the gradient
too, but that of a squared distance of logits, where only that class's is). So does a logit of +inf, or a row of nothing
but -inf, where there is a softmax; the margin, DLR and pairing subtract infinite logits as they are, and inf - inf is
NaN.

Common arguments: ``weights``, a finite number per sample, float [B], that multiplies its loss; ``reduction``, "mean"
(the sum over the batch divided by B, weighted or not; NaN for an empty batch, as in PyTorch), "sum", or "none" for
float [B]. What has weight 0 (a sample by ``weights``, a term by ``beta``, ``weight``, ``local_weight`` or
``global_weight``, a class by its target) adds 0 to the loss and to every gradient, also where it is infinite (PyTorch's
0 * inf is NaN); if it is NaN, it stays NaN.
Every loss raises ``TypeError`` and ``ValueError`` that name the argument.

Every loss is differentiable in its logits and weights any number of times. The gradient is made in the forward pass and
``backward`` only scales it. ``create_graph=True``, forward mode (``torch.autograd.forward_ad``) and the transforms of
torch.func (``grad``, ``vmap``, ``jvp``, ``hessian``, ..) take the plain formula instead (``formulas.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, formulas
from .capture import capturing
from .checks import (
    class_indices,
    dense_logits,
    flag,
    number_in,
    require_choice,
    require_strided,
    sample_weights,
    target_distributions,
    value_checks_enabled,
    whole,
)
from .layout import compute_dtype, require_memory
from .schema import DISTANCES, TERMS
from .transforms import followed, is_wrapped

_NAMES = (
    "cross_entropy", "soft_cross_entropy", "kl_div", "trades_loss", "mart_loss", "entropy", "margin_loss", "dlr_loss",
    "logit_pairing", "consistency_loss", "atlas_loss",
)  # fmt: skip
_KERNELS = {name: backends.caller(name) for name in _NAMES}
_gairat_weights = backends.caller("gairat_weights")
_TERMS = {"consistency_loss": 2, "atlas_loss": 3}  # how many each of them returns
_REDUCTIONS = ("mean", "sum", "none")
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy ``-log p_y``, p = softmax(logits); as ``torch.nn.functional.cross_entropy``, but ``weights`` are
    per sample. log p_y and the gradient p_y - 1 keep their relative precision where p_y comes close to 1.

    labels: integers [B], or target distributions t, float [B, C] of numbers >= 0: then ``-sum_c t_c log p_c``, whose
    gradient is ``p sum_c t_c - t`` (rows need not sum to 1). Targets that require grad get theirs by the plain formula.
    label_smoothing: s in [0, 1], the share of the target that is spread evenly over all classes (Szegedy et al. 2016,
    arXiv 1512.00567, section 7).
    """
    logits = dense_logits("logits", logits)
    smoothing = number_in("label_smoothing", label_smoothing, 0.0, 1.0)
    if isinstance(labels, Tensor) and labels.ndim > 1 and labels.is_floating_point():
        targets = target_distributions("labels", labels, logits)
        return _loss("soft_cross_entropy", logits, None, (targets,), (smoothing,), weights, reduction, targets)
    labels = class_indices("labels", labels, logits, logits.shape[1])
    return _loss("cross_entropy", logits, None, (labels,), (smoothing,), weights, reduction)


def kl_div(p_logits: Tensor, q_logits: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """``KL(p || q) = sum_c p_c (log p_c - log q_c)``, p and q the softmax of ``p_logits`` and ``q_logits``.

    TRADES' second term (Zhang et al. 2019, arXiv 1901.08573) with p of the clean and q of the adversarial
    image, that is ``F.kl_div(q_logits.log_softmax(1), p_logits.softmax(1))``. Gradients go to both; detach one to hold
    it. p > 0 where q = 0 makes it inf, and the gradient to ``p_logits`` its limit: inf there, -inf in other classes.
    """
    p = dense_logits("p_logits", p_logits)
    q = dense_logits("q_logits", q_logits, "p_logits", p)
    return _loss("kl_div", p, q, (), (), weights, reduction)


def trades_loss(
    logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """TRADES: ``CE(logits, y) + beta KL(p || q)``, p of the clean, q of the adversarial logits (Zhang et al. 2019,
    arXiv 1901.08573, with gradients to both sides, as in the published code, whose beta is 6 on CIFAR-10).
    """
    logits, adv_logits, labels = _pair(logits, adv_logits, labels)
    beta = _factor("beta", beta, logits)
    return _loss("trades_loss", logits, adv_logits, (labels,), (beta,), weights, reduction)


def mart_loss(
    logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """MART: ``-log q_y - log(1.0001 - max_{k != y} q_k + 1e-12) + beta KL(p || q + 1e-12) (1.0000001 - p_y)``, p of the
    clean, q of the adversarial logits (Wang et al. 2020, "Improving adversarial robustness requires revisiting
    misclassified examples", ICLR, with the constants of the published code).

    As there, the gradient flows through the factor 1 - p_y too.
    """
    logits, adv_logits, labels = _pair(logits, adv_logits, labels)
    beta = _factor("beta", beta, logits)
    return _loss("mart_loss", logits, adv_logits, (labels,), (beta,), weights, reduction)


def entropy(logits: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Entropy of the prediction, ``-sum_c p_c log p_c`` in nats."""
    return _loss("entropy", dense_logits("logits", logits), None, (), (), weights, reduction)


def margin_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """The CW margin ``max_{k != y} z_k - z_y``: larger is more adversarial, above 0 is misclassified (Carlini & Wagner
    2017, arXiv 1608.04644, section V-A, f_6 without its clip). Of equal logits the first counts.
    """
    logits = dense_logits("logits", logits)
    labels = class_indices("labels", labels, logits, logits.shape[1])
    return _loss("margin_loss", logits, None, (labels,), (), weights, reduction)


def dlr_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The difference-of-logits ratio ``-(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12)``, z_(i) the i-th largest
    logit; it does not change with the scale of the logits (Croce & Hein 2020, arXiv 2003.01690, equation 6).

    targets: classes to reach, integers [B] other than the labels; the loss is then
    ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`` (equation 7). Needs three classes, with targets four.
    """
    logits = dense_logits("logits", logits)
    labels = class_indices("labels", labels, logits, logits.shape[1])
    targets = dlr_targets(logits, labels, targets)
    return _loss("dlr_loss", logits, None, (labels, targets), (), weights, reduction)


def logit_pairing(
    logits: Tensor, adv_logits: Tensor, *, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Squared distance of the logits, ``sum_c (z_c - z'_c)^2`` (adversarial logit pairing; Kannan et al. 2018, arXiv
    1803.06373; the published code divides by C as well)."""
    logits = dense_logits("logits", logits)
    adv_logits = dense_logits("adv_logits", adv_logits, "logits", logits)
    return _loss("logit_pairing", logits, adv_logits, (), (), weights, reduction)


def consistency_loss(
    logits: Tensor,
    other_logits: Tensor,
    labels: Tensor,
    *,
    distance: str = "logit",
    weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_terms: bool = False,
) -> Any:
    """``CE(logits, y) + weight * D(other_logits, logits)``: the loss at one point, tied to the logits at another, with
    gradients to both (one-step methods tie an adversary to its start or to its image):

        logit   ||z - z'||^2, summed over the classes: a mean over them, as published code often has, is weight / C
        prob    ||p - p'||^2
        js      Jensen-Shannon divergence in nats, (KL(p||m) + KL(p'||m)) / 2 with m = (p + p') / 2
        kl      KL(p' || p)

    z, p = softmax(z) of ``logits``, z', p' of ``other_logits``. prob, js and their gradients keep their relative
    precision where p comes close to p'.

    Args:
        labels: integers [B], or target distributions, float [B, C], as ``cross_entropy`` takes them.
        weight: a number >= 0, or a float tensor without dimensions on the device of the logits, which the kernel reads:
            so it can change under a CUDA graph. A tensor that requires grad gets its own by the plain formula.
        label_smoothing: of the cross-entropy.
        return_terms: also return CE and D of each sample, unweighted and without gradient: float [2, B].

    Returns the loss, or (loss, terms).
    """
    logits = dense_logits("logits", logits)
    other_logits = dense_logits("other_logits", other_logits, "logits", logits)
    require_choice("distance", distance, DISTANCES)
    smoothing = number_in("label_smoothing", label_smoothing, 0.0, 1.0)
    indices: tuple[Tensor | None, ...]
    if isinstance(labels, Tensor) and labels.ndim > 1 and labels.is_floating_point():
        indices = None, target_distributions("labels", labels, logits)
    else:
        indices = class_indices("labels", labels, logits, logits.shape[1]), None
    number, tensor = _number_or_tensor("weight", weight, logits)
    numbers = (DISTANCES.index(distance), number, tensor, smoothing)
    flag("return_terms", return_terms)
    loss, terms = _loss(
        "consistency_loss", logits, other_logits, indices, numbers, weights, reduction, indices[1], tensor
    )
    return (loss, terms) if return_terms else loss


def atlas_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    local: str = "kl",
    local_weight: float = 1.0,
    global_term: str = "kl",
    global_weight: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_terms: bool = False,
) -> Any:
    """ATLAS on the joint logits of clean images, adversaries and their neighbours:

        CE(z(x'), y) + local_weight * LOCAL + global_weight * GLOBAL

        LOCAL   kl: mean_k KL(sg p(x') || p(z_k))     ce: mean_k CE(z(z_k), y)    logit: mean_k ||z(z_k) - z(x')||^2
        GLOBAL  kl: KL(p(x) || p(x')), to both sides  ce: CE(z(x), y)             logit: ||z(x) - z(x')||^2

    x' is the adversary, z_k its k-th neighbour, p = softmax(z), sg = no gradient. Adversarial training via local
    stability (Lu & Kumar, arXiv 2110.14030) is a framework; the text that we could read gives no closed form of its
    terms. These are our documented instance, not a reproduction (see ``atlas_train.methods.ATLAS``).

    Args:
        logits: [(1 + 1 + n) * B, C], the logits of ``[x; x'; z_1; ..; z_n]`` as ``pgd_step_neighbours`` lays out the
            images; without x where ``global_term`` is "none". n follows from the number of rows; 0: no LOCAL.
        labels: integers [B].
        local, global_term: "kl", "ce", "logit" or "none"; "none" leaves that term, and its rows, out.
        return_terms: also return CE, LOCAL and GLOBAL of each sample, unweighted and without gradient: float [3, B].

    Returns the loss, or (loss, terms).
    """
    logits = dense_logits("logits", logits)
    require_choice("local", local, TERMS)
    require_choice("global_term", global_term, TERMS)
    batch = labels.shape[0] if isinstance(labels, Tensor) and labels.ndim else 0
    labels = class_indices("labels", labels, logits, logits.shape[1], batch=batch)
    _require_whole_batches(logits, batch, local, global_term)
    numbers = (
        TERMS.index(local) if local != "none" else 0, _factor("local_weight", local_weight, logits),
        TERMS.index(global_term), _factor("global_weight", global_weight, logits),
    )  # fmt: skip
    flag("return_terms", return_terms)
    loss, terms = _loss("atlas_loss", logits, None, (labels,), numbers, weights, reduction)
    return (loss, terms) if return_terms else loss


def gairat_weights(kappa: Tensor, steps: int, lam: float = -1.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """GAIRAT's geometry-aware weights (Zhang et al. 2021, arXiv 2010.01736, "tanh" in the published code):
    ``(1 + tanh(lam + 5 (h - kappa) / h)) / 2`` with h = steps // 2, divided by its mean over the batch.

    Computed as ``sigmoid(2 lam + 10 (h - kappa) / h)`` relative to the largest, so the weights stay finite where all of
    them underflow. lam = inf gives ones.

    Args:
        kappa: integers [B]: at how many of the attack's iterates before a step the prediction was right, 0 to ``steps``
            (``attack_cotangent`` counts).
        steps: of the attack, at least 2.
        dtype: float32, or float64, for which the plain formula runs.

    Returns ``dtype`` [B] of mean 1, without gradient.
    """
    steps = whole("steps", steps, 2, 2**31 - 1)  # the formula divides by steps // 2
    lam = number_in("lam", lam, -torch.finfo(torch.float32).max)
    if isinstance(kappa, Tensor):
        require_strided("kappa", kappa)
    if not isinstance(kappa, Tensor) or kappa.is_floating_point() or kappa.is_complex() or kappa.ndim != 1:
        got = f"{kappa.dtype} {list(kappa.shape)}" if isinstance(kappa, Tensor) else type(kappa).__name__
        raise TypeError(f"kappa must be an integer tensor [B], got {got}")
    require_memory("kappa", kappa)
    kappa = kappa.to(torch.int64).contiguous()
    if kappa.numel() and value_checks_enabled(kappa, name="kappa"):
        bad = (kappa < 0) | (kappa > steps)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"kappa[{row}] = {int(kappa[row])} is not in [0, steps] = [0, {steps}]")
    if dtype == torch.float64 or (dtype == torch.float32 and followed()):
        return formulas.gairat_weights(kappa, steps, lam).to(dtype)
    if dtype != torch.float32:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    out = torch.empty(kappa.shape, dtype=dtype, device=kappa.device)
    _gairat_weights(kappa, steps, lam, out)
    return out


def dlr_targets(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor | None:
    """The targets of a DLR loss, checked, and whether there are classes enough for it."""
    classes, needed = logits.shape[1], 3 if targets is None else 4
    if classes < needed:
        raise ValueError(
            f"logits has {classes} classes: the {'' if targets is None else 'targeted '}DLR loss looks "
            f'as far as logit number {needed}, so it needs {needed} classes; use margin_loss, or objective="margin"'
        )
    if targets is None:
        return None
    targets = class_indices("targets", targets, logits, classes)
    if targets.numel() and value_checks_enabled(targets) and bool((targets == labels).any()):
        row = int((targets == labels).nonzero()[0])
        raise ValueError(f"targets[{row}] = {int(targets[row])} is the label itself: choose another class to reach")
    return targets


def _factor(name: str, value: float, logits: Tensor) -> float:
    """A number >= 0 that is finite in the type that the logits are computed in."""
    number, dtype = number_in(name, value, 0.0), compute_dtype(logits.dtype)
    if number > _LARGEST[dtype]:
        raise ValueError(f"{name} = {number} does not fit {dtype}, which the logits are computed in: give less")
    return number


def _number_or_tensor(name: str, value: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """A number >= 0, or a tensor without dimensions that holds one: (number, None) or (0.0, tensor)."""
    if not isinstance(value, Tensor):
        return _factor(name, value, logits), None
    dtype = compute_dtype(logits.dtype)
    if value.layout != torch.strided or value.is_nested:
        require_strided(name, value)
    if value.ndim or not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a float tensor [], got {value.dtype} {list(value.shape)}")
    if value.device != logits.device:
        raise ValueError(
            f"{name} is on {value.device}, the logits on {logits.device}: move it there, or pass float({name})"
        )
    if value_checks_enabled(value, name=name):
        _factor(name, value.item(), logits)
    require_memory(name, value)
    return 0.0, value.to(dtype)


def _pair(logits: Tensor, adv_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = dense_logits("logits", logits)
    adv_logits = dense_logits("adv_logits", adv_logits, "logits", logits)
    return logits, adv_logits, class_indices("labels", labels, logits, logits.shape[1])


def _require_whole_batches(logits: Tensor, batch: int, local: str, global_term: str) -> None:
    """The rows of joint logits make whole batches, as many as the terms need."""
    rows, least = logits.shape[0], 1 if global_term == "none" else 2
    parts, rest = divmod(rows, batch) if batch else (least, rows)
    if rest or parts < least or (local == "none" and parts > least):
        layout = "[x; x'" if least == 2 else "[x'"
        wanted = f"{least} batches" if local == "none" else f"{least} + n batches"
        raise ValueError(
            f"logits has {rows} rows for {batch} labels; with local={local!r} and global_term={global_term!r} it must "
            f"be {wanted} {layout}{']' if local == 'none' else '; z_1; ..; z_n]'} of one row per label"
        )


def _loss(
    name: str,
    logits: Tensor,
    other: Tensor | None,
    indices: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    weights: Tensor | None,
    reduction: str,
    *constants: Tensor | None,
) -> Any:
    """One loss, checked but for what all share, with its gradient if somebody needs it. constants: what the kernel
    makes no gradient to; if they need one, the plain formula runs."""
    require_choice("reduction", reduction, _REDUCTIONS)
    batch = indices[0].shape[0] if indices and indices[0] is not None else logits.shape[0]
    scale = 1.0
    if reduction == "mean":
        scale = 1.0 / batch if batch else float("nan")
    reduced = reduction != "none"
    if weights is not None:
        weights = sample_weights(weights, batch, logits)
    call = _Call(name, indices, numbers, batch, scale, reduced)
    if followed(logits, other, weights, *constants) or (constants and any(map(_is_differentiated, constants))):
        rows, terms = _formula(call, logits, other, weights)
        rows = rows if weights is None else rows * weights
        result = rows.sum() * scale if reduced else rows
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (logits, other, weights)):
        return _Loss.apply(call, logits, other, weights)
    else:
        result, terms = _run(call, scale, logits, other, weights, None, None)
    return result if terms is None else (result, terms)


def _is_differentiated(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()


class _Call(NamedTuple):
    """What a loss is asked for, beside its logits and weights."""

    name: str
    indices: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]
    batch: int
    scale: float
    reduced: bool


def _run(
    call: _Call, scale: float, logits: Tensor, other: Tensor | None, weights: Tensor | None, grad: Tensor | None,
    other_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The operator itself: (total or value, terms), and the gradients, where there is a tensor for them."""
    dtype, device = compute_dtype(logits.dtype), logits.device
    value = torch.empty(call.batch, dtype=dtype, device=device)
    total = torch.empty((), dtype=dtype, device=device) if call.reduced else None
    kernel, shared = _KERNELS[call.name], (*call.indices, *call.numbers, weights, scale, value, total)
    terms = None
    if call.name in _TERMS:
        terms = torch.empty((_TERMS[call.name], call.batch), dtype=dtype, device=device)
        shared += (grad, terms) if other is None else (grad, other_grad, terms)
    else:
        shared += (grad,) if other is None else (grad, other_grad)
    kernel(logits, *(() if other is None else (other,)), *shared)
    return value if total is None else total, terms


class _Loss(torch.autograd.Function):
    """Any of the losses: ``forward`` makes value and gradients at once, ``backward`` scales them."""

    @staticmethod
    def forward(ctx, call, logits, other, weights):  # type: ignore[no-untyped-def]
        _, wanted, other_wanted, weights_wanted = ctx.needs_input_grad
        # A gradient that underflows in float16 may not do so times a loss scale: it is kept in float32 until then.
        half = logits.dtype == torch.float16
        read, other_read = (t.float() if half and t is not None else t for t in (logits, other))
        grad = torch.empty_like(read) if wanted else None
        other_grad = torch.empty_like(other_read) if other_wanted else None
        result, terms = _run(call, call.scale, read, other_read, weights, grad, other_grad)
        rows = None
        if weights_wanted:
            rows, _ = _run(call._replace(reduced=False), 1.0, read, other_read, None, None, None)
            rows = rows.masked_fill_((weights == 0) & rows.isinf(), 0.0)
        ctx.save_for_backward(grad, other_grad, rows, logits, other, weights)
        ctx.call = call
        if terms is None:
            return result
        ctx.mark_non_differentiable(terms)
        return result, terms

    @staticmethod
    def backward(ctx, g, *_):  # type: ignore[no-untyped-def]
        grad, other_grad, rows, logits, other, weights = ctx.saved_tensors
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled():
            needed = grad is not None, other_grad is not None, rows is not None
            return None, *_differentiable(ctx.call, logits, other, weights, needed, g * ctx.call.scale)
        to_weights = None if rows is None else rows * (g * ctx.call.scale)
        known = eager and g.ndim == 0 and type(g) is Tensor and g.is_cpu and not capturing(cuda=False)
        if known and not is_wrapped(g) and g.item() == 1.0:
            return None, *(None if t is None else t.to(logits.dtype) for t in (grad, other_grad)), to_weights
        return None, *(None if t is None else _scaled(t, g, logits.dtype) for t in (grad, other_grad)), to_weights


def _scaled(t: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """t times a number, or a number per row (of each batch in t), in the precision of ``g``; then in ``dtype``."""
    if g.ndim:
        g = (g if t.shape[0] == g.shape[0] else g.repeat(t.shape[0] // g.shape[0]))[:, None]
    return (t.to(g.dtype) * g).to(dtype)


def _formula(call: _Call, logits: Tensor, other: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(loss of each sample, terms) by the plain formula; what has weight 0 and is infinite counts as the constant 0."""
    formula, more = getattr(formulas, call.name), (*call.indices, *call.numbers)
    inputs = (logits,) if other is None else (logits, other)
    rows, terms = formulas.loss_and_terms(formula(*inputs, *more))
    if weights is None:
        return rows, terms
    out = (weights == 0) & rows.isinf()
    blank = [torch.where(out.repeat(t.shape[0] // max(call.batch, 1))[:, None], 0.0, t) for t in inputs]
    return torch.where(out, 0.0, formulas.loss_and_terms(formula(*blank, *more))[0]), terms


def _differentiable(call, logits, other, weights, needed, g):  # type: ignore[no-untyped-def]
    """The gradients as functions of the inputs and of ``g``, for a derivative of the next order."""
    # Differentiate by aliases: one input may have been computed from another, and the caller's graph counts that path.
    logits, other, weights = (None if t is None else t.view_as(t) for t in (logits, other, weights))
    loss, _ = _formula(call, logits, other, weights)
    loss = loss if weights is None else loss * weights
    wanted = [t for t, need in zip((logits, other, weights), needed, strict=True) if need]
    cotangent = g.expand_as(loss)
    found = iter(torch.autograd.grad(loss, wanted, cotangent, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]
