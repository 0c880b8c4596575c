"""Every torch.library operator of the project in one table: schema and fake.

Operators write into ``out`` tensors and return nothing: the public functions allocate, the backends fill. A parameter
that may be one number or one number per row travels as a pair, ``float eps, Tensor? eps_rows`` (rows win).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch

NAMESPACE = "atlas_kernels"
NORMS = LINF, L2, L1 = "linf", "l2", "l1"  # numbered as in csrc/core/perturb_norms.h

_EPS = "float eps, Tensor? eps_rows"
_STEP = "float step_size, Tensor? step_rows"
_RADIUS = "float radius, Tensor? radius_rows"
_CLIP = "float clip_min, Tensor? clip_min_rows, float clip_max, Tensor? clip_max_rows"
_NOISE = "Tensor key, Tensor? ids, int draw"
_REDUCED = "Tensor? weights, float scale, Tensor(a!) value, Tensor(b!)? total"

# stem -> operator -> arguments
OPERATORS: dict[str, dict[str, str]] = {
    "perturb": {
        "random_start": f"Tensor x, {_EPS}, {_CLIP}, {_NOISE}, Tensor(a!) out",
        "pgd_step": f"Tensor adv, Tensor grad, Tensor x, {_EPS}, {_STEP}, {_CLIP}, bool descend, Tensor? active, "
        "Tensor(a!) out, Tensor(b!)? cast",
        "sample_neighbours": f"Tensor adv, {_RADIUS}, int count, Tensor? x, {_EPS}, {_CLIP}, {_NOISE}, Tensor(a!) out",
        "pgd_step_neighbours": f"Tensor adv, Tensor grad, Tensor x, {_EPS}, {_STEP}, {_RADIUS}, int count, "
        f"bool project, bool include_x, {_CLIP}, bool descend, Tensor? active, {_NOISE}, Tensor(a!) out",
    },
    "augment": {
        "augment": "Tensor images, Tensor index, int padding, bool flip, float mean, Tensor? mean_rows, float std, "
        "Tensor? std_rows, Tensor? key, Tensor? ids, int draw, Tensor(a!) out",
    },
    # value[i] = factor * loss of adversary i; total = sum of value; grads = d(total)/d(h, h_adv).
    "pairwise": {
        "compactness": "Tensor h, Tensor h_adv, Tensor labels, float scale, bool squared, float factor, "
        "Tensor(a!)? value, Tensor(b!)? total, Tensor(c!)? grad, Tensor(d!)? adv_grad",
    },
    # norm: its index in NORMS. largest: an l1 step moves so many of the largest entries of the gradient; 0: dense.
    "perturb_norms": {
        "random_start_norm": f"Tensor x, int norm, {_EPS}, {_CLIP}, {_NOISE}, Tensor(a!) out",
        "pgd_step_norm": f"Tensor adv, Tensor grad, Tensor x, int norm, {_EPS}, {_STEP}, {_CLIP}, bool descend, "
        "Tensor? active, Tensor(a!) out, Tensor(b!)? cast, int largest",
        "project": f"Tensor v, Tensor x, int norm, {_EPS}, {_CLIP}, Tensor(a!) out",
    },
    "objectives": {
        "attack_cotangent": "Tensor logits, Tensor? labels, Tensor? targets, Tensor? reference, int objective, "
        "bool descend, Tensor(a!)? cotangent, Tensor(b!)? correct, Tensor(c!)? kappa, Tensor(d!)? value",
    },
    # value[i] = weights[i] * loss_i; total = scale * sum of value; grad = scale * d(sum of value)/d(logits).
    "losses": {
        "cross_entropy": f"Tensor logits, Tensor labels, float label_smoothing, {_REDUCED}, Tensor(c!)? grad",
        "kl_div": f"Tensor p_logits, Tensor q_logits, {_REDUCED}, Tensor(c!)? p_grad, Tensor(d!)? q_grad",
        "trades_loss": f"Tensor logits, Tensor adv_logits, Tensor labels, float beta, {_REDUCED}, Tensor(c!)? grad, "
        "Tensor(d!)? adv_grad",
        "mart_loss": f"Tensor logits, Tensor adv_logits, Tensor labels, float beta, {_REDUCED}, Tensor(c!)? grad, "
        "Tensor(d!)? adv_grad",
        "entropy": f"Tensor logits, {_REDUCED}, Tensor(c!)? grad",
        "margin_loss": f"Tensor logits, Tensor labels, {_REDUCED}, Tensor(c!)? grad",
        "dlr_loss": f"Tensor logits, Tensor labels, Tensor? targets, {_REDUCED}, Tensor(c!)? grad",
        "logit_pairing": f"Tensor logits, Tensor adv_logits, {_REDUCED}, Tensor(c!)? grad, Tensor(d!)? adv_grad",
        # logits [x; adv; z_1; ..; z_n] one batch after another, x where global_term is not none. terms: float[3, B].
        "atlas_loss": "Tensor logits, Tensor labels, int local, float local_weight, int global_term, "
        f"float global_weight, {_REDUCED}, Tensor(c!)? grad, Tensor(d!)? terms",
        "gairat_weights": "Tensor kappa, int steps, float lam, Tensor(a!) out",
    },
}


class Argument(NamedTuple):
    """Of an operator: its name in the schema, what users call it, and what it may be."""

    name: str
    told: str
    is_tensor: bool
    optional: bool
    written: bool


@cache
def arguments_of(operator: str) -> list[Argument]:
    """What the operator takes, in order."""
    found: list[Argument] = []
    (declared,) = (operators[operator] for operators in OPERATORS.values() if operator in operators)
    for kind, name in (argument.split() for argument in declared.split(",")):
        told = found[-1].name if name.endswith("_rows") else name  # the pair of a number
        found.append(Argument(name, told, kind.startswith("Tensor"), kind.endswith("?"), "!" in kind))
    return found


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
        for name, arguments in operators.items():
            library.define(f"{name}({arguments}) -> ()")
            torch.library.register_fake(f"{NAMESPACE}::{name}", partial(_fake, name), lib=library)
