"""Networks, by name. They take images in [0, 1], NCHW, normalise them inside, and give logits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from .classifier import Classifier, Normalize
from .digits_net import DigitsNet
from .imported import build_imported, is_import_path
from .preact_resnet import PreActResNet18
from .small_cnn import SmallCNN
from .wide_resnet import WideResNet28, WideResNet34

__all__ = ["Classifier", "Normalize", "build", "default_for", "is_import_path", "names", "network"]

# Over the training images, in [0, 1], per channel.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

_MODELS: dict[str, type[Classifier]] = {
    "digits_net": DigitsNet,
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet18,
    "wide_resnet28_10": WideResNet28,
    "wide_resnet34_10": WideResNet34,
}
_DEFAULTS = {"digits": "digits_net", "mnist": "small_cnn", "cifar10": "preact_resnet18"}


def names() -> tuple[str, ...]:
    """The models that `build` knows."""
    return tuple(_MODELS)


def default_for(dataset: str) -> str:
    """The name of the model that a data set is trained with by default. Raises ValueError for an unknown data set."""
    _check_name("dataset", dataset, _DEFAULTS)
    return _DEFAULTS[dataset]


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    width: int | None = None,
    normalize: bool | tuple[Sequence[float], Sequence[float]] = True,
) -> Classifier:
    """A freshly initialised model; `torch.manual_seed` rules the initialisation.

    "digits_net": a small network with BatchNorm for 8x8 images. "small_cnn": the MNIST network of TRADES, 28x28.
    "preact_resnet18": PreActResNet-18 for 32x32 images. "wide_resnet28_10", "wide_resnet34_10": wide residual networks.
    width: channels of the first stage; later stages scale with it. None: the published width (32, 32, 64, 160 and 160).
    normalize: (mean, std) per channel, for images in [0, 1]; True: those of CIFAR-10 for 3 channels and none for any
    other number (grey digits are used as they are); False: none.

    `model.features(x)` gives the penultimate vectors [B, model.num_features], `model.head(features)` the logits.
    Raises ValueError for an unknown name and for sizes that are no positive integers.
    """
    _check_name("name", name, _MODELS)
    mean_std = (CIFAR10_MEAN, CIFAR10_STD) if normalize is True and in_channels == 3 else normalize
    norm = None if isinstance(mean_std, bool) else Normalize(*mean_std)
    if norm is not None and norm.mean.numel() != in_channels:
        raise ValueError(f"normalize: got {norm.mean.numel()} means, expected one for each of {in_channels} channels")
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    if width is not None:
        sizes["width"] = width
    for size, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            default = "; None takes the published width" if size == "width" else ""
            raise ValueError(f"{size} must be a positive integer, got {value!r}{default}")
    return _MODELS[name](normalize=norm, **sizes)


def network(name: str, *, num_classes: int, in_channels: int, width: int | None = None) -> nn.Module:
    """`build`, or what the factory at an import path ("package.module:factory", "path/to/file.py:factory") gives.

    The factory, a class or a function, is called with num_classes, in_channels and, if it is given, width; the network
    takes images in [0, 1]. Raises ValueError for a path that leads nowhere or a factory that gives no torch.nn.Module.
    """
    if not is_import_path(name):
        return build(name, num_classes=num_classes, in_channels=in_channels, width=width)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    return build_imported(name, **sizes, **({} if width is None else {"width": width}))


def _check_name(argument: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0)[0]
        raise ValueError(f"{argument}: nothing known as {name!r}; the nearest is {near!r} (known: {', '.join(known)})")
