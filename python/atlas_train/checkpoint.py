"""Checkpoints: tensors and plain types only, written whole or not at all, loaded without running code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import atlas_kernels

from . import answers, hub, models, schema
from .config import from_record, to_dict
from .imported import is_import_path, require_trusted
from .options import one_line, plain, shown
from .writing import builtin, write_atomically

FORMAT = 1
LAST, BEST, WEIGHTS = "last.pt", "best.pt", "model.safetensors"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint, with checksums. ``state``: tensors, numbers, strings, lists and dicts."""
    content = {"format": FORMAT, **builtin(state)}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # ``load`` looks at them
    try:
        write_atomically(path, lambda temporary: torch.save(content, temporary))
    finally:
        torch.serialization.set_crc32_options(before)


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a run folder, a folder of one run, or a file means; of an exported network, its weights.

    "hf:org/name" is downloaded (``hub``), its weights and what describes them alone.

    Raises FileNotFoundError with what was looked for.
    """
    given = hub.downloaded(path) / WEIGHTS if hub.is_on_hub(path) else Path(path)
    file = given / LAST if given.is_dir() else given
    if not file.is_file() and (given / WEIGHTS).is_file():
        return given / WEIGHTS
    if not file.is_file():
        runs = sorted(str(p.parent) for p in given.glob(f"*/{LAST}")) if given.is_dir() else []
        if len(runs) == 1:
            return Path(runs[0], LAST)
        many = f"it holds the runs {', '.join(map(plain, runs))}: name one of them"
        hint = f"; {many}" if runs else ": name the folder of a run, or one of its files"
        raise FileNotFoundError(f"no checkpoint {plain(file)}{hint}")
    return file


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether a file was written by a run, and says which network it holds; a bare state dict does not."""
    file = Path(path)
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

            with safe_open(str(file), framework="pt") as opened:
                return "atlas" in (opened.metadata() or {})
        state = torch.load(file, map_location="meta", weights_only=True)
        return isinstance(state, dict) and {"format", "model", "arch"} <= state.keys()
    except Exception:  # a damaged file raises nearly anything, and whoever reads it says so
        return False


def load(path: str | os.PathLike[str], needed: Iterable[str] = ()) -> dict[str, Any]:
    """A checkpoint's state, on the CPU: what it holds is of the kind that a run writes, and ``needed`` is there.

    Raises FileNotFoundError, or ValueError for a damaged or foreign file.
    """
    file = locate(path)
    if file.suffix == ".safetensors":
        raise ValueError(f"{plain(file)} holds weights alone, and no run goes on from them: begin one with --init")
    try:
        _require_stored(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except _Damaged as error:
        raise ValueError(f"{plain(file)} is damaged: {error}") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{plain(file)} cannot be read as a checkpoint ({type(error).__name__}): damaged, or not written by atlas"
        ) from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(
            f"{plain(file)} is no checkpoint of atlas: a bare state_dict is loaded with model.load_state_dict"
        )
    if type(state["format"]) is not int or state["format"] != FORMAT:
        written = schema.described(state["format"])
        raise ValueError(f"{plain(file)} has checkpoint format {written}, this version reads {FORMAT}")
    schema.require_checkpoint(state, plain(file), needed)
    return state


def facts(folder: Path) -> dict[str, Any]:
    """What the checkpoint in a run's folder says, without its tensors; of a folder with bare weights, what these say.

    Raises ValueError for a damaged or foreign file.
    """
    path = folder / LAST
    if not path.is_file():
        path = folder / WEIGHTS
        state = _described(path)[0]
    else:
        try:
            state = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            raise ValueError(
                f"{plain(path)} cannot be read as a checkpoint ({type(error).__name__}): damaged, or not written by "
                "atlas"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"{plain(path)} is no checkpoint of atlas")
    kept = {name: value for name, value in state.items() if name in schema.FACTS}
    schema.require_facts(kept, plain(path))
    return kept


class _Damaged(ValueError):
    """A part of a checkpoint is not what was written."""


