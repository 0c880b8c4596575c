"""LLR does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from atlas_train.methods import LLR, State
from atlas_train.methods.batchnorm import held, recorded
from beside_published import EPS, Case, Outcome, assert_same, case, close, ours, theirs
from published import llr as published

STATE = State(step=40, total_steps=1000)


def of_published(made: Case, **how: Any) -> Outcome:
    """The published step; its adversary last among the images."""
    found = []

    def keep(*args: Any, **how: Any) -> Any:
        found.append(published.llr(*args, **how))
        return found[0]

    settings = {"eps": EPS, "steps": 4, "lr": 0.1} | how
    outcome = theirs(keep, made, made.start(settings["eps"]), **settings)
    outcome.images.append(found[0][0])
    return outcome


@pytest.mark.parametrize("ascent", ["code", "exact"])
@pytest.mark.parametrize("lr", [0.1, 0.01])
def test_llr(ascent: Any, lr: float) -> None:
    made = case()
    expected = of_published(made, ascent=ascent, lr=lr)
    mine = ours(LLR(EPS, steps=4, step_size=lr, ascent=ascent), made, STATE)
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 1


def test_the_two_ascents_differ() -> None:
    made = case()
    code, exact = (ours(LLR(EPS, step_size=0.01, ascent=a), made, STATE) for a in ("code", "exact"))
    assert (code.images[-1] - exact.images[-1]).abs().max() > 1e-3


def test_eps_grows_in_the_ramp() -> None:
    made = case()
    expected = of_published(made, eps=EPS * 3 / 20)
    mine = ours(LLR(EPS, steps=4, ramp=0.02), made, State(step=3, total_steps=1000))
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=True)
    assert torch.equal(ours(LLR(EPS), made, State(step=0, total_steps=1000)).images[-1], made.batch.x)


def test_gradients_flow_through_the_clean_statistics() -> None:
    made = case()
    mine = ours(LLR(EPS, steps=4), made, STATE)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(mine, of_published(made, stop_statistics=True), statistics=False, tolerance=1e-3)


def test_prepare_and_objective_apart_are_the_loss_and_leave_statistics_to_the_objective() -> None:
    made, method = case(), LLR(EPS, steps=3)
    whole, apart = copy.deepcopy(made.model).train(), copy.deepcopy(made.model).train()
    loss, _ = method.loss(whole, made.batch, made.key, STATE)
    given = method.prepare(apart, made.batch, made.key, STATE)
    assert not given.requires_grad and all(p.requires_grad for p in apart.parameters())
    assert all(torch.equal(a, b) for a, b in zip(apart.buffers(), made.model.buffers(), strict=True))
    again, _ = method.objective(apart, made.batch, given)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(apart.buffers(), whole.buffers(), strict=True))


def test_eval_statistics_are_the_running_ones_and_ce_alone_moves_them() -> None:
    made = case()
    mine = ours(LLR(EPS, steps=4, bn="eval"), made, STATE)
    assert_same(mine, of_published(made, running=True), statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 1


def test_a_network_without_batchnorm_has_nothing_to_hold() -> None:
    made = case()
    made.model.bn1, made.model.bn2 = nn.GroupNorm(2, 6).double(), nn.Identity()
    clean_batch, running = (ours(LLR(EPS, steps=2, bn=bn), made, STATE) for bn in ("clean_batch", "eval"))
    assert_same(clean_batch, running, statistics=False)


def test_held_layers_repeat_the_recorded_forward_and_are_put_back() -> None:
    made = case()
    model, x = made.model.train(), made.batch.x
    with recorded(model) as statistics:
        logits = model(x)
    before = copy.deepcopy(model.state_dict())
    with held(statistics):
        close(model(x).detach(), logits.detach(), "logits")
        one = model(x[:1]).detach()
    close(one, logits[:1].detach(), "one row of the logits")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert "forward" not in vars(model.bn1)
    assert len(statistics) == 2 and all(mean.requires_grad for mean, _ in statistics.values())
    model.bn1.eval()  # frozen by its owner: normalises with its running averages anyway
    with recorded(model) as statistics:
        model(x)
    assert list(statistics) == [model.bn2]


def test_a_batchnorm_that_runs_twice_is_refused() -> None:
    made = case()
    made.model.conv2 = nn.Sequential(made.model.conv2, made.model.bn2)
    with pytest.raises(ValueError, match="BatchNorm 'conv2.1' twice in a forward"):
        LLR(EPS).loss(made.model.train(), made.batch, made.key)
    assert not made.model.bn2._forward_pre_hooks
