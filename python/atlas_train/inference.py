"""A network that is looked at: what it predicts, in eval mode, and then left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from atlas_kernels.attacks.held import generators, put_back
from atlas_kernels.outputs import logits_of, predicted, require_rows_of_logits


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The classes with the largest logits, int64 [B]; -1 where one is NaN, which is wrong whatever the label."""
    logits = logits_of(model(x))
    require_rows_of_logits(logits, x)
    return predicted(logits)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and at the end all is as before: buffers that move in eval mode too (scales of quantisation, say) and
    the random state."""
    indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with put_back(model, False, copy_buffers=True, seeds=dict.fromkeys(generators(indices)), alone=False):
        yield


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """The modules' flags alone; ``train()`` and ``eval()``, which a network may override, are not called."""
    return put_back(model, False)


def device_of(model: nn.Module) -> torch.device:
    """Where the network is; one without weights runs on the CPU."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
