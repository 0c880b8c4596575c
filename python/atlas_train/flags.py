"""Command-line flags from declared settings (``options.option``), parsed by tyro."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Annotated, Any

from .options import OF_RUN, alternatives, checked, hints, in_any_norm, limits
from .processes import is_first

AUTO, NONE = "auto", "none"
Flag = tuple[str, Any, Any]
#: A name, what its flags are about, and they.
Section = tuple[str, str, Sequence[Flag]]


def parse(flags: Sequence[Flag], command: str, description: str, argv: Sequence[str], *, all_known: bool = True) -> Any:
    """The flags as one flat object. On an error or --help tyro explains itself, in the first process alone, and exits
    (status 2 or 0).

    all_known: else flags that are not among these, --help too, are passed over.
    """
    tyro = require_tyro()
    how = {"prog": f"atlas {command}", "description": description, "args": list(argv), "console_outputs": is_first()}
    cls = _dataclass(command, flags)
    return tyro.cli(cls, **how) if all_known else tyro.cli(cls, **how, add_help=False, return_unknown_args=True)[0]


def parse_sections(sections: Sequence[Section], command: str, description: str, argv: Sequence[str]) -> Any:
    """``parse`` for flags of which the help shows each section in a box of its own, under its name."""
    tyro = require_tyro()
    boxes: list[Flag] = []
    for name, about, flags in sections:
        box = _dataclass(name, flags)
        boxes.append((name, _annotated(box, tyro.conf.arg(help=about), tyro.conf.OmitArgPrefixes), box()))
    parsed = parse(boxes, command, description, argv)
    return SimpleNamespace(**{key: value for box in vars(parsed).values() for key, value in vars(box).items()})


def _dataclass(name: str, flags: Sequence[Flag]) -> type:
    fields = [(flag, kind, dataclasses.field(default=default)) for flag, kind, default in flags]
    return dataclasses.make_dataclass(name, fields, frozen=True)  # frozen: may be a default itself


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
    if positional:
        spec = _spec(name.upper(), lambda words: words[0])
    else:
        spec = _spec("TEXT", lambda words: None if words == [NONE] else words[0], unset=NONE)
    return name, _annotated(Any, spec, tyro.conf.arg(help=help), *marks), dataclasses.MISSING if positional else None


def texts_flag(name: str, help: str) -> Flag:
    """Positional arguments: texts, as many as are given."""
    tyro = require_tyro()
    spec = _spec(f"{name.upper()} ...", tuple, many=True)
    return name, _annotated(Any, spec, tyro.conf.arg(help=help), tyro.conf.Positional), ()


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
    argument = tyro.conf.arg(help=_help(field))
    if kind is bool and field.default is not None:
        return field.name, _annotated(bool, argument), default
    many = typing.get_origin(kind) is tuple
    has_auto = AUTO in typing.get_args(kind)
    unset = NONE if has_auto or "default:" not in field.metadata["help"].lower() else AUTO  # the word for None

    def convert(words: list[str]) -> Any:
        if field.default is None and (words == [unset] or words == [AUTO] and not has_auto):
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

    return field.name, _annotated(Any, _spec(_metavar(kind), convert, many, unset), argument), default


def _help(field: dataclasses.Field[Any]) -> str:
    return f"{field.metadata['help']} ({limits(field)})" if limits(field) else field.metadata["help"]


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if typing.get_origin(kind) is tuple:
        return {float: "NUMBER ...", int: "INT ...", str: "NAME ..."}[typing.get_args(kind)[0]]
    return {int: "INT", float: "NUMBER", bool: "{true,false}", str: "TEXT"}[kind]


def _spec(metavar: str, convert: Any, many: bool = False, unset: str = AUTO) -> Any:
    """How tyro reads and shows a value that this module converts itself."""
    require_tyro()
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=metavar,
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda value: _shown(value, unset),
    )


def _shown(value: Any, unset: str) -> list[str]:
    if isinstance(value, tuple):
        return list(map(str, value)) or [NONE]
    return [unset if value is None else str(value)]


def _annotated(kind: Any, *marks: Any) -> Any:
    return Annotated.__class_getitem__((kind, *marks))  # type: ignore[attr-defined]
