"""One legal call of a public operator: its arguments, the tensors that it may write to, and what its result must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import atlas_kernels as ak

from .draws import Draw
from .judges import bits, roundings, units
from .memory import is_plain

Judge = Callable[..., "str | None"]


@dataclass
class Call:
    """``function(**arguments)``; ``judge(ours, call)`` says what is wrong with a result, or None."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    judge: Judge
    outputs: dict[str, Tensor] = field(default_factory=dict)  # out-arguments it takes, each by a tensor like it

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.arguments, **changed})


def draw_call(draw: Draw) -> Call:
    """A call of any operator."""
    return draw.one_of(_ALL)(draw)


# --- images ---


def _images(draw: Draw, count: int, dtype: torch.dtype, *, clean: bool) -> list[Tensor]:
    """Images of one shape; if ``clean``, the last one lies in [0, 1]."""
    shape = draw.image_shape()
    special = draw.chance(0.15)
    made = []
    for i in range(count):
        t = draw.uniform(shape, -0.2, 1.2)
        if special and not (clean and i == count - 1):
            t = draw.with_special(t)
        made.append(draw.laid_out((t.clamp(0, 1) if clean and i == count - 1 else t).to(dtype)))
    return made


def _radius(draw: Draw, batch: int, most: float, largest: float = math.inf) -> float | Tensor:
    if draw.chance(0.1):
        return draw.one_of([0.0, 1e-12, 1e6, largest])
    return draw.per_sample(draw.uniform((batch,), 0.0, most))


