"""An attack leaves no trace.

Everything that an attack must touch in order to differentiate a network with respect to its input is put back when it
ends, also when the network raises: each module's own train/eval flag, each parameter's requires_grad, the buffers
(BatchNorm statistics), the random state, the gradient and inference modes and the autocast weight cache. Parameter
gradients are never written. Hooks stay as they are and fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..capture import capturing
from .buffers import copied_buffers
from .execution import current_execution, device_of

ATTACK_MODES = ("eval", "train", "keep")


@contextmanager
def leave_no_trace(
    model: Callable[[Tensor], Tensor], attack_mode: str, key: Tensor | None, *, update_buffers: bool = False
) -> Iterator[None]:
    """Run an attack on ``model`` inside this context.

    attack_mode: "eval" puts every module in eval mode, "train" puts every module in train mode (a frozen BatchNorm
    too), "keep" leaves each as it is. Only the flags change: ``train()`` and ``eval()`` are not called, so an
    override of theirs has no side effect. Where any module is then in train mode, the network works on copies of its
    buffers and the originals are not even written to, so that a graph recorded before the attack stays valid.

    key: the attack's noise key. Random layers draw from a fork of the global state that is seeded by the key, so a
    replay repeats dropout too. (On a GPU reading the seed is a synchronisation, paid only where a module is in train
    mode. A graph capture keeps its own random state and is left alone.) None: they draw from the global state itself,
    as in published code.

    update_buffers: let modules in train mode write their own buffers, so that BatchNorm's running statistics see every
    forward of the attack, as in some published code: the one trace that can be asked for.

    How the network is run inside, its precision for one, is up to the ``Execution`` around the call.

    Raises TypeError for a bare function with attack_mode "eval" or "train": its modules cannot be found.
    """
    if not isinstance(model, nn.Module) and attack_mode != "keep":
        raise TypeError(
            f"model is a {type(model).__name__}, not a torch.nn.Module, so attack_mode={attack_mode!r} cannot be "
            'applied to it; pass the module itself, or attack_mode="keep"'
        )
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    training = any(flags) if attack_mode == "keep" else attack_mode == "train"
    random_state = nullcontext() if key is None else _forked_random_state(parameters, key, training)

    with torch.inference_mode(False), torch.enable_grad(), random_state:
        copies = copied_buffers(modules) if training and not update_buffers else nullcontext()
        try:
            if attack_mode != "keep":
                for module in modules:
                    module.training = training
            # Frozen weights cost no gradient, and a custom autograd.Function that owns them is not asked for any.
            for parameter in trainable:
                parameter.requires_grad_(False)
            with copies, current_execution().around(model, device_of(model, key)):
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            # A 16-bit weight that was cast without a graph must not be served to the training forward that follows.
            torch.clear_autocast_cache()


@contextmanager
def _forked_random_state(parameters: list[nn.Parameter], key: Tensor, training: bool) -> Iterator[None]:
    devices = {tensor.device for tensor in (key, *parameters) if tensor.device.type == "cuda"}
    if capturing(bool(devices)):
        yield
        return
    indices = sorted(device.index for device in devices)
    with torch.random.fork_rng(devices=indices):
        if training or key.device.type == "cpu":
            seed = int(key[0])
            torch.default_generator.manual_seed(seed)
            for index in indices:
                torch.cuda.default_generators[index].manual_seed(seed)
        yield
