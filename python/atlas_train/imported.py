"""Code of your own, by import path: "package.module:factory" or "path/to/file.py:factory"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, Literal

from . import hub
from .options import one_line, plain, suggestion

#: The setting, and the flag, that takes an import path.
Kind = Literal["model", "dataset"]


def is_import_path(name: str | None) -> bool:
    """Whether a name says where code is."""
    return name is not None and ":" in name and not hub.is_on_hub(name)


def require_trusted(kind: Kind, name: str | None, source: object) -> None:
    """Raises ValueError if the name that the file ``source`` holds is an import path: a file must not say what runs."""
    if is_import_path(name):
        raise ValueError(
            f"{plain(source)} names code of your own, {plain(name)}, and code that a file names is not run unasked: if "
            f"you trust it, say so with --{kind} {plain(name)} (atlas evaluate: or --trust)"
        )


def same_code(path: str | None, recorded: str | None) -> bool:
    """Whether an import path is what a file recorded, which may know no more of it than its last part."""
    return is_import_path(path) and PurePath(str(path)).name == PurePath(str(recorded)).name


def without_place(path: str) -> str:
    """A path for files that others read: of one that starts at the root, or goes up, the last part alone."""
    parts = PurePath(path)
    return parts.name or path if parts.is_absolute() or ".." in parts.parts else path


def find(kind: Kind, path: str) -> Any:
    """The class or function at ``path``; its module is run. Raises ValueError that says what is wrong with the path."""
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(f"{kind} {path!r} must be package.module:factory or path/to/file.py:factory")
    module = _from_file(kind, path, Path(where)) if where.endswith(".py") else _from_name(kind, path, where)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise ValueError(f"{kind} {path!r}: {where} has no {name!r}{suggestion(name, public)}")
    if not callable(factory := getattr(module, name)):
        raise ValueError(f"{kind} {path!r}: {name} must be a class or a function, got {type(factory).__name__}")
    return factory


def called(kind: Kind, path: str, arguments: Mapping[str, Any]) -> str:
    """The beginning of what is said of a factory's call."""
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{kind} {path!r} is called with {given or 'no arguments'}"


def mismatch(factory: Any, arguments: Mapping[str, Any]) -> Exception | None:
    """Why the signature does not take the arguments."""
    try:
        inspect.signature(factory).bind(**arguments)
    except (TypeError, ValueError) as error:
        return error
    return None


def refused(call: str, factory: Any, arguments: Mapping[str, Any], error: Exception) -> ValueError:
    """What is raised where a factory raised ``error``. call: what ``called`` gives."""
    wrong = mismatch(factory, arguments)
    why = f"it does not take that: {wrong}" if wrong else f"it fails: {one_line(error)}"
    return ValueError(f"{call}, and {why}")


def _from_file(kind: Kind, path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"{kind} {path!r}: there is no file {file.resolve()}")
    spec = importlib.util.spec_from_file_location(f"_atlas_{kind}_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _importable(file.parent):
        spec.loader.exec_module(module)
    return module


def _from_name(kind: Kind, path: str, name: str) -> ModuleType:
    try:
        with _importable(Path()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            found = f"neither installed nor in this folder, {Path().resolve()}"
            raise ValueError(f"{kind} {path!r}: there is no module {error.name!r}, {found}") from error
        raise


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported too, after all others."""
    entry = str(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
