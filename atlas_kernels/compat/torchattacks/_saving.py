"""Adversaries of a whole loader in a file of torchattacks' format, and back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...checks import require_choice
from ...environment import is_stream
from ...outputs import predicted

File: TypeAlias = "str | os.PathLike[str] | IO[bytes]"
Loader: TypeAlias = Iterable[tuple[Tensor, Tensor]]
Normalization: TypeAlias = dict[str, Sequence[float] | Tensor]


class Saved(Protocol):
    """What is asked here of the attack whose adversaries are saved."""

    @property
    def normalization_used(self) -> object | None: ...

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor: ...

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor: ...

    def inverse_normalize(self, inputs: Tensor) -> Tensor: ...

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None: ...


def save(
    attack: Saved, data_loader: Loader, path: File | None, verbose: bool, return_verbose: bool,
    save_predictions: bool, save_clean_inputs: bool, save_type: str,
) -> tuple[Any, ...] | None:  # fmt: skip
    require_choice("save_type", save_type, ("float", "int"))
    kept: dict[str, list[Tensor]] = {}
    tally, batches = _Tally(), 0
    for batches, (inputs, labels) in enumerate(data_loader, 1):
        began = time.time()
        adv = attack(inputs, labels)
        batch = {"adv_inputs": adv, "labels": labels}
        if verbose or return_verbose or save_predictions:
            batch["preds"] = predicted(attack.get_output_with_eval_nograd(adv))
            tally.add(adv, inputs, labels, batch["preds"], time.time() - began)
        if verbose:
            attack._save_print(100 * batches / len(data_loader), *tally.figures(), end="\r")  # type: ignore[arg-type]
        if save_clean_inputs:
            batch["clean_inputs"] = inputs
        if not save_predictions:
            batch.pop("preds", None)
        for name, value in batch.items() if path is not None else ():
            kept.setdefault(name, []).append(value.detach().cpu())
    if not batches:
        raise ValueError("data_loader gives no images: there is nothing to attack")
    if path is not None:
        _write(path, attack, {name: torch.cat(values) for name, values in kept.items()}, save_type)
    if verbose:
        attack._save_print(100.0, *tally.figures(), end="\n")
    return tally.figures() if return_verbose else None


class _Tally:
    """What is told of the batches so far."""

    def __init__(self) -> None:
        self.right = self.total = 0
        self.distances: list[Tensor] = []
        self.seconds = 0.0

    def add(self, adv: Tensor, inputs: Tensor, labels: Tensor, predicted: Tensor, seconds: float) -> None:
        right = predicted == labels.to(predicted.device)
        self.right, self.total = self.right + int(right.sum()), self.total + len(labels)
        self.distances.append((adv - inputs.to(adv.device)).flatten(1)[~right].norm(dim=1))
        self.seconds = seconds

    def figures(self) -> tuple[float, float, float]:
        """Robust accuracy in percent, mean l2 distance of the adversaries that fool, seconds of the last batch."""
        return 100 * self.right / self.total, float(torch.cat(self.distances).mean()), self.seconds


def _write(path: File, attack: Saved, found: dict[str, Tensor], save_type: str) -> None:
    """``found``, its images in [0, 1] or in 0..255; to a path whole or not at all."""
    for name in {"adv_inputs", "clean_inputs"} & found.keys():
        images = found[name] if attack.normalization_used is None else attack.inverse_normalize(found[name])
        found[name] = to_type(images, "int") if save_type == "int" else images
    content = {**found, "save_type": save_type}
    if not isinstance(path, (str, os.PathLike)) or is_stream(path):
        torch.save(content, path)
        return
    partial = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(path: File, batch_size: int, shuffle: bool, normalize: Normalization | None, keys: list[str]) -> Any:
    found = torch.load(path, map_location="cpu", weights_only=True)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}, only {', '.join(found)}: save it with save_predictions=True, "
            "save_clean_inputs=True"
        )
    for key in {"adv_inputs", "clean_inputs"} & set(keys):
        found[key] = to_type(found[key], "float")
        if normalize is not None:
            mean, std = (torch.as_tensor(normalize[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
            found[key] = (found[key] - mean.to(found[key])) / std.to(found[key])
    print(f"Data is loaded in the following order: [{', '.join(keys)}]")
    return DataLoader(TensorDataset(*(found[key] for key in keys)), batch_size=batch_size, shuffle=shuffle)


def to_type(inputs: Tensor, type: str) -> Tensor:
    require_choice("type", type, ("float", "int"))
    if type == "int" and inputs.is_floating_point():
        return (inputs * 255).to(torch.uint8)
    return inputs.float() / 255 if type == "float" and inputs.dtype == torch.uint8 else inputs
