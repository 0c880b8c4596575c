"""Command-line flags from declared settings (``options.option``), parsed by tyro."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from .options import OF_RUN, alternatives, checked, hints, in_any_norm, limits

AUTO, NONE = "auto", "none"
Flag = tuple[str, Any, Any]


def parse(flags: Sequence[Flag], command: str, description: str, argv: Sequence[str], *, all_known: bool = True) -> Any:
    """The flags as one flat object. On an error or --help tyro explains itself and exits (status 2 or 0).

    all_known: else flags that are not among these, --help too, are passed over.
    """
    tyro = require_tyro()
    cls = dataclasses.make_dataclass(command, [(name, kind, dataclasses.field(default=d)) for name, kind, d in flags])
    how = {"prog": f"atlas {command}", "description": description, "args": list(argv)}
    return tyro.cli(cls, **how) if all_known else tyro.cli(cls, **how, add_help=False, return_unknown_args=True)[0]


def declared(cls: type, values: Mapping[str, Any], group: str = "") -> list[Flag]:
    """A flag for every ``option`` of a dataclass; its default is in ``values``, or is the field's.

    group: the method whose hyper-parameters these are; what is the whole run's has no flag here.
    """
    return [
        _flag(cls, f, values.get(f.name, f.default), group)
        for f in dataclasses.fields(cls)
        if "help" in f.metadata and not (group and f.name in OF_RUN)
    ]


def text_flag(name: str, help: str, *, positional: bool = False) -> Flag:
    """A flag (or a positional argument) that takes any text."""
    tyro = require_tyro()
    marks = (tyro.conf.Positional,) if positional else ()
    spec = _spec("TEXT" if not positional else name.upper(), lambda words: words[0])
    return name, _annotated(Any, spec, tyro.conf.arg(help=help), *marks), dataclasses.MISSING if positional else None


def is_given(name: str, argv: Sequence[str]) -> bool:
    """Whether the flag of that name is among the words, be its value the default or not."""
    flag = name.replace("_", "-")
    return not {f"--{flag}", f"--no-{flag}"}.isdisjoint(word.partition("=")[0].replace("_", "-") for word in argv)


def require_tyro() -> Any:
    """tyro, or ImportError that says how to get it."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the command line needs tyro: pip install 'atlas-kernels[train]'") from error
    return tyro


def _flag(cls: type, field: dataclasses.Field[Any], default: Any, group: str) -> Flag:
    tyro = require_tyro()
    hint = hints(cls)[field.name]
    kind = alternatives(hint)[0]
    argument = tyro.conf.arg(help=_help(field, group))
    if kind is bool and field.default is not None:
        return field.name, _annotated(bool, argument), default
    many = typing.get_origin(kind) is tuple

    def convert(words: list[str]) -> Any:
        if words == [AUTO] and field.default is None:
            return None
        value: Any = [word for word in words if word != NONE] if many else words[0]
        if kind is bool:
            value = {"true": True, "false": False}.get(words[0].lower(), words[0])
        try:
            return checked(field, hint, value, group or "config")
        except ValueError:
            with suppress(ValueError):  # the norm is not known here: what the flags make together is checked anew
                return checked(in_any_norm(field), hint, value, group or "config")
            raise

    return field.name, _annotated(Any, _spec(_metavar(kind), convert, many), argument), default


def _help(field: dataclasses.Field[Any], group: str) -> str:
    allowed = f"({limits(field)})" if limits(field) else ""
    return " ".join(part for part in (f"[{group}]" if group else "", field.metadata["help"], allowed) if part)


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if typing.get_origin(kind) is tuple:
        return "NUMBER ..." if typing.get_args(kind)[0] is float else "NAME ..."
    return {int: "INT", float: "NUMBER", bool: "{true,false}", str: "TEXT"}[kind]


def _spec(metavar: str, convert: Any, many: bool = False) -> Any:
    """How tyro reads and shows a value that this module converts itself."""
    require_tyro()
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=metavar,
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=_shown,
    )


def _shown(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return list(map(str, value)) or [NONE]
    return [AUTO if value is None else str(value)]


def _annotated(kind: Any, *marks: Any) -> Any:
    return Annotated.__class_getitem__((kind, *marks))  # type: ignore[attr-defined]
