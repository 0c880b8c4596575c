"""Every torch.library operator of the project in one table: what it takes, in the words of ``Argument``.

Operators write into ``out`` tensors and return nothing: the public functions allocate, the backends fill. The schema of
torch.library, the fake, what is asked of a call before it runs, and what the kernels get by which name: all is made of
this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch

NAMESPACE = "atlas_kernels"
NORMS = LINF, L2, L1 = "linf", "l2", "l1"  # numbered as in csrc/core/perturb_norms.h
OBJECTIVES = ("ce", "kl", "margin", "dlr", "dlr_targeted")  # numbered as in csrc/api.h, as are the terms of atlas_loss
TERMS = ("kl", "ce", "logit", "none")
DISTANCES = ("logit", "prob", "js", "kl")  # of consistency_loss
# Who draws: low byte of the last counter word, so that two kinds of noise of one attack never share words.
STREAM_START, STREAM_NEIGHBOUR, STREAM_AUGMENT, STREAM_LABEL_NOISE, STREAM_SEARCH = range(5)
SHARES = 2**12  # what a share of pixels is counted in: kWhole of csrc/core/perturb.h

_CLIP = "number[channels] clip_min, number[channels] clip_max"
_NOISE = "int64[2] key, int64[batch]? ids, int draw"
_STEP = "images[batch] adv, images[batch] grad, images[batch] x"
_APGD = "images[batch] adv, images[batch] old, images[batch] grad, images[batch] x"
_LOGITS, _ADV = "same[batch, classes] logits", "same[batch, classes] adv_logits"
_LABELS = "int64[batch] labels"
_REDUCED = "wide[batch]? weights, float scale, wide[batch]! value, wide[]!? total"
_GRAD, _ADV_GRAD = "same[batch, classes]!? grad", "same[batch, classes]!? adv_grad"

# stem -> operator -> arguments
OPERATORS: dict[str, dict[str, str]] = {
    "perturb": {
        "random_start": f"images[batch] x=adv, number[batch] eps=radius, {_CLIP}, {_NOISE}, images[rows]! out",
        "label_noise_start": f"images[batch] x=adv, {_LABELS}, images[classes] label_noise=x, "
        f"number[batch] eps=radius, int share_low, int share_high, {_CLIP}, {_NOISE}, images[rows]! out",
        "pgd_step": f"{_STEP}, number[batch] eps, number[batch] step_size, {_CLIP}, bool descend, bool[batch]? active, "
        "images[rows]! out, images[batch]!? cast",
        "apgd_step": f"{_APGD}, number[batch] eps, number[batch] step_size, number[batch] momentum, {_CLIP}, "
        "bool descend, bool[batch]? active, images[rows]! out, images[batch]!? cast",
        "sample_neighbours": f"images[batch] adv, number[batch] radius, int count, images[batch]? x, "
        f"number[batch] eps, {_CLIP}, {_NOISE}, images[rows]! out",
        "pgd_step_neighbours": f"{_STEP}, number[batch] eps, number[batch] step_size, number[batch] radius, int count, "
        f"bool project, bool include_x, {_CLIP}, bool descend, bool[batch]? active, {_NOISE}, images[rows]! out",
    },
    "augment": {
        "augment": "bytes[count, channels, height, width] images, int64[batch] index, int padding, bool flip, "
        "number[channels] mean, number[channels] std, int64[2]? key, int64[batch]? ids, int draw, "
        "images[batch, channels, crop_height, crop_width]! out",
    },
    # value[i] = factor * loss of adversary i; total = sum of value; grads = d(total)/d(h, h_adv).
    "pairwise": {
        "compactness": f"same[batch, features] h, same[batch, features] h_adv, {_LABELS}, float scale, bool squared, "
        "float factor, wide[batch]!? value, wide[]!? total, wide[batch, features]!? grad, "
        "wide[batch, features]!? adv_grad",
    },
    # The derivatives of <x_cotangent, gradient by x> + <weight_cotangent, .. by weight> + <bias_cotangent, .. by bias>.
    "batch_norm": {
        "batch_norm_double_backward": "images[batch] x, images[batch] cotangent, images[batch] x_cotangent, "
        "wide[channels] mean, wide[channels] invstd, wide[channels]? weight, wide[channels]? weight_cotangent, "
        "wide[channels]? bias_cotangent, bool training, images[batch]!? cotangent_grad, images[batch]!? x_grad, "
        "wide[channels]!? weight_grad",
    },
    # grad: that of the value. Singular values that are roundings of 0 count as 0 in both.
    "nuclear_norm": {
        "nuclear_norm": "same[batch, classes] d, wide[]! value, wide[batch, classes]!? grad",
    },
    # norm: its index in NORMS. largest: an l1 step moves so many of the largest entries of the gradient; 0: dense. By
    # sample, those that tie with the last one move too.
    "perturb_norms": {
        "random_start_norm": f"images[batch] x=adv, int norm, number[batch] eps, {_CLIP}, {_NOISE}, images[batch]! out",
        "pgd_step_norm": f"{_STEP}, int norm, number[batch] eps, number[batch] step_size, {_CLIP}, bool descend, "
        "bool[batch]? active, images[batch]! out, images[batch]!? cast, int largest",
        "apgd_step_norm": f"{_APGD}, int norm, number[batch] eps, number[batch] step_size, number[batch] momentum, "
        f"{_CLIP}, bool descend, bool[batch]? active, images[batch]! out, images[batch]!? cast, "
        "int64[batch]? largest=largest_rows",
        "project": f"images[batch] v=adv, images[batch] x, int norm, number[batch] eps, {_CLIP}, images[batch]! out",
    },
    # gap + grad (z - adv) = 0 is the plane; see csrc/api.h.
    "hyperplane": {
        "hyperplane_step": f"{_STEP}, wide[batch] gap, int norm, float alpha_max, float overshoot, {_CLIP}, "
        "images[batch]! out",
    },
    # d, m: the rows `index` of stored and momentum. Without grad out = clip(x + d); else see csrc/api.h.
    "stored": {
        "stored_start": f"images[batch] x, images[count] stored, int64[batch] index, {_CLIP}, images[batch]! out",
        "stored_step": "images[batch] x, images[batch] grad, images[count]! stored, images[count]! momentum, "
        f"int64[batch] index, number[batch] eps, number[batch] step_size, float decay, {_CLIP}, images[batch]! out",
    },
    "objectives": {
        "attack_cotangent": f"{_LOGITS}, int64[batch]? labels, int64[batch]? targets, same[batch, classes]? reference, "
        "int objective, bool descend, same[batch, classes]!? cotangent, bool[batch]!? correct, int64[batch]!? kappa, "
        "wide[batch]!? value",
    },
    # value[i] = weights[i] * loss_i; total = scale * sum of value; grad = scale * d(sum of value)/d(logits).
    "losses": {
        "cross_entropy": f"{_LOGITS}, {_LABELS}, float label_smoothing=parameter, {_REDUCED}, {_GRAD}",
        "kl_div": "same[batch, classes] p_logits=logits, same[batch, classes] q_logits=adv_logits, "
        f"{_REDUCED}, same[batch, classes]!? p_grad=grad, same[batch, classes]!? q_grad=adv_grad",
        "trades_loss": f"{_LOGITS}, {_ADV}, {_LABELS}, float beta=parameter, {_REDUCED}, {_GRAD}, {_ADV_GRAD}",
        "mart_loss": f"{_LOGITS}, {_ADV}, {_LABELS}, float beta=parameter, {_REDUCED}, {_GRAD}, {_ADV_GRAD}",
        "entropy": f"{_LOGITS}, {_REDUCED}, {_GRAD}",
        "margin_loss": f"{_LOGITS}, {_LABELS}, {_REDUCED}, {_GRAD}",
        "dlr_loss": f"{_LOGITS}, {_LABELS}, int64[batch]? targets, {_REDUCED}, {_GRAD}",
        "logit_pairing": f"{_LOGITS}, {_ADV}, {_REDUCED}, {_GRAD}, {_ADV_GRAD}",
        "soft_cross_entropy": f"{_LOGITS}, wide[batch, classes] distributions, float label_smoothing=parameter, "
        f"{_REDUCED}, {_GRAD}",
        "consistency_loss": f"{_LOGITS}, same[batch, classes] other_logits=adv_logits, int64[batch]? labels, "
        "wide[batch, classes]? distributions, int distance, number[] distance_weight, float label_smoothing=parameter, "
        f"{_REDUCED}, {_GRAD}, same[batch, classes]!? other_grad=adv_grad, wide[2, batch]!? terms",
        # logits [x; adv; z_1; ..; z_n] one batch after another, x where global_term is not none.
        "atlas_loss": f"same[rows, classes] logits, {_LABELS}, int local, float local_weight, int global_term, "
        f"float global_weight, {_REDUCED}, same[rows, classes]!? grad, wide[3, batch]!? terms",
        "gairat_weights": "int64[batch] kappa, int steps, float lam, float32[batch]! out",
    },
}
# What the kernels get besides, where an operator has no argument for it.
FIXED: dict[str, Mapping[str, int]] = {
    "random_start": {"count": 1, "stream": STREAM_START},
    "label_noise_start": {"count": 1, "stream": STREAM_LABEL_NOISE},
    "sample_neighbours": {"stream": STREAM_NEIGHBOUR},
    "pgd_step_neighbours": {"stream": STREAM_NEIGHBOUR},
    "augment": {"stream": STREAM_AUGMENT},
    "random_start_norm": {"stream": STREAM_START},
}


class Argument(NamedTuple):
    """Of an operator, written ``kind name`` in the table, or ``kind name=field`` where the kernels call it otherwise.

    Kinds: int, float and bool; ``number[d]``, one number or one for each of d, which travels as a pair, ``float eps,
    Tensor? eps_rows`` (rows win); and tensors, ``type[sides]``, with ``!`` where they are written and ``?`` where they
    may be None. A side is a number, or a name that stands for one number in the whole call.

    Types, contiguous but for the first two: ``images``, of any float type, contiguous or channels_last (with one side
    alone, the others are those of the first images); ``bytes``, uint8 that lies so; ``same``, the float type of the
    first images or the first ``same``; ``wide``, what that is computed in; int64, bool, float32 and float64.
    """

    name: str
    told: str  # what users call it
    field: str  # what the kernels call it
    type: str
    sides: tuple[str, ...]
    optional: bool = False
    written: bool = False

    @property
    def is_tensor(self) -> bool:
        return bool(self.sides) or self.type not in ("int", "float", "bool")

    @property
    def shown(self) -> str:
        """As messages say what it must be."""
        return f"{self.type}[{', '.join(self.sides)}]"


_DECLARED = re.compile(r"(\w+(?:\[[^]]*\])?[!?]*) (\w+)(?:=(\w+))?(?:, |$)")


def parse(declared: str) -> tuple[Argument, ...]:
    """The arguments that a line of the table declares; the pair of a number is two."""
    found: list[Argument] = []
    for kind, name, field in _DECLARED.findall(declared):
        field = field or name
        type, _, rest = kind.partition("[")
        inside, _, marks = rest.partition("]")
        sides = tuple(inside.split(", ")) if inside else ()
        if type == "number":
            found.append(Argument(name, name, field, "float", ()))
            found.append(Argument(f"{name}_rows", name, f"{field}_rows", "wide", sides, optional=True))
        else:
            found.append(Argument(name, name, field, type, sides, "?" in marks, "!" in marks))
    return tuple(found)


@cache
def arguments_of(operator: str) -> tuple[Argument, ...]:
    """What the operator takes, in order."""
    (declared,) = (operators[operator] for operators in OPERATORS.values() if operator in operators)
    return parse(declared)


def _torch_schema(operator: str) -> str:
    """As torch.library writes it."""
    letters, words = iter("abcdefgh"), []
    for a in arguments_of(operator):
        kind = a.type
        if a.is_tensor:
            kind = f"Tensor({next(letters)}!)" if a.written else "Tensor"
        words.append(f"{kind}{'?' * a.optional} {a.name}")
    return f"{operator}({', '.join(words)}) -> ()"


def require_given(operator: str, args: tuple[Any, ...]) -> None:
    """PyTorch lets None through where a schema says Tensor."""
    for argument, value in zip(arguments_of(operator), args, strict=True):
        if value is None and not argument.optional:
            raise TypeError(f"{argument.told} must be given to {operator}, got None")


def _fake(operator: str, *args: object) -> None:
    """Nothing is returned, so there is no shape to infer; None and a mix of devices would pass here in silence."""
    require_given(operator, args)
    devices = {str(a.device) for a in args if isinstance(a, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def define(library: torch.library.Library) -> None:
    """Define every operator of the table in ``library`` and register its fake."""
    for operators in OPERATORS.values():
        for name in operators:
            library.define(_torch_schema(name))
            torch.library.register_fake(f"{NAMESPACE}::{name}", partial(_fake, name), lib=library)
