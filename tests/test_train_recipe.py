"""Settings of a modern recipe: smoothed labels, what weight decay spares, clipping, schedules, warm-ups, mixed steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_train import methods, models
from atlas_train.config import TrainConfig
from atlas_train.methods import Batch, Method, State
from tiny_runs import EPS, TINY


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"probe_size": 0, "method": "adv", "hyper": {"steps": 2}} | changed)


# ---- label smoothing -------------------------------------------------------------------------------------------------

#: Whose cross-entropies are smoothed: for each the weight, the weights of samples and the logits, from (method, model,
#: batch, what was prepared).
Parts = list[tuple[float, Any, Tensor]]
Smoothed = Callable[[Any, nn.Module, Batch, Any], Parts]


def of_given(method: Method, model: nn.Module, batch: Batch, given: Any) -> Parts:
    return [(1.0, getattr(given, "weights", None), model(getattr(given, "adv", given)))]


def of_clean(method: Method, model: nn.Module, batch: Batch, given: Any) -> Parts:
    return [(1.0, None, model(batch.x))]


def of_mma(method: Any, model: nn.Module, batch: Batch, given: Any) -> Parts:
    w = method.clean_weight
    return [(w, None, model(batch.x)), (1 - w, given.weights, model(given.images))]


def of_atlas(method: Any, model: nn.Module, batch: Batch, given: Any) -> Parts:
    clean, adv, *points = model(given.images).split(len(batch.x))
    near = [(method.local_weight / len(points), None, z) for z in points if method.local_objective == "ce"]
    far = [(method.global_weight, None, clean)] if method.global_term == "ce" else []
    return [(1.0, None, adv), *near, *far]


SMOOTHED: dict[str, list[tuple[dict[str, Any], Smoothed]]] = {
    "atlas": [
        ({}, of_atlas),
        ({"count": 2, "local_weight": 0.7, "local_objective": "ce", "global_term": "ce", "global_weight": 2}, of_atlas),
        ({"local": "margin"}, of_atlas),
    ],
    "trades": [({}, of_clean)],
    "mart": [({}, of_given)],
    "gairat": [({}, of_given), ({"base": "trades"}, of_clean)],
    "adr": [
        ({"alpha_adv": 2.0}, lambda m, f, b, g: [(0.5, None, f(b.x)), (2.0, None, f(g))]),
        ({"form": "trades"}, of_clean),
    ],
    "free": [({"clip": "sum"}, lambda m, f, b, g: [(1.0, None, f((b.x + g).clamp(0, 1)))])],
    "llr": [({}, lambda m, f, b, g: [(2.0, None, f(b.x))])],
    "mma": [({}, of_mma)],
} | dict.fromkeys(("standard", "backward_smoothing", "cure", "jacobian"), [({}, of_clean)])


@pytest.mark.parametrize("name", methods.names())
def test_labels_are_smoothed_in_every_method(name: str) -> None:
    """By its definition: (1 - s) CE(y) + s mean_c CE(c), in place of every CE(y) of the loss."""
    torch.manual_seed(0)
    model = models.build("digits_net", num_classes=4, in_channels=1, width=4).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # forwards move nothing, so that they may be repeated
    batch = Batch(torch.rand(6, 1, 8, 8).double(), torch.randint(4, (6,)), torch.randperm(50)[:6])
    share, state = 0.3, State(epoch=3, epochs=4, size=50)
    for hyper, smoothed in SMOOTHED.get(name, [({}, of_given)]):
        method, plain = (methods.build(name, EPS, hyper, s) for s in (share, 0.0))
        given = plain.prepare(model, batch, noise_key(), state)
        expected, _ = plain.objective(model, batch, given)
        for weight, weights, logits in smoothed(plain, model, batch, given):
            log_p = logits.log_softmax(1)
            gap = share * (log_p.gather(1, batch.y[:, None])[:, 0] - log_p.mean(1))
            expected = expected + weight * (gap * (1 if weights is None else weights)).mean()
        loss, _ = method.objective(model, batch, given)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        weight = next(model.parameters())
        mine, theirs = (torch.autograd.grad(each, weight)[0] for each in (loss, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
        assert method.in_use() == plain.in_use()  # it is the run's, and no hyper-parameter


def test_awp_is_around_smoothed_labels() -> None:
    built = config(awp=0.01, label_smoothing=0.2).build_method()
    assert isinstance(built, methods.AWP) and built.method.label_smoothing == built.label_smoothing == 0.2
