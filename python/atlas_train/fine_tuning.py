"""Training that begins with given weights: of a run of ours, or a file with weights by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .options import one_line, plain

#: What wrappers put before every name, in any order.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 6  # names of each kind in an error


def begin_with(model: nn.Module, path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None) -> None:
    """Gives the network the weights at ``path``, as ``read`` finds them, or as ``weights`` has them already.

    Raises ValueError for those of another network, with all differences: what it lacks, what it has besides, shapes,
    another mean or std. The network is then as it was.
    """
    what, weights = ("init", read(path)) if weights is None else ("state dict", weights)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    unused = tuple(getattr(model, "unused", ()))
    lacking = [name for name in own if name not in weights and not _is_identity(name, own[name])]
    besides = [name for name in weights if name not in own and not name.startswith(unused)]
    both = [name for name in own if name in weights]
    shapes = [
        f"{plain(name)} is {list(weights[name].shape)} there and {list(own[name].shape)} here"
        for name in both
        if weights[name].shape != own[name].shape
    ]
    scales = [
        f"{name} is {_numbers(weights[name])} there and {_numbers(own[name])} here: set --mean and --std as they were"
        for name in both
        if name.startswith("normalize.") and not shapes and not torch.equal(weights[name].float(), own[name].cpu())
    ]
    found = [
        *([f"it lacks {_few(lacking)}{_NOT_NORMALISED if 'normalize.mean' in lacking else ''}"] if lacking else []),
        *([f"it has {_few(besides)}, which the network does not have"] if besides else []),
        *shapes[:_SHOWN],
        *([f"{len(shapes) - _SHOWN} more shapes differ"] if len(shapes) > _SHOWN else []),
        *scales,
    ]
    if found:
        raise ValueError(
            f"{what} {plain(path)} holds the weights of another network than {type(model).__name__}: {'; '.join(found)}"
        )
    checkpoint.load_weights(model, {**own, **{name: weights[name] for name in both}, **_extra_state(model)}, path)


def read(path: str | os.PathLike[str], what: str = "init") -> dict[str, Tensor]:
    """Weights by name: of a run's folder, a checkpoint (the average, if it has one), a .safetensors file, or a
    state_dict that torch.save wrote, bare or as "state_dict" or "model" of a dict. Prefixes of wrappers are taken off.

    Raises FileNotFoundError, or ValueError for a file that is none of these. what: it is called in errors.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"{what}: there is no file or folder {plain(path)}; name a run's folder, a checkpoint or a file of weights"
        )
    file = checkpoint.locate(file)
    weights = _safetensors(file, what) if file.suffix == ".safetensors" else _torch(file, what)
    while prefix := next((p for p in _PREFIXES if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _safetensors(file: Path, what: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # type: ignore[import-not-found,unused-ignore]

    try:
        return dict(load_file(str(file)))
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{what} {plain(file)} cannot be read as safetensors: {one_line(error)}") from error


def _torch(file: Path, what: str) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{what} {plain(file)} cannot be read as weights: {one_line(error)}; tensors by name are needed, as "
            "torch.save(model.state_dict(), ...) writes them"
        ) from error
    if isinstance(state, dict) and "format" in state and "model" in state:
        return checkpoint.final_weights(checkpoint.load(file))
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{what} {plain(file)} holds no tensors by name, but {type(state).__name__}")
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{what} {plain(file)} holds what are no tensors: {_few(others)}")
    return dict(state)


_NOT_NORMALISED = " (for weights of images that are not normalised set --mean to zeros and --std to ones)"


def _is_identity(name: str, value: Tensor) -> bool:
    """Whether an entry is a normalisation that does nothing, which the other network may do without."""
    return name in ("normalize.mean", "normalize.std") and bool((value == (name == "normalize.std")).all())


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules keep of their own, which stays as it is."""
    return {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.4g}" for value in values.flatten().tolist())


def _few(names: Collection[str]) -> str:
    shown = ", ".join(plain(name) for name in list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
