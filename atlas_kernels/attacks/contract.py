"""An attack leaves no trace.

Everything that an attack must touch in order to differentiate a network with respect to its input is put back when it
ends, also when the network raises: each module's own train/eval flag, each parameter's requires_grad, the buffers
(BatchNorm statistics, counters, scales of quantisation), the random state, the gradient and inference modes and the
autocast weight cache. Parameter gradients are never written. Hooks stay as they are and fire. ``held.py`` is how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import capturing
from .held import generators, modes_of, modules_of, put_back

ATTACK_MODES = ("eval", "train", "keep")


@contextmanager
def leave_no_trace(
    model: Callable[[Tensor], Any], attack_mode: str, key: Tensor | None, *, update_buffers: bool = False
) -> Iterator[None]:
    """Run an attack on ``model`` inside this context; inside ``attacking`` as the ``Execution`` around says, too.

    attack_mode: "eval" puts every module in eval mode, "train" puts every module in train mode (a frozen BatchNorm
    too), "keep" leaves each as it is. Only the flags change: ``train()`` and ``eval()`` are not called, so an
    override of theirs has no side effect. The network works on copies of its buffers and the originals are not even
    written to, so that a graph recorded before the attack stays valid.

    key: the attack's noise key. Random layers draw from a fork of the global state that is seeded by the key, so a
    replay repeats dropout too. (On a GPU reading the seed is a synchronisation, paid only where a module is in train
    mode. A graph capture keeps its own random state and is left alone.) None: they draw from the global state itself,
    as in published code.

    update_buffers: let modules in train mode write their own buffers, so that BatchNorm's running statistics see every
    forward of the attack, as in some published code: the one trace that can be asked for.

    A bare function can be attacked with attack_mode "keep" alone; its modules' buffers are kept as far as they can be
    found (see ``modules_of``), its weights are not frozen. Raises TypeError for it with another mode, ValueError for a
    network that is not initialised yet, and RuntimeError where another thread attacks the same modules in another mode.
    """
    if not isinstance(model, nn.Module) and attack_mode != "keep":
        raise TypeError(
            f"model is a {type(model).__name__}, not a torch.nn.Module, so attack_mode={attack_mode!r} cannot be "
            "applied to it; pass the module itself (outputs with .logits, tuples and dicts are taken as they are), or "
            "put what the function does into the forward of a torch.nn.Module that holds the network"
        )
    training = attack_mode == "train" or (attack_mode == "keep" and any(modes_of(modules_of(model)).values()))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        put_back(
            model,
            None if attack_mode == "keep" else training,
            freeze=True,
            copy_buffers=True,
            update_buffers=update_buffers,
            seeds={} if key is None else _seeds(model, key, training),
            alone=update_buffers and training,
        ),
    ):
        yield


def _seeds(model: Callable[[Tensor], Any], key: Tensor, training: bool) -> dict[torch.Generator, int | None]:
    """The global generators that the network may draw from, and what to seed them with: the key, or nothing."""
    tensors = (key, *(model.parameters() if isinstance(model, nn.Module) else ()))
    indices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    if capturing(bool(indices)):
        return {}
    seed = int(key[0]) if training or key.device.type == "cpu" else None
    return dict.fromkeys(generators(indices), seed)
