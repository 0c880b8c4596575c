"""Networks of your own, by import path: "package.module:factory" or "path/to/file.py:factory"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..options import nearest


def is_import_path(name: str | None) -> bool:
    """Whether a model's name says where its code is."""
    return name is not None and ":" in name


def build_imported(path: str, **sizes: int) -> nn.Module:
    """``factory(**sizes)``: the code at ``path`` is run. Raises ValueError that says what is wrong with it."""
    factory = _factory(path)
    called = f"model {path!r} is called with " + ", ".join(f"{name}={value}" for name, value in sizes.items())
    try:
        inspect.signature(factory).bind(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{called}, and it does not take that: {error}") from error
    model = factory(**sizes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{called}, and must give a torch.nn.Module, got {type(model).__name__}")
    return model


def _factory(path: str) -> Any:
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(f"model {path!r} must be package.module:factory or path/to/file.py:factory")
    module = _from_file(path, Path(where)) if where.endswith(".py") else _from_name(path, where)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        near = f"; the nearest is {nearest(name, public)!r}" if public else ""
        raise ValueError(f"model {path!r}: {where} has no {name!r}{near}")
    if not callable(factory := getattr(module, name)):
        raise ValueError(f"model {path!r}: {name} must be a class or a function, got {type(factory).__name__}")
    return factory


def _from_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"model {path!r}: there is no file {file.resolve()}")
    spec = importlib.util.spec_from_file_location(f"_atlas_model_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _importable(file.parent):
        spec.loader.exec_module(module)
    return module


def _from_name(path: str, name: str) -> ModuleType:
    try:
        with _importable(Path()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            found = f"neither installed nor in this folder, {Path().resolve()}"
            raise ValueError(f"model {path!r}: there is no module {error.name!r}, {found}") from error
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
