"""Networks of your own: built by the factory at an import path, and looked at before they are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from atlas_kernels import noise_key
from atlas_kernels.attacks.contract import leave_no_trace
from atlas_kernels.outputs import logits_of

from ..imported import called, find, is_import_path, mismatch, refused
from ..options import one_line, plain


def build_imported(path: str, **sizes: int) -> nn.Module:
    """``factory(**sizes)``: the code at ``path`` is run. Raises ValueError that says what is wrong with it.

    A factory that does not take ``in_channels``, as those of torchvision, is called without.
    """
    factory = find("model", path)
    call = called("model", path, sizes)
    fewer = {name: size for name, size in sizes.items() if name != "in_channels"}
    try:
        model = factory(**(fewer if _takes(factory, fewer) and not _takes(factory, sizes) else sizes))
    except TypeError as error:
        if "in_channels" not in str(error) or not _takes(factory, fewer):
            raise refused(call, factory, sizes, error) from error
        try:  # it took **kwargs, and handed them on to what does not know the word
            model = factory(**fewer)
        except Exception as other:
            raise refused(call, factory, fewer, other) from other
    except Exception as error:
        raise refused(call, factory, sizes, error) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{call}, and must give a torch.nn.Module, got {type(model).__name__}")
    return model


def _takes(factory: Any, sizes: dict[str, int]) -> bool:
    return mismatch(factory, sizes) is None


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
    if logits.shape[1] < 2:
        raise ValueError(
            f"{given} gives logits [{len(images)}, 1], and a label needs two classes or more: stack a single logit z "
            "of two classes as [-z/2, z/2]"
        )
    if logits.shape[1] < num_classes:
        raise ValueError(f"{given} gives {logits.shape[1]} logits, fewer than the data set's {num_classes} classes")
