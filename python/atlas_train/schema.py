"""What a checkpoint may hold, in one table, checked before anything is built of it: a file can be damaged or edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .evaluate import ACCURACIES
from .options import NORMS, plain, shown

#: More than any run comes to, and less than what arithmetic on it would overflow for.
_LARGE = 2**53


@dataclass(frozen=True)
class Entry:
    """What a value has to be, in words and as a predicate, and what is in it.

    parts: what a dict has to hold, by name; maybe: what it may hold besides. each: what every value of a dict or a list
    has to be.
    """

    words: str
    accepts: Callable[[Any], bool] = lambda value: isinstance(value, dict)
    parts: Mapping[str, Entry] | None = None
    each: Entry | None = None
    maybe: Mapping[str, Entry] | None = None


def require_keys(values: Mapping[str, Any], keys: Iterable[str], source: str, inside: str = "") -> None:
    """Raises ValueError for a key without which the file is of no use."""
    for key in keys:
        if key not in values:
            raise ValueError(f"{source} has no {inside}{key}: it was edited or damaged, or not written by atlas train")


def _require(table: Mapping[str, Entry], values: Mapping[str, Any], source: str, inside: str = "") -> None:
    """Checks what ``values`` has of ``table``."""
    for key, entry in table.items():
        if key in values:
            _require_entry(entry, values[key], source, f"{inside}{key}")


def _require_entry(entry: Entry, value: Any, source: str, name: str) -> None:
    if not entry.accepts(value):
        raise ValueError(f"{source}: {name} must be {entry.words}, got {described(value)}: edited or damaged")
    if entry.parts and value is not None:
        require_keys(value, entry.parts, source, f"{name}.")
        _require(entry.parts, value, source, f"{name}.")
    if entry.maybe and value is not None:
        _require(entry.maybe, value, source, f"{name}.")
    if entry.each:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not str(key).endswith("_extra_state"):  # a module's own, of whatever kind it likes
                _require_entry(entry.each, inner, source, f"{name}.{plain(key)}")


def described(value: Any) -> str:
    """A value of a file in a message."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return shown(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _integer(value) and 0 <= value < _LARGE


def _size(value: Any) -> bool:
    return _count(value) and value > 0


def _number(value: Any) -> bool:
    """NaN is one: an epoch of which no batch counted has no mean."""
    return (_integer(value) or isinstance(value, float)) and not abs(value) > 1e300


def _duration(value: Any) -> bool:
    return _number(value) and 0 <= value < _LARGE


def _row(value: Any) -> bool:
    """The numbers of an epoch."""
    return (
        _named(value)
        and all(number is None or _number(number) for number in value.values())
        and _size(value.get("epoch"))
        and _number(value.get("loss"))
        and _number(value.get("lr"))
        and _count(value.get("skipped", 0))
    )


def _shape(value: Any) -> bool:
    """[C, H, W] of images that can be: a network is asked about two such."""
    return _list(value) and len(value) == 3 and all(map(_size, value)) and math.prod(value) <= 2**24


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _plain(value: Any) -> bool:
    """What JSON holds as well."""
    return value is None or isinstance(value, (bool, str)) or _number(value)


def _change(value: Any) -> bool:
    """Settings that a resumed run has changed: {"epoch": 3, "changed": {"lr": [0.1, 0.2]}}."""
    return (
        _named(value)
        and _count(value.get("epoch"))
        and _named(value.get("changed"))
        and all(_list(pair) and len(pair) == 2 and all(map(_plain, pair)) for pair in value["changed"].values())
    )


def _answers(value: Any) -> bool:
    """The logits of two images, which may be infinite, or None."""
    if value is None:
        return True
    rows = _list(value) and all(_list(row) and all(isinstance(logit, float) for logit in row) for row in value)
    return rows and len(value) == 2 and len(value[0]) == len(value[1]) > 0


def _rescue(value: Any) -> bool:
    """A collapse that was taken back: {"epoch": 5, "back_to": 3, "sign": "...", "changed": {"steps": [1, 2]}}."""
    known = _change(value) and _size(value.get("back_to")) and _text(value.get("sign"))
    return known and all(_number(each) or _text(each) for pair in value["changed"].values() for each in pair)


def _collapse(value: Any) -> bool:
    return _list(value) and len(value) == 2 and _size(value[0]) and _text(value[1])


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(_count(number) for number in value)


