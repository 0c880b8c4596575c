"""Checkpoints: tensors and plain types only, written whole or not at all, loaded without running code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import atlas_kernels

from . import answers, models

FORMAT = 1
LAST = "last.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a temporary file beside ``path``, then rename it: the file is the old or the new one, whole.

    Its mode is the usual one, whatever ``write`` gives it. Raises OSError that names the file where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(path.parent).free + 512 * temporary.stat().st_blocks  # the half of it will go
        raise OSError(
            f"{path} could not be written: its disk takes no more ({free / 1e6:,.1f} MB free). What lay there before "
            "is as it was. Make room and try again; a run goes on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    """Whether a file could not grow. torch and safetensors say so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    codes = [f"os error {code}" for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(words in str(error) for words in ("inline_container", "iostream error", *codes))


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(builtin(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8, with the line ends of ``text``, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint. ``state``: tensors, numbers, strings, lists and dicts."""
    content = {"format": FORMAT, **builtin(state)}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def builtin(value: Any) -> Any:
    """``value`` in plain types, which are read without running code: NumPy's numbers and kinds of str become such."""
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(builtin, value))
    if isinstance(value, Mapping) and not isinstance(value, OrderedDict):  # that one is a module's state_dict
        return {builtin(key): builtin(item) for key, item in value.items()}
    return value


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a run folder, a folder of one run, or a file means.

    Raises FileNotFoundError with what was looked for.
    """
    given = Path(path)
    found = given / LAST if given.is_dir() else given
    if not found.is_file():
        runs = sorted(str(p.parent) for p in given.glob(f"*/{LAST}")) if given.is_dir() else []
        if len(runs) == 1:
            return Path(runs[0], LAST)
        hint = f"; it holds the runs {', '.join(runs)}: name one of them" if runs else ""
        raise FileNotFoundError(f"no checkpoint {found}{hint}")
    return found


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's state, on the CPU. Raises FileNotFoundError, or ValueError for a damaged or foreign file."""
    found = locate(path)
    try:
        state = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{found} cannot be read as a checkpoint ({type(error).__name__}): damaged, or not written by atlas"
        ) from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(f"{found} is no checkpoint of atlas: a bare state_dict is loaded with model.load_state_dict")
    if state["format"] != FORMAT:
        raise ValueError(f"{found} has checkpoint format {state['format']}, this version reads {FORMAT}")
    return state


def rng_state() -> dict[str, Any]:
    """The states of torch's generators (dropout draws from them), as tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: Mapping[str, Any]) -> None:
    """Sets torch's generators; those of CUDA only when the number of devices is the same."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """``model.load_state_dict``, with an error that says which file does not fit which model."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(f"the weights in {source} do not fit a {type(model).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Of what a run's numbers go by: another one of these may round otherwise, or have other defaults."""
    return {"atlas-kernels": atlas_kernels.__version__, "torch": torch.__version__, "numpy": np.__version__}


def fingerprint(model: nn.Module) -> str:
    """The sha256 of weights and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_state_dict(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """The bare state_dict, for others to load: .safetensors (with ``metadata``), or torch.save for another suffix."""
    path = Path(path)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

        write_atomically(path, lambda temporary: save_file(weights, str(temporary), metadata=dict(metadata or {})))
    else:
        write_atomically(path, lambda temporary: torch.save(weights, temporary))


def export_name() -> str:
    """model.safetensors where safetensors is installed, else model.pt."""
    return "model.safetensors" if find_spec("safetensors") else "model.pt"


def load_model(path: str | os.PathLike[str], model: nn.Module | str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on the CPU, and the checkpoint's configuration.

    path: run folder, last.pt, or an exported model.safetensors. model: a network that takes the weights, or its name or
    import path; default: the checkpoint's own, if that is one of ours. An import path in a checkpoint is not followed,
    for a file must not say what code is run. Raises as ``load`` does, and ValueError when ``model`` is needed or does
    not fit.
    """
    network, description = load_network(path, model)
    return network, description["config"]


def load_network(
    path: str | os.PathLike[str], model: nn.Module | str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """``load_model``, with all that says what the network is: arch, config and, of newer versions, data."""
    found = locate(path)
    if found.suffix == ".safetensors":
        weights, description = _read_safetensors(found)
    else:
        state = load(found)
        kept = ("arch", "config", "data", "answers")
        weights, description = final_weights(state), {key: state[key] for key in kept if key in state}
    arch = description["arch"]
    if model is None:
        require_trusted(arch["name"], found)
        if not arch["by_name"]:
            raise ValueError(
                f"{found} holds a {arch['name']} of your own: build it yourself and load its weights into it, or say "
                "how it is built, --model package.module:factory"
            )
    if isinstance(model, nn.Module):
        built = model
    else:
        sizes = {name: arch[name] for name in ("num_classes", "in_channels", "width")}
        built = models.network(model or arch["name"], **sizes)
    load_weights(built, weights, found)
    if description.get("answers"):
        answers.require_same(built, description["answers"], description["data"]["test"]["shape"], found)
    return built.eval(), description


def final_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint evaluates to: the average of the weights if it holds one, else the weights in training."""
    average = state.get("average")
    weights: dict[str, Tensor] = average["model"] if average and average["count"] else state["model"]
    return weights


def require_trusted(name: str, source: object) -> None:
    """Raises ValueError if a checkpoint's network is an import path."""
    if models.is_import_path(name):
        raise ValueError(
            f"{source} names code of your own, {name}, and code that a file names is not run unasked: if you trust it, "
            f"say so with --model {name}"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open  # type: ignore[import-not-found,unused-ignore]

    try:
        with safe_open(str(path), framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("atlas", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if description is None:
        raise ValueError(f"{path} does not say which network it holds; it was not written by atlas")
    return weights, description
