"""Attacks that hold attacks, as MultiAttack does: what is set on one is set on all; torchattacks' attacks may be among
them, and ours in torchattacks' wrappers."""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

Of = TypeVar("Of")
P = ParamSpec("P")
R = TypeVar("R")


def wrapper_method(func: Callable[Concatenate[Of, P], R]) -> Callable[Concatenate[Of, P], R]:
    """A setting that an attack also makes on the attacks that it holds."""

    def wrapper_func(self: Of, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result = func(self, *args, **kwargs)
        for attack in _held(self):
            getattr(attack, func.__name__)(*args, **kwargs)
        return result

    functools.update_wrapper(wrapper_func, func)
    return wrapper_func


def _held(attack: object) -> Iterator[Any]:
    """The attacks among the attributes of one, and in their lists and dicts; each once."""
    theirs = _theirs()
    kinds: tuple[Any, ...] = (Kin,) if theirs is None else (Kin, theirs)
    waiting: list[Any] = list(vars(attack).values())
    seen = {id(attack)}
    while waiting:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            yield value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value


class Kin:
    """To ``isinstance`` also torchattacks' Attack, once that is imported: its wrappers hand settings to no others."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        own: Any = type(self)
        theirs = _theirs()
        return own if theirs is None else _both(own, theirs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(2, protocol))
        # pickle wants the class of what copyreg makes to be __class__.
        return (_new, *made[1:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]


def _theirs() -> Any:
    return getattr(sys.modules.get("torchattacks.attack"), "Attack", None)


@functools.cache
def _both(own: Any, theirs: Any) -> type:
    return own if issubclass(own, theirs) else type(own.__name__, (own, theirs), {"__module__": own.__module__})


def _new(cls: Any, *args: Any) -> Any:
    return cls.__new__(cls, *args)