def _require_stored(path: Path) -> None:
    """Raises ValueError for a file that would take more memory than it has bytes (torch.save compresses nothing), or
    of which a part does not have its checksum, which torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        if (part := archive.testzip()) is not None:
            raise _Damaged(f"the checksum of its part {shown(part)} is wrong")


def rng_state() -> dict[str, Any]:
    """The states of torch's generators (dropout draws from them), as tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: Mapping[str, Any], source: object = "the checkpoint") -> None:
    """Sets torch's generators; those of CUDA only when the number of devices is the same."""
    try:
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{plain(source)}: rng is no state of torch's generators ({error})") from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """``model.load_state_dict``, with an error that says which file does not fit which model."""
    own = model.state_dict()
    try:
        for name in own.keys() & weights.keys():
            if isinstance(own[name], Tensor) and not torch.can_cast(weights[name].dtype, own[name].dtype):
                raise TypeError(f"{name} is of {weights[name].dtype} there, {own[name].dtype} here")
        require_finite(own, weights, source)
        model.load_state_dict(dict(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        name = type(model).__name__
        raise ValueError(f"the weights in {plain(source)} do not fit a {name}: {one_line(error)}") from error


@contextmanager
def weights_of(path: Path, model: nn.Module) -> Iterator[None]:
    """``model`` has the weights that a checkpoint evaluates to, for as long as the context lasts."""
    weights = final_weights(load(path))
    now = {name: value.clone() if isinstance(value, Tensor) else value for name, value in model.state_dict().items()}
    try:
        load_weights(model, weights, path)
        yield
    finally:
        model.load_state_dict(now)


def require_finite(own: Mapping[str, Any], weights: Mapping[str, Any], source: object) -> None:
    """Raises ValueError for weights or buffers with NaN or infinity, unless the network was made with such (a mask)."""
    for name, value in weights.items():
        fresh = own.get(name)
        if not isinstance(value, Tensor) or not isinstance(fresh, Tensor) or fresh.is_meta or _finite(value):
            continue
        if _finite(fresh):
            raise ValueError(f"{plain(source)}: {plain(name)} holds NaN or infinity, so the network is of no use")


def not_finite(model: nn.Module) -> set[str]:
    """The names of the weights and buffers that hold NaN or infinity."""
    entries = model.state_dict().items()
    return {name for name, value in entries if isinstance(value, Tensor) and not value.is_meta and not _finite(value)}


def _finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())


def versions() -> dict[str, str]:
    """Of what a run's numbers go by: another one of these may round otherwise, or have other defaults."""
    return {"atlas-kernels": atlas_kernels.__version__, "torch": torch.__version__, "numpy": np.__version__}


def fingerprint(model: nn.Module) -> str:
    """The sha256 of weights and buffers, in hexadecimal."""
    return fingerprint_of({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """``fingerprint`` of a network with this state."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_state_dict(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """The bare state_dict, for others to load: .safetensors (with ``metadata``), or torch.save for another suffix.

    Each entry is a copy of its own, also of weights that are tied. What is no tensor is left out.
    """
    export_weights(model.state_dict(), Path(path), metadata)


def export_weights(state: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """``export_state_dict`` of a network with this state."""
    entries = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in entries.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

        write_atomically(path, lambda temporary: save_file(weights, str(temporary), metadata=dict(metadata or {})))
    else:
        write_atomically(path, lambda temporary: torch.save(weights, temporary))


def require_exportable(model: nn.Module) -> str | None:
    """What an export of the network leaves out, in words, or None.

    Raises ValueError, naming the entry of its state_dict, for what a checkpoint or an export cannot hold.
    """
    left_out = []
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            left_out.append(name)
        try:
            _require_storable(value)
        except Exception as error:  # what a module gives as its own state may raise anything
            raise ValueError(
                f"{plain(name)} of the network cannot be kept in a checkpoint ({one_line(error)}): change it, or give "
                "a buffer persistent=False, which is not kept"
            ) from error
    return f"{export_name()} will hold tensors alone, without {', '.join(map(plain, left_out))}" if left_out else None


def _require_storable(value: Any) -> None:
    """Raises an error unless ``value`` can be read again from a checkpoint and, if it is a tensor, be exported."""
    file = io.BytesIO()
    if not isinstance(value, Tensor):
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
        return
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError("it is not a dense tensor, take .to_dense() or .dequantize() of it")
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise TypeError("several of its elements share memory, take .clone() of it")
    if value.isnan().any():
        raise ValueError("it holds NaN")
    if export_name().endswith(".safetensors"):
        from safetensors.torch import save as to_bytes  # type: ignore[import-not-found,unused-ignore]

        to_bytes({"value": torch.zeros(1, dtype=value.dtype)})  # some types of numbers are not in that format


def export_name() -> str:
    """model.safetensors where safetensors is installed, else model.pt."""
    return WEIGHTS if find_spec("safetensors") else "model.pt"


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
    """``load_model``, with all that says what the network is: arch, config and, of newer versions, data and epochs."""
    file = locate(path)
    weights, state = bare(file)
    kept = ("arch", "config", "data", "answers", "epoch", "best", "best_raw", "within")
    description: dict[str, Any] = {key: state[key] for key in kept if key in state}
    description["config"] = to_dict(from_record(state["config"], plain(file)))
    arch = state["arch"]
    if (average := state.get("average")) is not None and not average["count"]:
        warnings.warn(
            f"averaging {description['config']['averaging']!r} had not begun when {plain(file)} was written, so these "
            "are the weights in training: train further, or set a smaller swa_start",
            stacklevel=2,
        )
    if model is None:
        require_trusted("model", arch["name"], file)
        if not arch["by_name"]:
            raise ValueError(
                f"{plain(file)} holds a {plain(arch['name'])} of your own: build it yourself and load its weights "
                "into it, or say how it is built, --model package.module:factory"
            )
    activation = description["config"]["activation"]
    built = model if isinstance(model, nn.Module) else _built(model or arch["name"], arch, weights, activation, file)
    if file.suffix == ".safetensors":  # which holds tensors alone
        weights = weights | {name: own for name, own in built.state_dict().items() if not isinstance(own, Tensor)}
    load_weights(built, weights, file)
    if description.get("answers"):
        schema.require_keys(description, ("data",), plain(file))
        answers.require_same(built, description["answers"], description["data"]["test"]["shape"], file)
    return built.eval(), description


def bare(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that a checkpoint, or an exported file, evaluates to, and all that it holds."""
    state = _read_safetensors(file) if file.suffix == ".safetensors" else load(file, ("arch", "config"))
    return final_weights(state), state


def _built(
    name: str, arch: Mapping[str, Any], weights: Mapping[str, Tensor], activation: str, source: Path
) -> nn.Module:
    """The network of that name with those sizes; one of ours only if the weights are known to fit."""
    schema.require_sizes(arch, weights, plain(source))
    if not is_import_path(name):
        require_fitting(name, arch, weights, source)
    return models.network(name, activation=activation, **_sizes(arch, weights))


def _sizes(arch: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``models.network`` takes; where the weights hold mean and std, some that they will replace."""
    channels = arch["in_channels"]
    normalize = ((0.0,) * channels, (1.0,) * channels) if "normalize.mean" in weights else False
    return {"normalize": normalize, **{name: arch[name] for name in ("num_classes", "in_channels", "width")}}


def mean_std(weights: Mapping[str, Any]) -> tuple[tuple[float, ...], ...] | None:
    """Mean and std by which a network of ours normalises, in the fewest digits that mean them; None: it does not."""
    if "normalize.mean" not in weights:
        return None
    values = (weights[f"normalize.{name}"].detach().cpu().float().flatten().numpy() for name in ("mean", "std"))
    return tuple(tuple(float(str(number)) for number in value) for value in values)


def require_fitting(name: str, arch: Mapping[str, Any], weights: Mapping[str, Tensor], source: object) -> None:
    """Raises ValueError unless the weights are those of one of our networks with those sizes; allocates nothing."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that nothing is copied
        load_weights(models.network(name, **_sizes(arch, weights)), weights, source)


def require_resumable(state: Mapping[str, Any], source: object) -> None:
    """Raises ValueError unless all is there that a run needs to go on, and of one network; builds nothing."""
    schema.require_keys(state, schema.NEEDED, plain(source))
    config, arch = from_record(state["config"], plain(source)), state["arch"]
    if arch["by_name"] and (config.model, config.width) != (arch["name"], arch["width"]):
        raise ValueError(
            f"{plain(source)}: config says {shown(config.model)} of width {config.width}, and arch says "
            f"{shown(arch['name'])} of width {arch['width']}: edited or damaged"
        )
    schema.require_sizes(arch, state["model"], plain(source))
    if arch["by_name"] and not is_import_path(arch["name"]):
        require_fitting(arch["name"], arch, state["model"], source)


def final_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint evaluates to: the average of the weights if it holds one, unless it is a best.pt that means the
    weights in training (``raw``)."""
    average = None if state.get("raw") else state.get("average")
    weights: dict[str, Tensor] = average["model"] if average and average["count"] else state["model"]
    return weights


def _read_safetensors(path: Path) -> dict[str, Any]:
    """An exported network as a checkpoint: its weights, and what its metadata say of it."""
    description, weights = _described(path, with_weights=True)
    state = {**description, "model": weights}
    schema.require_checkpoint(state, plain(path), ("arch", "config"))
    return state


def _described(path: Path, with_weights: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the metadata of a .safetensors file say of its network, and its weights if they are asked for."""
    weights: dict[str, Tensor] = {}
    try:
        from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

        with safe_open(str(path), framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("atlas", "null"))
            if with_weights:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{plain(path)} cannot be read as safetensors: {one_line(error)}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{plain(path)} does not say which network it holds; it was not written by atlas")
    return description, weights
