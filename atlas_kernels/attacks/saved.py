"""The file that an evaluation goes on from, and whose it is."""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..environment import is_stream
from .progress import counted

FORMAT = 2
OF_IMAGES = ("images", "labels", "ids")  # which differ where there are more or fewer

#: What an evaluation is of: settings by name, digests of tensors.
Whose = Mapping[str, Any]


def digest(tensors: Iterable[Tensor]) -> str:
    """Of values, dtypes and shapes, whatever they are called, so that ``torch.compile`` and wrappers change nothing."""
    made = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        made.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        made.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return made.hexdigest()[:16]


def weights_of(model: nn.Module) -> str:
    return digest(chain(model.parameters(), model.buffers()))


def save(path: Path, whose: Whose, state: Mapping[str, Any]) -> None:
    """The file is the old or the new one, whole, whenever the process or the machine stops."""
    held = {"format": FORMAT, "whose": dict(whose), "state": dict(state), "digest": _digest_of(state)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, whose: Whose, samples: int) -> dict[str, Any] | None:
    """The state in the file; None if there is no file. Raises ValueError where it is of another evaluation.

    samples: of how many images it must be.
    """
    if not path.exists():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True)
        form, theirs, state, known = held["format"], held["whose"], held["state"], held.get("digest")
        count = len(state["fooled_by"])
    except Exception as error:
        raise ValueError(
            f"state_path {path} holds no state of an evaluation ({type(error).__name__}): name another file, or remove "
            "it to begin anew"
        ) from error
    if form != FORMAT:
        raise ValueError(f"state_path {path} has format {form}, this version writes {FORMAT}: remove it to begin anew")
    if known != _digest_of(state):
        raise ValueError(
            f"state_path {path} is damaged, its contents are not those that were written: remove it to begin anew"
        )
    differing = [name for name in {**theirs, **whose} if theirs.get(name) != whose.get(name)]
    if count != samples:
        differing = [name for name in differing if name not in OF_IMAGES]
    differences = [_difference(name, theirs.get(name), whose.get(name)) for name in differing]
    if count != samples:
        differences.append(f"it is of {counted(count, 'image')}, here {'is' if samples == 1 else 'are'} {samples:,}")
    if differences:
        raise ValueError(
            f"state_path {path} is of another evaluation: {'; '.join(differences)}. Name another file, or remove it to "
            "begin anew"
        )
    return dict(state)


def _digest_of(state: Mapping[str, Any]) -> str:
    """Of all that it holds: a bit that a disk has lost could make an image robust."""
    leaves = tree_leaves(dict(state))
    told = str([leaf for leaf in leaves if not isinstance(leaf, Tensor)])
    return f"{digest(leaf for leaf in leaves if isinstance(leaf, Tensor))} {zlib.crc32(told.encode()):08x}"


def size_of(path: Path) -> int | None:
    """Of how many images the state in the file is; None where it holds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # nothing else of it is read
        return len(held["state"]["fooled_by"])
    except Exception:  # whose ``load`` says what is wrong
        return None


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if name in ("weights", *OF_IMAGES):
        return f"its {name} are not the ones given"
    if name == "attacks" and theirs and theirs.keys() == ours.keys():
        return f"its {', '.join(part for part in ours if theirs[part] != ours[part])} has other settings"
    return f"its {name} is {theirs!r}, here {ours!r}"


def require_writable(path: Path) -> None:
    """Raises before any work is done."""
    if path.is_dir():
        raise IsADirectoryError(f"state_path {path} is a folder, where a file is to be written: name a file")
    if is_stream(path):
        raise ValueError(f"state_path {path} is a device or a pipe, which nothing can be resumed from: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"state_path {path}: there is no folder {path.parent}: make it first")
