"""Networks, by name. They take images in [0, 1], NCHW, normalise them inside, and give logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..imported import is_import_path
from ..options import canonical, plain, shown, suggestion
from .activations import ACTIVATIONS
from .classifier import Classifier, Normalize
from .digits_net import DigitsNet
from .imported import build_imported, require_usable
from .preact_resnet import PreActResNet18
from .resnet import ResNet18
from .small_cnn import SmallCNN
from .wide_resnet import WideResNet28, WideResNet34

__all__ = ["ACTIVATIONS", "Classifier", "Normalize", "build", "is_import_path", "names", "network", "require_usable"]

#: (mean, std) of the training images, per channel, in [0, 1]; False: images go in as they are; None: not said.
Normalization = tuple[Sequence[float], Sequence[float]] | Literal[False] | None
#: Channels of images whose mean and std have to be said.
COLOUR = 3

_MODELS: dict[str, type[Classifier]] = {
    "digits_net": DigitsNet,
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet18,
    "resnet18": ResNet18,
    "wide_resnet28_10": WideResNet28,
    "wide_resnet34_10": WideResNet34,
}


def names() -> tuple[str, ...]:
    """The models that `build` knows."""
    return tuple(_MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    width: int | None = None,
    normalize: Normalization = None,
    activation: str = "relu",
) -> Classifier:
    """A freshly initialised model; `torch.manual_seed` rules the initialisation.

    "digits_net": a small network with BatchNorm for 8x8 images. "small_cnn": the MNIST network of TRADES, 28x28.
    "preact_resnet18", "resnet18": for 32x32 images. "wide_resnet28_10", "wide_resnet34_10": wide residual networks.
    width: channels of the first stage; later stages scale with it. None: the published width (32, 32, 64, 64, 160 and
    160). activation: "relu", as published, "silu" or "gelu".
    normalize: (mean, std) per channel, for images in [0, 1]; False: images go in as they are. Colour images, of 3
    channels, need one of the two; with any other number of channels the default is False.

    `model.features(x)` gives the penultimate vectors [B, model.num_features], `model.head(features)` the logits.
    Raises ValueError for an unknown name, for sizes that are no positive integers, and for 3 channels without
    ``normalize``.
    """
    name = canonical(name, _MODELS)
    _check_name(name)
    mean_std = normalize if isinstance(normalize, Sequence) else None
    if isinstance(mean_std, str) or (mean_std is not None and len(mean_std) != 2):
        raise ValueError(f"normalize must be (mean, std), a list of numbers each, or False, got {shown(normalize)}")
    if in_channels == COLOUR and mean_std is None and normalize is not False:
        raise ValueError(
            "normalize: mean and std of colour images differ from data set to data set: give (mean, std), of three "
            "numbers each, or False for images as they are"
        )
    norm = Normalize(*mean_std) if mean_std else None
    if norm is not None and norm.mean.numel() != in_channels:
        raise ValueError(f"normalize: got {norm.mean.numel()} means, expected one for each of {in_channels} channels")
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    if width is not None:
        sizes["width"] = width
    for size, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            default = "; None takes the published width" if size == "width" else ""
            raise ValueError(f"{size} must be a positive integer, got {value!r}{default}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
    settings: dict[str, Any] = {"normalize": norm, "activation": activation, **sizes}
    if width is not None:
        _require_memory(name, width, lambda: _MODELS[name](**settings))
    return _MODELS[name](**settings)


def _require_memory(name: str, width: int, make: Callable[[], nn.Module]) -> None:
    """Raises ValueError for a width whose weights are more than this machine's memory; allocates nothing."""
    try:
        with torch.device("meta"):
            needed = sum(p.nbytes for p in make().parameters())
    except RuntimeError:  # more than 64 bits count
        needed = 2**63
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    if needed >= memory:
        raise ValueError(
            f"width: the weights of {name} of width {width} take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f}: choose a smaller width"
        )


def network(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    width: int | None = None,
    normalize: Normalization = None,
    activation: str = "relu",
) -> nn.Module:
    """`build`, or what the factory at an import path ("package.module:factory", "path/to/file.py:factory") gives.

    The factory, a class or a function, is called with num_classes, in_channels and, if it is given, width; the network
    takes images in [0, 1] and normalises them itself: ``normalize`` and ``activation`` are for networks of ours. Raises
    ValueError for a path that leads nowhere or a factory that gives no torch.nn.Module.
    """
    if not is_import_path(name):
        own: dict[str, Any] = {"normalize": normalize, "activation": activation}
        return build(name, num_classes=num_classes, in_channels=in_channels, width=width, **own)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    return build_imported(name, **sizes, **({} if width is None else {"width": width}))


def _check_name(name: str) -> None:
    if str(name).endswith(".py"):
        raise ValueError(f"model: {shown(name)} is no network; for code of your own write {plain(name)}:factory")
    if name not in _MODELS:
        raise ValueError(
            f"name: nothing known as {shown(name)}{suggestion(name, _MODELS)} (known: {', '.join(_MODELS)})"
        )