def _range(draw: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
    """Bounds of images around [0, 1], by channel now and then."""
    if draw.chance(0.6):
        return {}
    if len(shape) > 2 and draw.chance(0.5):
        low, high = draw.uniform((shape[1],), -0.5, 0.0), draw.uniform((shape[1],), 1.0, 1.5)
        return {"clip_min": low if draw.chance(0.5) else low.tolist(), "clip_max": draw.laid_out(high)}
    return {"clip_min": -draw.random.random(), "clip_max": draw.one_of([1.0, 1.5, math.inf])}


def _noise(draw: Draw, batch: int) -> dict[str, Any]:
    seed, base = draw.random.getrandbits(62), draw.one_of([0, 3, 2**40, -5])
    noise: dict[str, Any] = {"key": torch.tensor([seed, base]), "draw": draw.one_of([0, 1, 2**32 - 1])}
    if draw.chance(0.3):
        noise["ids"] = draw.laid_out(draw.integers(2**40, (batch,), -(2**40)))
    return noise


def _norm(draw: Draw) -> tuple[str, float]:
    """A norm, and radii that mean something in it."""
    return draw.one_of([("linf", 0.3), ("linf", 0.3), ("l2", 2.0), ("l1", 6.0)])


def _judge_of(norm: str) -> Judge:
    return bits if norm == "linf" else partial(units, clean="x")


def _random_start(draw: Draw) -> Call:
    norm, most = _norm(draw)
    (x,) = _images(draw, 1, draw.dtype(), clean=norm != "linf")
    arguments = {"x": x, "eps": _radius(draw, len(x), most), "norm": norm, **_noise(draw, len(x))}
    arguments |= _range(draw, x.shape)
    return Call("random_start", ak.random_start, arguments, _judge_of(norm), {"out": x})


def _label_noise_start(draw: Draw) -> Call:
    (x,) = _images(draw, 1, draw.dtype(), clean=False)
    classes = draw.integer(1, 4)
    noise = draw.laid_out(draw.normal((classes, *x.shape[1:]), 0.1).to(draw.dtype()))
    low = draw.one_of([0.0, 0.1, 1.0])
    arguments = {"x": x, "labels": draw.laid_out(draw.integers(classes, (len(x),))), "label_noise": noise}
    arguments |= {"eps": _radius(draw, len(x), 0.3), "share": (low, draw.one_of([low, 1.0]))}
    arguments |= _noise(draw, len(x)) | _range(draw, x.shape)
    return Call("label_noise_start", ak.label_noise_start, arguments, bits, {"out": x})


def _gradient(draw: Draw, like: Tensor) -> Tensor:
    grad = draw.normal(like.shape, draw.one_of([1e-30, 1.0, 1e30])) * (draw.uniform(like.shape) > 0.2)
    if draw.chance(0.1):
        grad = draw.with_special(grad)
    return draw.laid_out(grad.to(like.dtype if draw.chance(0.6) else draw.dtype()))


def _active(draw: Draw, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {"descend": draw.chance(0.5)}
    if draw.chance(0.3):
        found["active"] = draw.uniform((batch,)) < 0.6
    return found


def _pgd_step(draw: Draw) -> Call:
    norm, most = _norm(draw)
    adv, x = _images(draw, 2, draw.dtype(), clean=norm != "linf")
    batch = len(x)
    arguments = {"adv": adv, "grad": _gradient(draw, adv), "x": x, "eps": _radius(draw, batch, most), "norm": norm}
    arguments |= (
        {"step_size": _radius(draw, batch, most, math.inf if norm == "linf" else 1e30)}
        | _range(draw, x.shape)
        | _active(draw, batch)
    )
    cast = draw.laid_out(x.to(draw.dtype()))
    return Call("pgd_step", ak.pgd_step, arguments, _judge_of(norm), {"out": adv, "cast": cast})


def _apgd_step(draw: Draw) -> Call:
    norm, most = _norm(draw)
    adv, old, x = _images(draw, 3, draw.dtype(), clean=norm != "linf")
    batch, entries = len(x), max(1, x[:1].numel())
    arguments = {"adv": adv, "old": old, "grad": _gradient(draw, adv), "x": x, "eps": _radius(draw, batch, most)}
    arguments |= {"step_size": _radius(draw, batch, most, math.inf if norm == "linf" else 1e30), "norm": norm}
    arguments |= {"momentum": draw.one_of([1.0, 0.75, draw.uniform((batch,))])}
    arguments |= _range(draw, x.shape) | _active(draw, batch)
    if norm == "l1":
        arguments["largest"] = draw.one_of([draw.integer(1, entries), draw.integers(entries + 1, (batch,), 1)])
    cast = draw.laid_out(x.to(draw.dtype()))
    return Call("apgd_step", ak.apgd_step, arguments, _judge_of(norm), {"out": adv, "cast": cast})


def _project(draw: Draw) -> Call:
    norm, most = _norm(draw)
    v, x = _images(draw, 2, draw.dtype(), clean=norm != "linf")
    if draw.chance(0.2):
        v = v * 10.0 ** draw.integer(1, 4 if v.dtype == torch.float16 else 30)
    arguments = {"v": v, "x": x, "eps": _radius(draw, len(x), most), "norm": norm, **_range(draw, x.shape)}
    return Call("project", ak.project, arguments, _judge_of(norm), {"out": v})


def _repeated(t: Tensor, count: int) -> Tensor:
    return t.new_empty((count * len(t), *t.shape[1:]))


def _sample_neighbours(draw: Draw) -> Call:
    adv, x = _images(draw, 2, draw.dtype(), clean=False)
    batch, count = len(x), draw.integer(0, 3)
    arguments = {"adv": adv, "radius": _radius(draw, batch, 0.1), "count": count}
    arguments |= _noise(draw, batch) | _range(draw, x.shape)
    if draw.chance(0.4):
        arguments |= {"x": x, "eps": _radius(draw, batch, 0.3)}
    return Call("sample_neighbours", ak.sample_neighbours, arguments, bits, {"out": _repeated(adv, count)})


def _pgd_step_neighbours(draw: Draw) -> Call:
    adv, x = _images(draw, 2, draw.dtype(), clean=False)
    batch, count, include = len(x), draw.integer(0, 3), draw.chance(0.6)
    arguments = {"adv": adv, "grad": _gradient(draw, adv), "x": x, "eps": _radius(draw, batch, 0.3), "count": count}
    arguments |= {"step_size": _radius(draw, batch, 0.3), "radius": _radius(draw, batch, 0.1), "include_x": include}
    arguments |= {"project": draw.chance(0.4)} | _noise(draw, batch) | _range(draw, x.shape) | _active(draw, batch)
    out = _repeated(adv, include + 1 + count).to(adv.dtype if draw.chance(0.5) else draw.dtype())
    return Call("pgd_step_neighbours", ak.pgd_step_neighbours, arguments, bits, {"out": out})


def _stored(draw: Draw) -> dict[str, Any]:
    """Images, some rows of a store, and the store."""
    (x,) = _images(draw, 1, draw.dtype(), clean=False)
    count = len(x) + draw.integer(0, 3)
    rows = torch.tensor(draw.random.sample(range(count), len(x)), dtype=torch.int64)
    stored = draw.laid_out(draw.uniform((count, *x.shape[1:]), -0.1, 0.1).to(draw.dtype()))
    return {"x": x, "stored": stored.contiguous().resolve_neg(), "index": draw.laid_out(rows)} | _range(draw, x.shape)


def _stored_start(draw: Draw) -> Call:
    arguments = _stored(draw)
    return Call("stored_start", ak.stored_start, arguments, bits, {"out": arguments["x"]})


def _stored_and_moved(*, stored: Any, momentum: Any, **arguments: Any) -> tuple[Tensor, ...]:
    """The step of copies of the store, and these."""
    stored, momentum = (t.clone() if is_plain(t) else t for t in (stored, momentum))
    return ak.stored_step(stored=stored, momentum=momentum, **arguments), stored, momentum


def _stored_step(draw: Draw) -> Call:
    arguments = _stored(draw)
    x = arguments["x"]
    arguments |= {"grad": _gradient(draw, x), "momentum": arguments["stored"].flip(0).to(draw.dtype())}
    arguments |= {"eps": _radius(draw, len(x), 0.3), "decay": draw.one_of([0.0, 0.3, 1.0])}
    if draw.chance(0.5):
        arguments["step_size"] = _radius(draw, len(x), 0.3)
    return Call("stored_step", _stored_and_moved, arguments, _bits_of_the_store)


def _bits_of_the_store(ours: Any, call: Call, **changed: Any) -> str | None:
    """Of float32 and narrower images: float64's sums are rounded too, so that momentum near 0 has either sign."""
    x = {**call.arguments, **changed}["x"]
    return None if isinstance(x, Tensor) and x.dtype == torch.float64 else bits(ours, call, **changed)


# --- training batches ---


def _augment(draw: Draw) -> Call:
    n, c, h, w = draw.integer(1, 5), draw.integer(1, 4), draw.integer(1, 9), draw.integer(1, 9)
    images, batch = draw.integers(256, (n, c, h, w)).to(torch.uint8), draw.integer(0, 7)
    images = images.contiguous(memory_format=torch.channels_last) if draw.chance(0.4) else images
    arguments: dict[str, Any] = {"images": images, "index": draw.laid_out(draw.integers(n, (batch,)))}
    arguments |= {"padding": draw.integer(0, 4), "flip": draw.chance(0.5), "channels_last": draw.chance(0.5)}
    arguments |= {"dtype": draw.dtype(), **_noise(draw, batch)}
    if draw.chance(0.5):
        arguments |= {"mean": draw.uniform((c,)).tolist(), "std": draw.uniform((c,), 0.1, 1.0)}
    if draw.chance(0.3):
        arguments["crop"] = draw.integer(1, min(h, w) + 2 * arguments["padding"])
    size = (arguments["crop"],) * 2 if "crop" in arguments else (h, w)
    return Call(
        "augment", ak.augment, arguments, bits, {"out": torch.empty((batch, c, *size), dtype=arguments["dtype"])}
    )


# --- logits ---


def _with_gradients(loss: Callable[..., Tensor], inputs: tuple[str, ...], **arguments: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradients by the ``inputs``."""
    made = {name: arguments[name] for name in inputs}
    leaves = {name: t.detach().requires_grad_() for name, t in made.items() if _can_have_gradient(t)}
    value = loss(**{**arguments, **leaves})
    # Each row's own cotangent, so that no two rows can be exchanged.
    cotangent = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), *torch.autograd.grad(value, list(leaves.values()), cotangent, materialize_grads=True)


def _can_have_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) and not t.is_quantized


def _logits(draw: Draw, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Logits of every confidence; some with classes out of the question, some with NaN."""
    spread = draw.one_of([0.0, 0.1, 3.0, 3.0, 30.0, 1000.0, 60_000.0])
    z = draw.normal((rows, classes), spread / 3).clamp(-60_000, 60_000)
    if draw.chance(0.1):
        z = draw.with_special(z, 0.1, (-math.inf, -math.inf, math.inf, math.nan, 0.0))
    return z.to(dtype)


#: name -> (function, its tensors of logits, fewest classes, whether it takes labels, its numbers)
_LOSSES: dict[str, tuple[Any, tuple[str, ...], int, bool, dict[str, tuple[float, ...]]]] = {
    "cross_entropy": (ak.cross_entropy, ("logits",), 2, True, {"label_smoothing": (0.0, 0.1, 1.0)}),
    "kl_div": (ak.kl_div, ("p_logits", "q_logits"), 2, False, {}),
    "trades_loss": (ak.trades_loss, ("logits", "adv_logits"), 2, True, {"beta": (0.0, 1.0, 6.0)}),
    "mart_loss": (ak.mart_loss, ("logits", "adv_logits"), 2, True, {"beta": (0.0, 1.0, 6.0)}),
    "entropy": (ak.entropy, ("logits",), 2, False, {}),
    "margin_loss": (ak.margin_loss, ("logits",), 2, True, {}),
    "dlr_loss": (ak.dlr_loss, ("logits",), 4, True, {}),
    "logit_pairing": (ak.logit_pairing, ("logits", "adv_logits"), 2, False, {}),
    "consistency_loss": (
        ak.consistency_loss,
        ("logits", "other_logits"),
        2,
        True,
        {"label_smoothing": (0.0, 0.3), "weight": (0.0, 1.0, 9.0)},
    ),
    "atlas_loss": (ak.atlas_loss, ("logits",), 2, True, {"local_weight": (0.0, 0.7), "global_weight": (0.0, 2.0)}),
}


def _classes(draw: Draw, least: int) -> int:
    return draw.one_of([63, 64, 65, 100, 257]) if draw.chance(0.15) else draw.integer(least, 20)


def _targets(draw: Draw, labels: Tensor, classes: int) -> Tensor:
    return (labels + 1 + draw.integers(classes - 1, labels.shape)) % classes


def _loss(draw: Draw) -> Call:
    name = draw.one_of(list(_LOSSES))
    function, tensors, least, labelled, numbers = _LOSSES[name]
    batch, classes, dtype = draw.integer(0 if draw.chance(0.1) else 1, 9), _classes(draw, least), draw.dtype()
    arguments: dict[str, Any] = {n: draw.one_of(values) for n, values in numbers.items()}
    copies = 1
    if name == "atlas_loss":
        terms = [draw.one_of(["kl", "ce", "logit", "none"]) for _ in "12"]
        arguments["local"], arguments["global_term"] = terms
        copies = 1 + (terms[1] != "none") + (0 if terms[0] == "none" else draw.integer(0, 2))
    arguments |= {t: draw.laid_out(_logits(draw, copies * batch, classes, dtype)) for t in tensors}
    if labelled:
        arguments["labels"] = draw.laid_out(draw.integers(classes, (batch,)))
    if name == "consistency_loss":
        arguments["distance"] = draw.one_of(["logit", "prob", "js", "kl"])
        if draw.chance(0.5):
            arguments["weight"] = torch.tensor(arguments["weight"], dtype=draw.dtype())
    if name in ("cross_entropy", "consistency_loss") and draw.chance(0.4):
        arguments["labels"] = draw.laid_out(draw.normal((batch, classes)).softmax(1).to(draw.dtype()))
    if name == "dlr_loss" and draw.chance(0.5):
        arguments["targets"] = _targets(draw, arguments["labels"], classes)
    arguments["reduction"] = draw.one_of(["none", "mean", "sum"])
    if draw.chance(0.3):
        arguments["weights"] = draw.normal((batch,))
    with_gradients = partial(_with_gradients, function, tensors)
    return Call(name, with_gradients, arguments, partial(roundings, tensors=tensors))


def _attack_cotangent(draw: Draw) -> Call:
    objective = draw.one_of(ak.objectives.OBJECTIVES)
    batch, classes, dtype = draw.integer(0, 9), _classes(draw, 4), draw.dtype()
    labels = draw.integers(classes, (batch,))
    arguments: dict[str, Any] = {"logits": draw.laid_out(_logits(draw, batch, classes, dtype)), "labels": labels}
    arguments |= {"objective": objective, "descend": draw.chance(0.5), "return_value": True, "return_correct": True}
    tensors = ("logits",)
    if objective == "kl":
        arguments["reference"], tensors = draw.laid_out(_logits(draw, batch, classes, dtype)), ("logits", "reference")
    if objective == "dlr_targeted":
        arguments["targets"] = _targets(draw, labels, classes)
    return Call("attack_cotangent", ak.attack_cotangent, arguments, partial(roundings, tensors=tensors))


def _gairat_weights(draw: Draw) -> Call:
    steps = draw.integer(2, 40)
    arguments = {"kappa": draw.integers(steps + 1, (draw.integer(0, 9),)), "steps": steps}
    arguments["lam"] = draw.one_of([-1.0, 0.0, 3.0, -40.0, math.inf])
    return Call("gairat_weights", ak.gairat_weights, arguments, partial(roundings, wide={"dtype": torch.float64}))


def _compactness(draw: Draw) -> Call:
    batch, features = draw.integer(0 if draw.chance(0.1) else 1, 40), draw.integer(1, 70)
    dtype, shape = draw.dtype(), (batch, features)
    h, h_adv = (draw.laid_out(draw.normal(shape, draw.one_of([1.0, 100.0])).relu().to(dtype)) for _ in "12")
    arguments: dict[str, Any] = {"h": h, "h_adv": h_adv, "labels": draw.integers(4, (batch,), -1)}
    arguments |= {"scale": draw.one_of([0.99, 0.5, 3.0, -2.0]), "distance": draw.one_of(["l1", "squared"])}
    arguments |= {"reduction": draw.one_of(["none", "mean", "sum"]), "detach": True}
    tensors = ("h_adv",)
    if arguments["reduction"] != "none" and draw.chance(0.5):
        arguments["detach"], tensors = False, ("h", "h_adv")
    with_gradients = partial(_with_gradients, ak.compactness, tensors)
    return Call("compactness", with_gradients, arguments, partial(roundings, tensors=("h", "h_adv")))


def _nuclear_norm(draw: Draw) -> Call:
    shape = draw.integer(0 if draw.chance(0.1) else 1, 40), draw.integer(2, 40)
    d = draw.normal(shape, draw.one_of([1e-4, 1.0, 100.0]))
    if draw.chance(0.3):  # of a rank that may be small
        d = d[draw.integers(2, shape[:1]) % max(shape[0], 1)]
    if draw.chance(0.1):
        d = draw.with_special(d, 0.02)
    with_gradients = partial(_with_gradients, ak.nuclear_norm, ("d",))
    return Call("nuclear_norm", with_gradients, {"d": draw.laid_out(d.to(draw.dtype()))}, _judged_by_rank)


def _judged_by_rank(ours: Any, call: Call, **changed: Any) -> str | None:
    """A singular value close to the bound below which it counts as 0: rounding decides, and both results are right."""
    d = {**call.arguments, **changed}["d"]
    if bool(d.isfinite().all()) and d.numel():
        lengths = torch.linalg.svdvals(d.to_dense().double())
        ratio = lengths / (max(d.shape) * (2.0**-52 if d.dtype == torch.float64 else 2.0**-23) * lengths[0])
        if bool(((ratio > 0.1) & (ratio < 10)).any()):
            return None
    return roundings(ours, call, tensors=("d",), same=True, **changed)


def _twice(input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, **rest: Any) -> tuple[Tensor, ...]:
    """The derivatives of BatchNorm's gradient by its cotangent and all that has one."""
    running = [t.clone() if is_plain(t) else t for t in (running_mean, running_var)]
    leaves = [t.detach().requires_grad_() if _can_have_gradient(t) else t for t in (input, weight, bias)]
    out = ak.batch_norm(leaves[0], *running, *leaves[1:], **rest)
    # Numbers of bfloat16, which are the same in every type.
    cotangent, over = (
        torch.linspace(a, b, out.numel(), device=out.device).cos().bfloat16() for a, b in ((0, 2), (3, 9))
    )
    cotangent, over = (t.to(out.dtype).view_as(out) for t in (cotangent, over))
    (grad,) = torch.autograd.grad(out, leaves[0], cotangent.requires_grad_(), create_graph=True)
    by = [cotangent, *(t for t in leaves[:2] if isinstance(t, Tensor))]
    return torch.autograd.grad(grad, by, over, materialize_grads=True)


def _batch_norm(draw: Draw) -> Call:
    sizes = [0 if draw.chance(0.05) else draw.integer(2, 9), draw.integer(1, 70 if draw.chance(0.2) else 9)]
    sizes += [draw.integer(1, 9) for _ in range(draw.integer(0, 3))]
    dtype, per_channel = draw.dtype(), sizes[1:2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    names = ["running_mean", "running_var", "weight", "bias"]
    arguments: dict[str, Any] = {"input": draw.laid_out((draw.normal(sizes) + draw.one_of([0.0, 3.0])).to(dtype))}
    arguments |= {name: draw.laid_out(draw.uniform(per_channel, 0.5, 2.0).to(wide)) for name in names}
    arguments["training"] = draw.chance(0.7)
    left_out = draw.one_of([[], [], names[2:], names[:2] if arguments["training"] else [], names[3:]])
    arguments |= dict.fromkeys(left_out)
    arguments["eps"] = draw.one_of([1e-5, 0.1])
    return Call("batch_norm", _twice, arguments, _judged_where_it_varies)


def _judged_where_it_varies(ours: Any, call: Call, **changed: Any) -> str | None:
    """A channel whose values all but agree is divided by what rounding left of its spread, PyTorch's too."""
    given = {**call.arguments, **changed}
    values = given["input"].double().transpose(0, 1).flatten(1)
    if given["training"] and values.numel() and not values.var(1, correction=0).min() > 0.01 * values.square().max():
        return None
    large = ("input", "weight") if given["weight"] is not None else ("input",)
    return roundings(ours, call, tensors=large, values=0, **changed)


_ALL = (
    _random_start, _label_noise_start, _pgd_step, _pgd_step, _apgd_step, _project, _sample_neighbours,
    _pgd_step_neighbours, _stored_start, _stored_step, _augment, _loss, _loss, _loss, _attack_cotangent,
    _gairat_weights, _compactness, _batch_norm, _nuclear_norm,
)  # fmt: skip
