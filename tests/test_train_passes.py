"""What a training step of each method costs, in passes of the network (1 F a forward, 1 F each kind of backward)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from atlas_kernels import noise_key
from atlas_train import methods
from atlas_train.methods import Batch, State
from atlas_train.passes import count_passes
from fidelity import CLASSES, Steps

#: K = 10; from the formulas, before the code. "atlas:worst" is a second row of atlas.
PASSES: dict[str, tuple[dict[str, Any], float]] = {
    "standard": ({}, 3),
    "adv": ({"steps": 10}, 23),
    "one_step_adv": ({}, 5),
    "atlas": ({}, 2 + 3 * 3),
    "atlas:worst": ({"local": "worst"}, 2 + 2 + 3 * 3),
    # [x; x'] forward, backward to the input, and twice as much to differentiate each of the two
    "atlas:jacobian": ({"local": "jacobian"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:jacobian of 3": ({"local": "jacobian", "count": 3}, 2 + 2 * (1 + 2 + 3 * (1 + 2))),
    "atlas:margin": ({"local": "margin"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:margin, split": ({"local": "margin", "bn": "split"}, 2 + 3 + (1 + 1 + 2 + 2)),
    "atlas:radius": ({"local": "radius"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:radius of 3": ({"local": "radius", "rivals": 3}, 2 + 2 * (1 + 3 + 1 + 2 + 2)),
    "trades": ({"steps": 10}, 27),
    "mart": ({"steps": 10}, 2 * 10 + 2 * 3),
    "n_fgsm": ({}, 2 + 3),
    "backward_smoothing": ({}, 2 + 2 * 1 + 2 * 3),  # its K is 1
    "free": ({"replays": 8}, 3 * 8),
    "yopo": ({"outer": 5, "inner": 3}, 3 * 5),
    "mma": ({"steps": 10}, 3 + 3),  # an untrained network is sure of no label; else test_train_mma
    # A gradient with a graph is a forward and a backward to the input, 2; its backward runs that backward's transpose,
    # the weights of it, and the forward's two: 4.
    "llr": ({"steps": 10}, 6 + 2 * 10 + 3),  # clean, K steps, l(x + d*)
    "cure": ({}, 3 + 6 + 6),  # CE, grad l(x), grad l(x + z)
    "grad_align": ({}, 2 + 3 + 6),  # g1, CE, g2
    "jacobian": ({"projections": 3}, 1 + 3 * (1 + 2) + 2),
    "gairat": ({"steps": 10}, 2 * 10 + 3),
    "gairat:trades": ({"base": "trades"}, 2 * 10 + 1 + 2 * 3),
    "adr": ({"steps": 10}, 2 * 10 + 2 * 3),
    "adr:trades": ({"form": "trades"}, 2 * 10 + 1 + 2 * 3),
    "adr:no clean loss": ({"alpha_nat": 0}, 2 * 10 + 1 + 3),  # no gradient to the clean side
}


class Wide(nn.Module):
    """A first layer that costs next to nothing, so that a pass less of it does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.linear = nn.Linear(64, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x)))))).mean((2, 3))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def test_every_method_is_counted() -> None:
    assert {row.partition(":")[0] for row in PASSES} == set(methods.names())


@pytest.mark.parametrize("row", PASSES)
def test_passes_per_step(row: str) -> None:
    name, (hyper, expected) = row.partition(":")[0], PASSES[row]
    torch.manual_seed(0)
    model = Wide()
    batch = Batch(torch.rand(4, 3, 8, 8), torch.randint(CLASSES, (4,)), torch.arange(4))
    method, key = methods.build(name, 0.1, hyper), noise_key()
    passes = count_passes(model, batch.x, lambda: method.train_step(model, batch, key, State(size=4), Steps(model)))
    assert passes == pytest.approx(expected, abs=0.1)
