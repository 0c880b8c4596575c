"""Recipes that others have published figures with, by name: a table of settings each, over which single ones win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .options import NORMS, canonical, fraction

PROTOCOLS: dict[str, dict[str, Any]] = {
    # FastAT Benchmark (arXiv 2604.22853): main.py, configs/cifar10, fast_at/at_base.py and pgd_at.py, commit b99c0de6.
    "fastat": {
        "norm": "linf",
        "eps": 8 / 255,
        "dataset": "cifar10",
        "augment": True,
        "val_size": 1000,
        "val_step_size": 2 / 255,
        "model": "resnet18",
        "mean": (),
        "std": (),
        "epochs": 100,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "one_cycle",
        "schedule_step": "epoch",
        "cyclic_peak": 0.3,
        "momentum": 0.95,
        "momentum_low": 0.85,
        "weight_decay": 5e-4,
        "decay_norms": True,
        "label_smoothing": 0.4,
        "averaging": "ema",
        "ema_decay": 0.9995,
        "ema_warmup": False,
        "average_bn": "average",
        "best_of": "either",
        "train_precision": "fp32",
        "attack_precision": "fp32",
    },
}


#: Of single methods: settings, and hyper-parameters. LIET has a smoothing of its own, 0.6 there, instead of the run's;
#: the published figures of GAT and NuAT come from the benchmark's own variants, code=fastat.
OF_METHODS: dict[str, dict[str, dict[str, Any]]] = {"fastat": {"liet": {"label_smoothing": 0.0}}}
HYPER: dict[str, dict[str, dict[str, Any]]] = {"fastat": {"gat": {"code": "fastat"}, "nuat": {"code": "fastat"}}}
#: What no protocol has, and how that is written in the settings.
_ABSENT: dict[str, Any] = {
    "train_size": None, "extra_data": None, "mixup": 0.0, "cutmix": 0.0, "width": None, "activation": "relu",
    "init": None, "lr_warmup": 0.0, "clip_norm": 0.0, "eps_warmup": 0, "mix_share": 0.0, "awp": 0.0,
}  # fmt: skip


def missing(protocol: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the protocol has of the settings that are not given; nothing for a name that is not known."""
    protocol = canonical(protocol, PROTOCOLS)
    known = isinstance(protocol, str) and protocol in PROTOCOLS
    table = _table(protocol, str(given.get("method")).lower()) if known else {}
    return {name: value for name, value in table.items() if given.get(name) is None}


def _table(protocol: str, method: str) -> dict[str, Any]:
    return PROTOCOLS[protocol] | OF_METHODS[protocol].get(method, {})


def beside(protocol: str | None, settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that are others for ``method`` than for the one of ``settings``, where those are the protocol's."""
    if not protocol:
        return {}
    mine, other = _table(protocol, settings["method"]), _table(protocol, method)
    return {name: value for name, value in other.items() if value != mine[name] == settings[name]}


def hyper(protocol: str | None, method: str) -> dict[str, Any]:
    """The hyper-parameters of a method in the protocol."""
    return HYPER[protocol].get(method, {}) if protocol else {}


def require_of_norm(protocol: str | None, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where the lengths of the protocol would be taken in another norm than they are of."""
    table = PROTOCOLS[protocol] if protocol else {}
    if table and settings["norm"] != table["norm"]:
        for name in ("eps", "val_step_size"):
            if settings[name] == table[name]:
                raise ValueError(
                    f"config: {name} {written(name, table[name])} of protocol {protocol} is of {NORMS[table['norm']]}, "
                    f"and norm is {settings['norm']!r}: give {name} too, or leave norm out"
                )


def departures(protocol: str | None, settings: Mapping[str, Any]) -> str:
    """The protocol and what differs from it, in words; nothing without one."""
    if not protocol:
        return ""
    table = _table(protocol, settings["method"]) | _ABSENT
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    others = [f"{name} {written(name, plain[name])}" for name, value in table.items() if plain[name] != value]
    return f"protocol {protocol}" + (f" but {', '.join(others)}" if others else "")


def told(protocol: str) -> str:
    """The whole table, in the words of the command line."""
    lists = [("", PROTOCOLS[protocol]), *OF_METHODS[protocol].items(), *HYPER[protocol].items()]
    words = [(of, ", ".join(f"{name} {written(name, value)}" for name, value in table.items())) for of, table in lists]
    return "; ".join(f"{of}: {values}" if of else values for of, values in words)


def written(name: str, value: Any) -> str:
    """A setting's value as the command line takes it."""
    if name in ("eps", "val_step_size") and value is not None:
        return fraction(value)
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
