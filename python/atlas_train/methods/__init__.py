"""The training methods, by name. A new one is one file, and here its import, its name and its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..data import Batch, Dataset, OfEps
from ..options import NORMS, OF_RUN, Norm, canonical, shown, suggestion
from .adr import ADR
from .adv import ADV
from .atlas import ATLAS
from .awp import AWP
from .backward_smoothing import BackwardSmoothing
from .base import Descent, Method, Metrics, State
from .cure import CURE
from .curriculum import Curriculum
from .fgsm_pgi import FGSMPGI
from .fgsm_uap import FGSMUAP
from .free import Free
from .gairat import GAIRAT
from .gat import GAT
from .grad_align import GradAlign
from .jacobian import Jacobian
from .liet import LIET
from .llr import LLR
from .mart import MART
from .mixing import Mixing, require_mixable
from .mma import MMA
from .n_fgsm import NFGSM
from .nuat import NuAT
from .one_step_adv import OneStepADV
from .standard import Standard
from .stored_adv import StoredADV
from .trades import TRADES
from .yopo import YOPO

__all__ = [
    "ADR",
    "ADV",
    "ATLAS",
    "AWP",
    "BackwardSmoothing",
    "Batch",
    "CURE",
    "Curriculum",
    "Descent",
    "FGSMPGI",
    "FGSMUAP",
    "Free",
    "GAIRAT",
    "GAT",
    "GradAlign",
    "Jacobian",
    "LIET",
    "LLR",
    "MART",
    "MMA",
    "Method",
    "Metrics",
    "Mixing",
    "NFGSM",
    "NuAT",
    "OfEps",
    "OneStepADV",
    "Standard",
    "State",
    "StoredADV",
    "TRADES",
    "YOPO",
    "build",
    "defaults_on",
    "get",
    "hyper_parameters",
    "names",
    "require_mixable",
]

_ALL = (
    ATLAS, OneStepADV, ADV, TRADES, MART, GAIRAT, ADR, BackwardSmoothing, Free, YOPO, NFGSM, GradAlign, MMA, LLR, CURE,
    Jacobian, LIET, FGSMPGI, FGSMUAP, NuAT, GAT, StoredADV, Standard,
)  # fmt: skip
_METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def names() -> tuple[str, ...]:
    """The methods that ``get`` knows."""
    return tuple(_METHODS)


def get(name: str) -> type[Method]:
    """The method of that name, in capitals or not. Raises ValueError that names the nearest one."""
    name = canonical(name, _METHODS)
    if name not in _METHODS:
        raise ValueError(f"method: no method {shown(name)}{suggestion(name, _METHODS)} (known: {', '.join(_METHODS)})")
    return _METHODS[name]


def hyper_parameters(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The hyper-parameters of a method, without what is the whole run's."""
    return {f.name: f for f in dataclasses.fields(method) if f.init and f.name not in OF_RUN}


def defaults_on(dataset: Dataset, name: str) -> dict[str, Any]:
    """The hyper-parameters that differ on a data set: those of the method for it or for the data set that it is like,
    and over them those that it declares.

    Raises ValueError if the data set declares them for a method that there is not.
    """
    declared = {get(key).name: values for key, values in dataset.methods.items()}
    method = get(name)
    own = method.defaults.get(dataset.name) or method.defaults.get(dataset.like or "", {})
    return {**own, **declared.get(method.name, {})}


def build(
    name: str,
    eps: float,
    hyper: Mapping[str, Any] | None = None,
    label_smoothing: float = 0.0,
    norm: Norm = "linf",
) -> Method:
    """The method of that name with these hyper-parameters. Raises ValueError for an unknown name or a wrong value."""
    method = get(name)
    known = hyper_parameters(method)
    for key in hyper or {}:
        if key not in known:
            if not known:
                raise ValueError(f"{method.name} has no hyper-parameter {shown(key)}: it has none at all")
            raise ValueError(
                f"{method.name} has no hyper-parameter {shown(key)}{suggestion(key, known)} (known: {', '.join(known)})"
            )
    if norm in NORMS and norm not in method.norms:
        others = ", ".join(cls.name for cls in _ALL if norm in cls.norms)
        raise ValueError(f"norm: {method.name} is a method of the l_inf ball; in {NORMS[norm]} there are {others}")
    return method(eps=eps, norm=norm, label_smoothing=label_smoothing, **(hyper or {}))
