"""The look within an epoch: what it counts, what it costs, and that training does not notice."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_kernels import Execution
from atlas_train import engine, methods, segment
from atlas_train.config import TrainConfig
from atlas_train.data import Batch
from atlas_train.nonfinite import Losses
from atlas_train.passes import count_passes
from atlas_train.run import Run
from tiny_runs import EPS, TINY, same, splits, weights

KEY = torch.tensor([1, 0])


class Bend(nn.Module):
    """Two classes by the mean m of an image: with ``bent`` class 0 near 0.5 and class 1 outside of it, else the other
    way round. An adversary of an image at 0.5 moves away from the class that it has."""

    def __init__(self, bent: bool) -> None:
        super().__init__()
        self.bent, self.scale = bent, nn.Parameter(torch.tensor(100.0))
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.bn(x)  # whose statistics must not move
        far = ((x.mean((1, 2, 3)) - 0.5).abs() - 0.6 * EPS) * self.scale
        logits = torch.stack([-far, far], 1)
        return logits if self.bent else logits.flip(1)


def run_of(model: nn.Module, **more: Any) -> Run:
    config, method = TrainConfig(**TINY), methods.build("one_step_adv", EPS)
    fake = SimpleNamespace(
        model=model, config=config, method=method, execution=Execution("fp32"), device=torch.device("cpu"),
        step=segment.EVERY - 1, folder=None, **more,
    )  # fmt: skip
    return cast(Run, fake)


def batch(label: int, count: int = 32) -> Batch:
    return Batch(torch.full((count, 1, 4, 4), 0.5), torch.full((count,), label), torch.arange(count))


def looked(model: nn.Module, images: Batch, step: int = segment.EVERY - 1) -> float | None:
    run = run_of(model)
    run.step = step
    losses = Losses(run)
    losses.segment = segment.Segment(run)
    losses.segment.look(images, KEY)
    losses.add(images.ids, torch.tensor(1.0), {})
    return losses.segment.inverted


def test_a_network_that_is_right_at_the_full_step_alone_is_seen() -> None:
    model = Bend(bent=True)
    before = weights(model)
    found = looked(model, batch(1))  # right where |m - 0.5| > 0.6 eps: at the adversary, not a quarter of the way
    assert found == pytest.approx((32 - 3 * math.sqrt(32)) / 32)
    assert same(weights(model), before) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_healthy_network_is_no_sign() -> None:
    found = looked(Bend(bent=False), batch(1))  # right near the image, wrong at the adversary
    assert found == pytest.approx((-32 - 3 * math.sqrt(32)) / 32)
    flat = Bend(bent=True)
    nn.init.zeros_(flat.scale)
    assert looked(flat, batch(0)) == 0  # no difference at all is none either


def test_one_batch_in_fifty_is_looked_at() -> None:
    found = [looked(Bend(bent=True), batch(1), step) is not None for step in range(120)]
    assert [step for step, seen in enumerate(found) if seen] == [49, 99]


def test_a_look_costs_four_passes_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Waits.seen += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    look, images = segment.Segment(run_of(model)), batch(1)
    assert 3.5 < count_passes(model, images.x, lambda: look.look(images, KEY)) <= 4
    monkeypatch.setenv("ATLAS_CHECKS", "0")  # of values, which operators make on CPUs alone
    with Waits():
        images.x.sum().item()
        assert Waits.seen == 1  # so it would be seen
        look.look(images, KEY)
    assert Waits.seen == 1


def test_a_look_waits_for_no_device(device: torch.device) -> None:
    """On CUDA, whose driver says so; the numbers are those of the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)
    )
    images = Batch(torch.rand(32, 1, 8, 8), torch.arange(32) % 2, torch.arange(32))
    expected = looked(model, images)
    run = run_of(model.to(device))
    run.device = device
    look, there, key = segment.Segment(run), Batch(*(t.to(device) for t in images)), KEY.to(device)
    look.look(there, key)  # what a first call sets up
    watch = torch.cuda.set_sync_debug_mode if device.type == "cuda" else str
    watch("error")
    try:
        look.look(there, key)
    finally:
        watch("default")
    look.read(look.unread()[-1].tolist())
    assert look.inverted == pytest.approx(expected)


def test_the_counts_are_read_with_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: eight steps are read together, in one wait."""
    run = run_of(Bend(bent=True))
    losses = Losses(run)
    losses._steps, losses.segment = 8, segment.Segment(run)
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    losses.segment.look(batch(1), KEY)
    for run.step in range(49, 57):
        assert losses.segment.inverted is None and not reads
        losses.add(torch.arange(32), torch.tensor(1.0), {})
    assert reads == [(8 + 3,)] and losses.segment.inverted is not None


def test_the_look_of_an_epoch_is_in_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "EVERY", 3)
    run = engine.train(TrainConfig(**TINY), splits=splits())
    assert all(-1 - 3 / 4 <= row["segment"] <= 0.25 for row in run.history)
    for blind in ({"probe_size": 0}, {"method": "standard"}, {"norm": "l2"}):
        run = engine.train(TrainConfig(**TINY | blind), splits=splits())
        assert all("segment" not in row for row in run.history)
