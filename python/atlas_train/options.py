"""Declared settings: a dataclass field with its help, its allowed range, and one checker for all of them.

The trainer's configuration and every method declare their settings with ``option``; the checks, the command line, its
help and the list of methods are all made from these declarations.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

#: Fields of a method that are not hyper-parameters of its own: they are the whole run's.
OF_RUN = ("eps", "norm", "label_smoothing")
#: What the norms of the ball of adversaries are called in text.
NORMS = {"linf": "l_inf", "l2": "l2", "l1": "l1"}
Norm = Literal["linf", "l2", "l1"]
#: Settings that change nothing where another one has one of these values: {"beta": [("form", ("adv",))]}.
Switches = Mapping[str, Sequence[tuple[str, tuple[Any, ...]]]]


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    hint: str = "",
    kw_only: bool = False,
    of_linf: bool = False,
) -> Any:
    """A dataclass field. ``low <= value <= high`` and ``above < value < below``; ``hint``: the remedy, for errors.

    of_linf: the upper limit is one of l_inf; where ``norm`` of the same dataclass is another there is none.

    A default of None means "chosen for you": None stays allowed, and the help says what it becomes.
    """
    limits = {"low": low, "above": above, "high": high, "below": below, "of_linf": of_linf}
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"help": help, "hint": hint, **limits})


_LARGEST = 3.4e38  # of float32, in which networks and optimisers compute


def number(value: Any) -> float:
    """A float from a number or from "8/255". Raises ValueError for all else, NaN and what float32 does not hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {shown(value)}")
    try:
        numerator, _, denominator = str(value).partition("/")
        result = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"expected a number or a fraction such as 8/255, got {shown(value)}") from error
    if not abs(result) < _LARGEST:
        raise ValueError(f"expected a finite number, got {shown(value)}")
    return result


def integer(value: Any) -> int:
    """An integer from a number or its text. Raises ValueError for anything else, OverflowError beyond 64 bits."""
    close = number(value)
    if close != int(close):
        raise ValueError(value)
    digits = isinstance(value, str) and value.strip(" +-").isdigit()  # all of them, of which a float keeps 15
    whole = int(value) if digits or isinstance(value, int) else int(close)
    if abs(whole) >= 2**63:
        raise OverflowError(value)
    return whole


def fraction(eps: float) -> str:
    """A radius as one writes it: the plain number where three digits hold it (0.3, 0.5, 12), else a number of 1/255
    where two decimals hold that one (8/255, 0.25/255), else the plain number in at most six digits (0.0375)."""
    short, grey = f"{eps:.3g}", f"{255 * eps:.2f}".rstrip("0").rstrip(".")
    if eps < 1 and not _close(float(short), eps) and _close(float(grey) / 255, eps):
        return f"{grey}/255"
    return f"{eps:.6g}"


def _close(one: float, other: float) -> bool:
    """The same number, perhaps in float32."""
    return math.isclose(one, other, rel_tol=1e-6)


def radius(eps: float, norm: str) -> str:
    """A radius as one writes it, with its norm: 8/255 (l_inf), 0.5 (l2), 12 (l1)."""
    return f"{fraction(eps)} ({NORMS[norm]})"


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name closest to ``name``, for error messages."""
    known = list(known)
    return (difflib.get_close_matches(str(name)[:100].lower(), known, n=1, cutoff=0.0) or known)[0]


def suggestion(name: object, known: Iterable[str]) -> str:
    """ "; the nearest is 'epochs'" for error messages, or nothing where no known name is near."""
    small = {own.lower(): own for own in known}
    near = difflib.get_close_matches(str(name)[:100].lower(), small, n=1, cutoff=0.5)
    return f"; the nearest is {small[near[0]]!r}" if near else ""


def canonical(name: Any, known: Iterable[str]) -> Any:
    """The known name that ``name`` is but for capitals ("CIFAR10" is "cifar10"), or ``name``."""
    return next((own for own in known if isinstance(name, str) and own == name.lower()), name)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: object) -> str:
    """``value`` in a message: quoted, on one line, and shortened where it is long."""
    try:
        text = " ".join(_SHORT.repr(value).split())
        return text if len(text) <= 200 else text[:200] + "..."
    except ValueError:  # an integer of thousands of digits has no text
        return f"an {type(value).__name__} too large to show"


def one_line(error: BaseException, limit: int = 400) -> str:
    """An error of code that is not ours: its type, and its text on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else text[:limit] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plain(name: object) -> str:
    """A name (of a file, a data set, a method) in a message: as it is, or quoted if it holds escapes or newlines."""
    text = str(name)
    return text if text.isprintable() and len(text) < 500 else shown(text)


