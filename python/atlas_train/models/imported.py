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

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from atlas_kernels import noise_key
from atlas_kernels.attacks.contract import leave_no_trace
from atlas_kernels.outputs import logits_of

from ..options import one_line, plain, suggestion


def is_import_path(name: str | None) -> bool:
    """Whether a model's name says where its code is."""
    return name is not None and ":" in name


def build_imported(path: str, **sizes: int) -> nn.Module:
    """``factory(**sizes)``: the code at ``path`` is run. Raises ValueError that says what is wrong with it.

    A factory that does not take ``in_channels``, as those of torchvision, is called without.
    """
    factory = _factory(path)
    called = f"model {path!r} is called with " + ", ".join(f"{name}={value}" for name, value in sizes.items())
    fewer = {name: size for name, size in sizes.items() if name != "in_channels"}
    try:
        model = factory(**(fewer if _takes(factory, fewer) and not _takes(factory, sizes) else sizes))
    except TypeError as error:
        if "in_channels" not in str(error) or not _takes(factory, fewer):
            raise _refused(called, factory, sizes, error) from error
        try:  # it took **kwargs, and handed them on to what does not know the word
            model = factory(**fewer)
        except Exception as other:
            raise _refused(called, factory, fewer, other) from other
    except Exception as error:
        raise _refused(called, factory, sizes, error) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{called}, and must give a torch.nn.Module, got {type(model).__name__}")
    return model


def _takes(factory: Any, sizes: dict[str, int]) -> bool:
    return _mismatch(factory, sizes) is None


def _mismatch(factory: Any, sizes: dict[str, int]) -> Exception | None:
    """Why the signature does not take the sizes."""
    try:
        inspect.signature(factory).bind(**sizes)
    except (TypeError, ValueError) as error:
        return error
    return None


def _refused(called: str, factory: Any, sizes: dict[str, int], error: Exception) -> ValueError:
    mismatch = _mismatch(factory, sizes)
    why = f"it does not take that: {mismatch}" if mismatch else f"it fails: {one_line(error)}"
    return ValueError(f"{called}, and {why}")


def require_usable(model: nn.Module, name: str, images: Tensor, num_classes: int) -> None:
    """Runs the network once, in eval mode and without a trace. Raises ValueError, naming it, where it cannot be used.

    images: some of the data set, [B, C, H, W] in [0, 1], on the network's device.
    """
    if lazy := next((key for key, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)), None):
        where = "in the factory, before it returns the model" if is_import_path(name) else "before you give it"
        raise ValueError(
            f"model {plain(name)}: {plain(lazy)} is not initialised yet: run the model once, on images "
            f"{list(images.shape)}, {where}"
        )
    given = f"model {plain(name)}, given images {list(images.shape)} in [0, 1],"
    key = noise_key(images.device, generator=torch.Generator(images.device).manual_seed(0))
    try:
        with leave_no_trace(model, "eval", key), torch.no_grad():
            logits = logits_of(model(images))
    except Exception as error:
        told = is_import_path(name) and "channels" in str(error)
        remedy = "; a factory that takes in_channels is told how many the images have" if told else ""
        raise ValueError(f"{given} fails: {one_line(error)}{remedy}") from error
    if logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(f"{given} must give logits [{len(images)}, {num_classes}], got {list(logits.shape)}")
    if logits.shape[1] < num_classes:
        raise ValueError(f"{given} gives {logits.shape[1]} logits, fewer than the data set's {num_classes} classes")


def _factory(path: str) -> Any:
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(f"model {path!r} must be package.module:factory or path/to/file.py:factory")
    module = _from_file(path, Path(where)) if where.endswith(".py") else _from_name(path, where)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise ValueError(f"model {path!r}: {where} has no {name!r}{suggestion(name, public)}")
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
