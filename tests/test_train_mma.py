"""MMA does what its published code does: margins, loss, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_train import noise
from atlas_train.methods import MMA, Batch, State
from atlas_train.passes import count_passes
from beside_published import EPS, Case, Steps, assert_same, case, close, ours, theirs
from published import mma as published
from resume import resumed_and_whole
from test_train_passes import Wide

HYPER: dict[str, Any] = {"steps": 4, "d_max": 0.06, "min_eps": 0.02, "search_steps": 6}


def confident(size: int = 24) -> Case:
    """A network that is sure of most of its labels, with margins on both sides of d_max."""
    made = case(size, seed=3)
    made.model.linear.weight.data *= 6
    with torch.no_grad():
        labels = copy.deepcopy(made.model).train()(made.batch.x).argmax(1)
    labels[::4] = made.batch.y[::4]
    made.batch = made.batch._replace(y=labels)
    return made


def published_step(made: Case, known: dict[int, float], **hyper: Any) -> Any:
    start = noise.uniform(made.batch.x, made.key, made.batch.ids, 0)
    how = {"clean_weight": 1 / 3, **HYPER, **hyper}
    return theirs(published.mma, made, start, ids=made.batch.ids, known=known, **how)


@pytest.mark.parametrize(("bn_compat", "clean_weight"), [(False, 1 / 3), (True, 1 / 3), (True, 0.0)])
def test_mma(bn_compat: bool, clean_weight: float) -> None:
    made, state, known = confident(), State(), {}
    hyper = HYPER | {"clean_weight": clean_weight}
    method = MMA(EPS, **hyper, bn_compat=bn_compat)
    for turn in range(2):  # from min_eps, and from the margins of the first turn
        expected = published_step(made, known, clean_weight=clean_weight)
        mine = ours(method, made, state)
        found = state.memory["eps"][made.batch.ids]
        assert (found == 0).any() and (found >= method.d_max).any() and ((found > 0) & (found < method.d_max)).any()
        close(found, torch.tensor([known[i] for i in made.batch.ids.tolist()], dtype=found.dtype), f"margins {turn}")
        close(mine.images[-1], expected.images[-1], f"x' {turn}")
        assert (mine.images[-1] < 0).any()  # not clipped to the image range
        assert_same(mine, expected, statistics=bn_compat)
    forwards = 1 + (1 + HYPER["search_steps"]) * bn_compat + 1
    assert int(mine.model.bn1.num_batches_tracked) == forwards


def test_the_sign_of_the_slm_gradient_is_that_of_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(64, 7, dtype=torch.float64)).requires_grad_()
    y = torch.randint(7, (64,))
    (slm,) = torch.autograd.grad(published.slm(logits, y).sum(), logits)
    (ce,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), logits)
    wrong = 1 - logits.detach().softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(ce, wrong * slm)


def test_margins_are_remembered_by_sample_and_new_samples_start_at_min_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    made, state = confident(), State(size=100)
    radii: list[Tensor] = []
    attack = MMA._attack

    def seen(self: MMA, model: Any, batch: Batch, eps: Tensor, key: Tensor) -> Any:
        radii.append(torch.stack([batch.ids.double(), eps]))
        return attack(self, model, batch, eps, key)

    monkeypatch.setattr(MMA, "_attack", seen)
    method = MMA(EPS, **HYPER)
    first = Batch(*(part[:16] for part in made.batch))
    ours(method, dataclasses.replace(made, batch=first), state)
    margins = state.memory["eps"].clone()
    assert len(margins) == 100 and (radii[0][1] == HYPER["min_eps"]).all()
    order = torch.randperm(len(made.batch.y), generator=torch.Generator().manual_seed(0))
    second = Batch(*(part[order] for part in made.batch))
    ours(method, dataclasses.replace(made, batch=second), state)
    ids = radii[1][0].long()
    old = torch.isin(ids, first.ids)
    assert old.any() and not old.all() and len(margins[ids[old]].unique()) > 3
    assert torch.equal(radii[1][1], margins[ids].clamp(min=HYPER["min_eps"]))
    assert (radii[1][1][~old] == HYPER["min_eps"]).all()


def test_a_sample_that_is_unsure_forgets_its_margin() -> None:
    made, state = confident(), State(size=100)
    state.memory["eps"] = torch.full((100,), 0.05, dtype=torch.float64)
    ours(MMA(EPS, **HYPER), made, state)
    margins = state.memory["eps"][made.batch.ids]
    assert (margins == 0).any() and (state.memory["eps"] == 0.05).sum() == 100 - len(margins)


def test_without_a_sure_sample_it_is_the_clean_loss_on_the_batch_twice() -> None:
    made = case()
    mine = ours(MMA(EPS, **HYPER), made)
    expected = published_step(made, {})
    assert len(mine.images) == 2 and torch.equal(mine.images[0], mine.images[1])
    assert_same(mine, expected, statistics=True)


@pytest.mark.parametrize(("bn_compat", "expected"), [(False, 3 + 2 * 10 + 10 + 3), (True, 3 + 2 * 10 + 11 + 3)])
def test_passes_per_step_where_all_samples_are_sure(bn_compat: bool, expected: int) -> None:
    torch.manual_seed(0)
    model, x = Wide(), torch.rand(4, 3, 8, 8)
    model.linear.weight.data *= 1000
    with torch.no_grad():
        batch = Batch(x, model(x).argmax(1), torch.arange(4))
        assert (published.slm(model(x), batch.y) < 0).all()
    method, state = MMA(EPS, bn_compat=bn_compat), State(size=4)
    passes = count_passes(model, x, lambda: method.train_step(model, batch, noise_key(), state, Steps(model)))
    assert passes == pytest.approx(expected, abs=0.1)


def test_a_single_sure_sample_is_not_alone_in_batchnorm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        model[-1].weight.mul_(9)
        y = model(x).argmin(1)
        y[2] = 1 - y[2]
    batch, state = Batch(x, y, torch.arange(6)), State()
    MMA(EPS, **HYPER).loss(model, batch, noise_key(), state)
    margins = state.memory["eps"]
    assert margins[2] > 0 and margins[[0, 1, 3, 4, 5]].max() == 0


def test_prepare_and_objective_make_the_same_loss() -> None:
    made = confident()
    method = MMA(EPS, **HYPER)
    loss, metrics = method.loss(made.model.train(), made.batch, made.key, State(size=100))
    again = confident()
    given = method.prepare(again.model.train(), again.batch, again.key, State(size=100))
    same, _ = method.objective(again.model, again.batch, given)
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)
    assert set(metrics) == {"clean", "margin"} and metrics["margin"] == given.margins.mean()


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    hyper = {"steps": 2, "search_steps": 3}
    resumed, whole = resumed_and_whole("mma", hyper, tmp_path)
    assert resumed.keys() == whole.keys() and (whole["memory.eps"] > 0).any()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_eps must be at most 1.05 d_max = 0.0105, got 0.02"):
        MMA(EPS, d_max=0.01, min_eps=0.02)
    with pytest.raises(ValueError, match=r"mma: d_max must be a number > 0 and < .*write 32/255 instead of 32"):
        MMA(EPS, d_max=32)
    assert MMA(0.5)._d_max == 0.75 and MMA(0.5)._min_eps == 0.075