def in_words(value: object) -> str:
    """The value of a setting in few characters."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.4g}" if number else plain(value)


def switched_off(switches: Switches, values: Mapping[str, Any]) -> dict[str, str]:
    """The settings that change nothing beside these values, each with the reason: "form is adv"."""
    return {
        name: f"{switch} is {'not given' if values[switch] is None else in_words(values[switch])}"
        for name, by in switches.items()
        for switch, off in by[::-1]  # of several reasons the first stays
        if values[switch] in off
    }


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved types of the fields of a dataclass."""  # kept: to resolve them takes as long as a training step
    return typing.get_type_hints(cls)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union other than None, or the type itself."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(member for member in members if member is not type(None))


def check(instance: Any, owner: str) -> None:
    """Checks and converts every field of a (frozen) dataclass instance that was declared with ``option``.

    Raises ValueError that names the setting, the value received and what is allowed.
    """
    cls: type = type(instance)
    kinds = hints(cls)
    for field in dataclasses.fields(instance):
        if "help" in field.metadata:
            field = field if getattr(instance, "norm", "linf") == "linf" else in_any_norm(field)
            value = checked(field, kinds[field.name], getattr(instance, field.name), owner)
            object.__setattr__(instance, field.name, value)


def in_any_norm(field: dataclasses.Field[Any]) -> dataclasses.Field[Any]:
    """The setting without an upper limit that is one of l_inf."""
    if not field.metadata["of_linf"]:
        return field
    other = copy.copy(field)
    other.metadata = types.MappingProxyType({**field.metadata, "high": None, "below": None})
    return other


def checked(field: dataclasses.Field[Any], hint: Any, value: Any, owner: str) -> Any:
    """``value`` converted to the field's type, or ValueError."""
    members = alternatives(hint)
    if value is None and (field.default is None or type(None) in typing.get_args(hint)):
        return None
    remedy = f"; {field.metadata['hint']}" if field.metadata["hint"] else ""
    try:
        converted = _convert(members, value)
        for each in converted if isinstance(converted, tuple) else (converted,):
            if isinstance(each, (int, float)) and not _inside(field, each):
                raise ValueError(value)
    except (ValueError, OverflowError) as error:
        got = shown(value) + (", of more than 64 bits" if isinstance(error, OverflowError) else "")
        raise ValueError(f"{owner}: {field.name} must be {allowed(field, hint)}, got {got}{remedy}") from error
    return converted


def allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    """What a setting accepts, in words: "a number > 0 and <= 1", "one of 'kl', 'ce'", ..."""
    kind = alternatives(hint)[0]
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(kind))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text that is not empty"}
    many = {float: "a list of numbers", int: "a list of integers", str: "a list of texts"}
    said = many[typing.get_args(kind)[0]] if typing.get_origin(kind) is tuple else words[kind]
    return f"{said} {limits(field)}".strip()


def limits(field: dataclasses.Field[Any]) -> str:
    """The range of a setting: "> 0 and <= 1", or nothing."""
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    return " and ".join(f"{s} {field.metadata[key]:g}" for key, s in signs.items() if field.metadata[key] is not None)


def _inside(field: dataclasses.Field[Any], value: float) -> bool:
    low, above, high, below = (field.metadata[key] for key in ("low", "above", "high", "below"))
    return not (
        (low is not None and value < low)
        or (above is not None and value <= above)
        or (high is not None and value > high)
        or (below is not None and value >= below)
    )


def _convert(members: tuple[Any, ...], value: Any) -> Any:
    kind = members[0]
    if typing.get_origin(kind) is typing.Literal:
        value = canonical(value, typing.get_args(kind))
        if value not in typing.get_args(kind):
            raise ValueError(value)
        return value
    if kind is float:
        return number(value)
    if kind is int:
        return integer(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(value)
        return tuple(_convert(typing.get_args(kind)[:1], item) for item in value)
    if not isinstance(value, kind) or value == "":
        raise ValueError(value)
    return value
