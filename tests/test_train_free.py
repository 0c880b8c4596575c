"""Free does what its published code does: every update of every replay, BatchNorm and the delta that stays, to 1e-9."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atlas_train import engine
from atlas_train.config import TrainConfig
from atlas_train.methods import Batch, Free, State
from beside_published import EPS, Case, assert_same, case, close, ours, theirs
from published import free as published
from resume import resumed_and_whole


def images_seen(made: Case) -> list[Tensor]:
    """What the network is run on from here on."""
    seen: list[Tensor] = []
    made.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def batches() -> list[Batch]:
    """A whole batch, a ragged one and a whole one."""
    return [case(size, seed).batch for seed, size in enumerate((8, 5, 8))]


@pytest.mark.parametrize("clip", ["delta", "sum"])
def test_free(clip: str) -> None:
    made, state = case(), State()
    seen = images_seen(made)
    delta = torch.zeros_like(made.batch.x)
    algorithm = published.free if clip == "delta" else published.free_sum
    for batch in batches():
        made.batch = batch
        expected = theirs(algorithm, made, delta, eps=EPS, replays=3)
        theirs_seen = seen[:]
        seen.clear()
        mine = ours(Free(EPS, replays=3, clip=clip), made, state)  # type: ignore[arg-type]
        assert len(mine.grads) == len(seen) == 3
        for a, b in zip(seen, theirs_seen, strict=True):
            close(a, b, "images")
        seen.clear()
        assert_same(mine, expected, statistics=True)
        close(state.memory["delta"], delta.detach(), "delta")
        made.model = mine.model


def test_delta_starts_at_zero_and_stays_by_place() -> None:
    made, state = case(), State()
    seen = images_seen(made)
    method = Free(EPS, replays=2)
    ours(method, made, state)
    assert torch.equal(seen[0], made.batch.x)
    delta = state.memory["delta"].clone()
    assert delta.abs().max() > 0.9 * EPS
    made.batch = case(5, seed=1).batch
    seen.clear()
    ours(method, made, state)
    assert torch.equal(seen[0], made.batch.x + delta[:5])  # not clipped: as published
    assert (seen[0] < 0).any() and seen[1].min() >= 0 and seen[1].max() <= 1
    assert torch.equal(state.memory["delta"][5:], delta[5:])
    made.batch, delta = case(12, seed=2).batch, state.memory["delta"].clone()
    seen.clear()
    ours(method, made, state)
    assert torch.equal(seen[0][:8], made.batch.x[:8] + delta) and torch.equal(seen[0][8:], made.batch.x[8:])


def test_every_replay_is_an_update() -> None:
    assert Free(EPS).updates == 8 and Free(EPS, replays=3).updates == 3
    tiny = {"eps": EPS, "epochs": 2, "batch_size": 32, "width": 4, "train_size": 64, "device": "cpu", "beside": ()}
    run = engine.train(TrainConfig("free", {"replays": 3}, optimizer="adam", **tiny))  # type: ignore[arg-type]
    steps = {int(s["step"]) for s in run.optimizer.state_dict()["state"].values()}
    assert steps == {2 * 2 * 3}


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole("free", {"replays": 2}, tmp_path)
    assert resumed.keys() == whole.keys() and "memory.delta" in whole
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_step_of_delta_is_eps_unless_told() -> None:
    made, state = case(), State()
    ours(Free(EPS, replays=1), made, state)
    inside = (made.batch.x > EPS) & (made.batch.x < 1 - EPS)
    assert (state.memory["delta"].abs()[inside] - EPS).abs().max() < 1e-12
    small = State()
    ours(dataclasses.replace(Free(EPS, replays=1), step_size=EPS / 4), made, small)
    assert (small.memory["delta"].abs()[inside] - EPS / 4).abs().max() < 1e-12
