"""What a training step of each method costs, in passes of the network (1 F a forward, 1 F each kind of backward)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas_kernels import noise_key
from atlas_train import methods
from atlas_train.methods import Batch, State
from atlas_train.passes import count_passes
from beside_published import CLASSES, Steps

#: K = 10; from the formulas, before the code. "atlas:worst" is a second row of atlas.
PASSES: dict[str, tuple[dict[str, Any], float]] = {
    "standard": ({}, 3),
    "adv": ({"steps": 10}, 23),
    "one_step_adv": ({}, 5),
    "atlas": ({}, 2 + 3 * 3),
    "atlas:worst": ({"local": "worst"}, 2 + 2 + 3 * 3),
    "atlas:segment": ({"local": "segment"}, 2 + 3 * 3),
    "atlas:segment of 2": ({"local": "segment", "count": 2, "global_term": "none"}, 2 + 3 * 3),
    # [x; x'] forward, backward to the input, and twice as much to differentiate each of the two
    "atlas:jacobian": ({"local": "jacobian"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:jacobian of 3": ({"local": "jacobian", "count": 3}, 2 + 2 * (1 + 2 + 3 * (1 + 2))),
    "atlas:margin": ({"local": "margin"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:margin, split": ({"local": "margin", "bn": "split"}, 2 + 3 + (1 + 1 + 2 + 2)),
    "atlas:radius": ({"local": "radius"}, 2 + 2 * (1 + 1 + 2 + 2)),
    "atlas:radius of 3": ({"local": "radius", "rivals": 3}, 2 + 2 * (1 + 3 + 1 + 2 + 2)),
    "atlas:start": ({"local": "start"}, 1 + 1 + 1 + 2 * 2),  # z(x0), to x0, z(x'), and both to the weights
    "atlas:start of pgi": ({"local": "start", "start_noise": "pgi"}, 7),
    "atlas:start of liet": ({"local": "start", "start_noise": "liet"}, 7),
    "atlas:start, 2 steps": ({"local": "start", "steps": 2}, 9),
    "atlas:start, 2 steps, both": ({"local": "start", "steps": 2, "iterates": "all"}, 9),
    "atlas:start, 2 steps, both kept": ({"local": "start", "steps": 2, "iterates": "all", "keep": "all"}, 11),
    "atlas:start, 2 steps, first": ({"local": "start", "steps": 2, "keep": "all"}, 9),
    "atlas:start, 2 steps, constants": ({"local": "start", "steps": 2, "iterates": "all", "keep": "none"}, 7),
    "atlas:start, a constant": ({"local": "start", "keep": "none"}, 5),
    "atlas:start, segment": ({"local": "start", "segment_weight": 1.0}, 7 + 3),
    "atlas:start, global": ({"local": "start", "global_term": "kl"}, 10),
    "trades": ({"steps": 10}, 27),
    "mart": ({"steps": 10}, 2 * 10 + 2 * 3),
    "n_fgsm": ({}, 2 + 3),
    "backward_smoothing": ({}, 2 + 2 * 1 + 2 * 3),  # its K is 1
    "free": ({"replays": 8}, 3 * 8),
    "stored_adv": ({"local_weight": 1.0}, 3),
    "stored_adv:2 replays": ({"replays": 2}, 3 * 2),
    "yopo": ({"outer": 5, "inner": 3}, 3 * 5),
    "mma": ({"steps": 10}, 3 + 3),  # an untrained network is sure of no label; else test_train_mma
    # A gradient with a graph is a forward and a backward to the input, 2; its backward runs that backward's transpose,
    # the weights of it, and the forward's two: 4.
    "llr": ({"steps": 10}, 6 + 2 * 10 + 3),  # clean, K steps, l(x + d*)
    "cure": ({}, 3 + 6 + 6),  # CE, grad l(x), grad l(x + z)
    "grad_align": ({}, 2 + 3 + 6),  # g1, CE, g2
    "liet": ({}, 1 + 1 + 2 + 3),  # x0 forward, its gradient; the backward of that forward; x'
    "gat": ({}, 1 + 2 + 1 + 2 * 2),  # x, the attack, x', and the backward of both forwards
    "gat:bn_compat": ({"bn_compat": True}, 1 + 2 + 1 + 2 * 2 + 1),
    "fgsm_pgi": ({}, 1 + 1 + 2 + 3),
    "nuat": ({}, 1 + 2 + 1 + 2 * 2),
    "nuat:bn_compat": ({"bn_compat": True}, 1 + 2 + 1 + 2 * 2 + 1),
    "fgsm_uap": ({}, 1 + 1 + 2 + 3),
    "fgsm_uap:per_class": ({"per_class": True}, 1 + 1 + 2 + 3),
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
    assert counted(model, batch, name, hyper) == pytest.approx(expected, abs=0.1)


def counted(model: nn.Module, batch: Batch, name: str, hyper: dict[str, Any]) -> float:
    method, key, state = methods.build(name, 0.1, hyper), noise_key(), State(size=4)
    method.before_step(model, batch, key, state)
    return count_passes(model, batch.x, lambda: method.train_step(model, batch, key, state, Steps(model)))


class Mean(nn.Module):
    """The mean over all places, of samples [B, C, H, W] or [B, places, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class Tokens(nn.Module):
    """[B, C, H, W] as [B, H W, C], not contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


class ConvNeXtBlock(nn.Sequential):
    def __init__(self, width: int) -> None:
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        super().__init__(depthwise, nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
        self.last = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self[0](x).permute(0, 2, 3, 1)
        for module in list(self)[1:]:
            y = module(y)
        return x + y.permute(0, 3, 1, 2)


def separable(width: int, wider: int) -> list[nn.Module]:
    """A depthwise convolution, then a pointwise one, as in MobileNet."""
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return [depthwise, nn.BatchNorm2d(width), nn.ReLU6(), nn.Conv2d(width, wider, 1), nn.BatchNorm2d(wider), nn.ReLU6()]


#: Networks with other layers than plain convolutions; their first layer, too, costs next to nothing.
BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "vit": lambda: [
        nn.Conv2d(3, 32, 2, stride=2),
        Tokens(),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True), 4),
    ],
    "mobilenet": lambda: [
        nn.Conv2d(3, 32, 2, stride=2), *separable(32, 64), *separable(64, 128), *separable(128, 128)
    ],
    "convnext": lambda: [nn.Conv2d(3, 32, 2, stride=2), ConvNeXtBlock(32), ConvNeXtBlock(32)],
}  # fmt: skip


class Other(nn.Module):
    def __init__(self, body: list[nn.Module], width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*body, Mean())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("network", BODIES)
def test_passes_are_those_of_modules_whatever_they_compute(network: str) -> None:
    torch.manual_seed(0)
    model = Other(BODIES[network](), 128 if network == "mobilenet" else 32)
    batch = Batch(torch.rand(4, 3, 8, 8), torch.randint(CLASSES, (4,)), torch.arange(4))
    for row in ("standard", "adv", "atlas", "trades", "mart", "free", "llr", "cure", "jacobian"):
        hyper, expected = PASSES[row]
        with sdpa_kernel(SDPBackend.MATH):  # llr, cure and jacobian differentiate twice
            assert counted(model, batch, row, hyper) == pytest.approx(expected, abs=0.01 * expected), row
    assert torch.backends.mha.get_fastpath_enabled()
    fused = counted(model, batch, "adv", {"steps": 10})  # attention as one operator, where there is any
    assert fused == pytest.approx(23, abs=0.1)


def test_inference_mode_and_part_of_a_batch_are_counted() -> None:
    model, x = Wide(), torch.rand(8, 3, 8, 8)

    def call() -> None:
        with torch.inference_mode():
            model(x)
        model(x[:4]).sum().backward()

    assert count_passes(model, x, call) == pytest.approx(1 + 0.5 * 3, abs=0.1)


def test_a_network_without_layers_that_can_be_counted_has_no_number() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :CLASSES]

    x = torch.rand(2, 3, 4, 4)
    assert math.isnan(count_passes(Scaled(), x, lambda: None))