def _tensor(value: Any) -> bool:
    """A dense tensor in memory of its own: what it claims to hold is in the file."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        and all(step or size < 2 for size, step in zip(value.shape, value.stride(), strict=True))
    )


def _weight(value: Any) -> bool:
    return _tensor(value) and not bool(value.isnan().any())


def _rng(value: Any) -> bool:
    return _tensor(value) and value.dtype == torch.uint8 and value.dim() == 1


_TENSOR = Entry("a dense tensor", _tensor)
_WEIGHTS = Entry("tensors by name", _named, each=Entry("a dense tensor without NaN", _weight))
_KEPT = Entry("tensors by name", _named, each=Entry("a dense tensor", lambda value: value is None or _tensor(value)))
ARCH = {
    "name": Entry("a text", _text),
    "by_name": Entry("true or false", _flag),
    "num_classes": Entry("an integer >= 1", _size),
    "in_channels": Entry("an integer >= 1", _size),
    "width": Entry("None or an integer >= 1", lambda value: value is None or _size(value)),
}
IMAGES = {
    "images": Entry("an integer >= 1", _size),
    "shape": Entry("[channels, height, width]", _shape),
    "sha256": Entry("hexadecimal digits", lambda value: _text(value) and value.isalnum()),
}
DATA = {
    "name": Entry("a text", _text),
    "loader": Entry("None or a text", lambda value: value is None or _text(value)),
    "num_classes": Entry("an integer >= 1", _size),
    "train": Entry("a record of images", parts=IMAGES),
    "test": Entry("a record of images", parts=IMAGES),
}
CHECKPOINT = {
    "config": Entry("settings by name"),
    "data": Entry("a record of the images", parts=DATA, maybe={"extra": Entry("a record of images", parts=IMAGES)}),
    "hyper": Entry("values by name", _named, each=Entry("a value as in JSON", _plain)),
    "changes": Entry("a list", _list, each=Entry("changed settings", _change)),
    "versions": Entry("versions by name", _named, each=Entry("a text", _text)),
    "answers": Entry("None or the logits of two images", _answers),
    "arch": Entry("the network's name and sizes", parts=ARCH),
    "epoch": Entry("an integer >= 0", _count),
    "step": Entry("an integer >= 0", _count),
    "seconds": Entry("a number >= 0", _duration),
    "history": Entry("a list of epochs", _list, each=Entry("the numbers of an epoch", _row)),
    "model": _WEIGHTS,
    "optimizer": Entry("an optimiser's state", parts={"state": Entry("tensors by parameter", _numbered, each=_KEPT)}),
    "memory": Entry("tensors by name", _named, each=_TENSOR),
    "average": Entry(
        "None or an average of weights",
        lambda value: value is None or isinstance(value, dict),
        {"count": Entry("an integer >= 0", _count), "model": _WEIGHTS},
    ),
    "validation": Entry("None or a record of images", lambda value: value is None or isinstance(value, dict), IMAGES),
    **dict.fromkeys(("best", "peak_memory"), Entry("an integer >= 0", _count)),
    **dict.fromkeys(("best_raw", "raw"), Entry("true or false", _flag)),
    "rescues": Entry("a list", _list, each=Entry("a collapse that was taken back", _rescue)),
    "ended": Entry("a text", _text),
    "within": Entry(
        "an epoch under way",
        parts={
            "batches": Entry("an integer >= 1", _size),
            **dict.fromkeys(("images", "skipped"), Entry("an integer >= 0", _count)),
            **dict.fromkeys(("seconds", "waited"), Entry("a number >= 0", _duration)),
            **dict.fromkeys(("lr", "momentum"), Entry("a number >= 0", _duration)),
            "segment": Entry("None or a number", lambda value: value is None or _number(value)),
            "metrics": Entry("tensors by name", _named, each=_TENSOR),
        },
    ),
    "rng": Entry(
        "states of random generators",
        parts={
            "cpu": Entry("a generator's state", _rng),
            "cuda": Entry("a list", _list, each=Entry("a generator's state", _rng)),
        },
    ),
}

#: What is no tensor.
FACTS = (
    "config", "data", "hyper", "changes", "versions", "answers", "arch", "epoch", "step", "seconds", "history",
    "validation", "best", "best_raw", "rescues", "ended",
)  # fmt: skip
#: What a run needs to go on; the rest may be missing, and newer versions know more.
NEEDED = ("config", "arch", "epoch", "step", "seconds", "history", "model", "optimizer", "rng")
#: What an evaluation that was written before has to say to be taken again.
EVALUATION = {
    **dict.fromkeys(ACCURACIES, Entry("a share", _share)),
    **dict.fromkeys(("images", "pgd_steps", "pgd_restarts"), Entry("an integer >= 1", _size)),
    **dict.fromkeys(("eps", "pgd_step_size", "seconds"), Entry("a number", _number)),
    "device": Entry("a text", _text),
}
_COSTS = {
    **dict.fromkeys(("training_seconds", "epoch_seconds", "passes"), Entry("a number", _number)),
    **dict.fromkeys(("skipped", "epoch", "memory"), Entry("an integer >= 0", _count)),
    **dict.fromkeys(("rule", "ended"), Entry("a text", _text)),
    "raw": Entry("true or false", _flag),
    "signs": Entry("a list", _list, each=Entry("a text", _text)),
    "norm": Entry("one of linf, l2, l1", lambda value: _text(value) and value in NORMS),
    "validation_share": Entry("a number", _number),
    "collapses": Entry("a list", _list, each=Entry("an epoch and a sign", _collapse)),
    "rescues": Entry("a list", _list, each=Entry("a collapse that was taken back", _rescue)),
    "autoattack": Entry(
        "AutoAttack's result",
        parts={
            "accuracy": Entry("a share", _share),
            "images": Entry("an integer >= 1", _size),
            "version": Entry("a text", _text),
            "seconds": Entry("a number", _number),
        },
    ),
}


def require_evaluation(values: Any, source: str) -> None:
    """Raises ValueError, naming the entry, unless ``values`` are a ``Result`` as it is written."""
    for each in (values, values.get("best") if isinstance(values, dict) else None):
        if each is not None or each is values:
            _require_entry(Entry("an evaluation", parts=EVALUATION), each, source, "")
            _require(_COSTS, each, source)


#: What ``atlas evaluate --attacks --json`` says of what it measured.
REPORT = {
    "images": Entry("an integer >= 1", _size),
    "norm": _COSTS["norm"],
    "weights": Entry("hexadecimal digits", _text),
    "attacks": Entry(
        "a list of attacks",
        lambda value: _list(value) and len(value) > 0,
        each=Entry(
            "what an attack left",
            parts={
                "attack": Entry("a text", _text),
                "eps": Entry("None or a number", lambda value: value is None or _number(value)),
                "accuracy": Entry("a share", _share),
                "per_class": Entry("shares by class", _named, each=Entry("a share", _share)),
            },
        ),
    ),
}


def require_report(values: Mapping[str, Any], source: str) -> None:
    """Raises ValueError, naming the entry, unless ``values`` are the evaluation of a ``Report`` as it is written."""
    _require_entry(Entry("an evaluation", parts=REPORT), values, source, "")


def require_facts(state: Mapping[str, Any], source: str) -> None:
    """``require_checkpoint`` for a state without its tensors."""
    require_keys(state, ("arch", "config"), source)
    _require({name: entry for name, entry in CHECKPOINT.items() if name in FACTS}, state, source)


def require_checkpoint(state: Mapping[str, Any], source: str, needed: Iterable[str] = ("model",)) -> None:
    """Raises ValueError, naming the entry, unless ``state`` is what a run writes; ``needed`` of it are there."""
    require_keys(state, needed, source)
    _require(CHECKPOINT, state, source)
    if {"epoch", "step", "history"} <= state.keys():
        epoch, step, epochs = state["epoch"], state["step"], [row["epoch"] for row in state["history"]]
        whole = len(epochs) == epoch >= state.get("best", 0) and all(n == seen for n, seen in enumerate(epochs, 1))
        step -= state["within"]["batches"] if "within" in state else 0
        if not whole or (step % epoch if epoch else step):
            raise ValueError(
                f"{source}: epoch {epoch}, step {step} and a history of epochs {shown(epochs)} contradict each other: "
                "edited or damaged"
            )


def require_sizes(arch: Mapping[str, Any], weights: Mapping[str, Any], source: str) -> None:
    """Raises ValueError for sizes that the weights cannot be of, so that no network is built for a wrong number."""
    largest = max((value.numel() for value in weights.values() if isinstance(value, Tensor)), default=0)
    for name in ("num_classes", "in_channels", "width"):
        if (arch[name] or 0) > largest:
            raise ValueError(
                f"{source}: arch.{name} is {arch[name]}, and the largest of its weights holds {largest:,} numbers: "
                "edited or damaged"
            )
