"""Between the operators of an attack on a channels_last network nothing is laid out anew, forward or backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_kernels import PGD, Execution
from atlas_train.models import build

COPIES = ("clone", "copy_", "_to_copy", "contiguous")


def order(t: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost."""
    return [d for d in sorted(range(t.dim()), key=lambda d: -t.stride(d)) if t.shape[d] > 1]


class Relaid(TorchDispatchMode):
    """Collects the copies of images whose layout is not that of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, self.calls = func.__name__.split(".")[0], self.calls + 1
        if name in COPIES:
            tensors = [t for t in (*tree_leaves(args), out) if isinstance(t, Tensor) and t.dim() == 4]
            self.found += [(name, tuple(out.shape[1:]))] * (len({tuple(order(t)) for t in tensors}) > 1)
        return out


#: A network, its images, and what it must lay out anew in a forward: fc1 reads features in the order of NCHW.
NETWORKS = {
    "preact_resnet18": ((4, 3, 32, 32), []),
    "small_cnn": ((4, 1, 28, 28), [("clone", (16, 4, 4))]),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_copies_between_layouts(name: str, precision: str, device: torch.device) -> None:
    shape, unavoidable = NETWORKS[name]
    torch.manual_seed(0)
    normalize = ((0.5,) * 3, (0.25,) * 3) if shape[1] == 3 else None
    model = build(name, num_classes=5, in_channels=shape[1], width=8, normalize=normalize)
    model.to(device, memory_format=torch.channels_last)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p)
    x = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(len(x), device=device)
    with Execution(precision):
        PGD(8 / 255, steps=1)(model, x, y)
        with Relaid() as relaid:
            adv = PGD(8 / 255, steps=2)(model, x, y)
    assert relaid.found == 2 * unavoidable and relaid.calls > 100
    assert adv.stride() == x.stride() and not torch.equal(adv, x)
