"""FGSM-PGI does what the published code does, to 1e-9, over two epochs and a reset, with what it keeps of each image;
and what is kept survives a stop, graphs, batches that are left out, and is in no file but last.pt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_kernels.backends.reference.philox import noise
from atlas_train import checkpoint, engine, methods, remembered
from atlas_train.config import TrainConfig
from atlas_train.data import Images
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import AWP, FGSMPGI, Batch, Method, State
from atlas_train.methods.mma import MMA
from atlas_train.nonfinite import LeftOut, NonFiniteLoss
from atlas_train.passes import passes_per_step
from atlas_train.run import Run
from atlas_train.step_graph import StepGraph
from beside_published import EPS, Outcome, Steps, _note, assert_same, case, close
from fake_graph import recorded
from published import fgsm_pgi as published
from resume import resumed_and_whole
from tiny_runs import TINY, Lines, same, splits, weights

STORES = FGSMPGI.stores
IMAGES = 12


def first_numbers(key: Tensor) -> Tensor:
    """Those that signs of the first perturbations are drawn by."""
    u = noise((IMAGES, 3, 36), key, torch.arange(IMAGES), 2**16, 0, 0, torch.float64).view(IMAGES, 3, 6, 6)
    return torch.where(u < 0, -1.0, 1.0).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("code", ["fastat", "authors"])
def test_two_epochs_of_the_published_code(code: str, smoothing: float) -> None:
    """Batches of 8 and 4 of 12 images; perturbations begin anew with the second epoch."""
    made = case(IMAGES)
    mine, theirs = (copy.deepcopy(made.model).train() for _ in "12")
    my_steps, their_steps, state = Steps(mine), Steps(theirs), State(total_steps=6, epochs=3, size=IMAGES)
    method = FGSMPGI(EPS, code=code, reset=1 / 3, label_smoothing=smoothing)
    images: list[Tensor] = []
    mine.register_forward_pre_hook(lambda module, args: _note(images, module, args[0]))
    order = torch.randperm(IMAGES)
    moved: list[Tensor] = []
    for step in range(6):
        rows = order[8 * (step % 2) :][:8]
        batch = Batch(made.batch.x[rows], made.batch.y[rows], rows)
        state.step, state.epoch, key = step, step // 2, made.key + step
        if step % 2 == 0:
            kept = published.reset(first_numbers(key), EPS)
        adv, expected = published.fgsm_pgi(
            theirs, batch.x, batch.y, None, their_steps, all_delta=kept[0], all_momentum=kept[1], idx=rows, eps=EPS,
            clip_start=code == "fastat", smoothing=smoothing,
        )  # fmt: skip
        loss, _ = method.step(mine, batch, key, state, my_steps)
        close(images[-1], adv, "x'")
        for name, theirs_kept in zip(STORES, kept, strict=True):
            close(state.memory[name], theirs_kept, name)
        assert_same(
            Outcome(loss, my_steps.grads, mine, []), Outcome(expected, their_steps.grads, theirs, []), statistics=True
        )
        moved.append(kept[0].clone())
    assert not torch.equal(moved[1], moved[2]) and not torch.equal(moved[3], moved[5])


def test_resets_are_shares_of_training() -> None:
    """The published ones at the published lengths, and none beside."""

    def resets(method: FGSMPGI, epochs: int, batches: int = 7) -> list[float]:
        total = epochs * batches
        due = (step for step in range(1, total) if method._noise._is_due(State(step, total, step // batches, epochs)))
        return [step / batches for step in due]

    assert resets(FGSMPGI(EPS), 100) == [40, 80]
    assert resets(FGSMPGI(EPS, code="authors"), 110) == [40, 80]
    often = FGSMPGI(EPS, code="authors", **FGSMPGI.defaults["cifar100"])
    assert resets(often, 110) == list(range(10, 110, 10))
    assert resets(FGSMPGI(EPS), 30) == [12, 24]
    assert resets(FGSMPGI(EPS, reset=1.0), 30) == []
    assert methods.get("fgsm_pgi") is FGSMPGI


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    mine, whole = resumed_and_whole("fgsm_pgi", {"reset": 0.5}, tmp_path)
    assert {f"memory.{name}" for name in STORES} <= set(mine) and same(mine, whole)


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"method": "fgsm_pgi", "label_smoothing": 0.2} | changed)


def test_it_learns_and_says_what_it_keeps_and_counting_passes_leaves_that_alone() -> None:
    lines = Lines()
    run = engine.train(config(epochs=8, batch_size=12), splits=splits(), display=lines)
    assert run.history[-1]["adv"] > 0.8 and run.history[-1]["loss"] < run.history[0]["loss"]
    assert any("fgsm_pgi keeps 0.0 MB on cpu: perturbations and momentum of 64 images" in line for line in lines.said)
    kept = {name: (value, value.clone()) for name, value in run.memory.items()}
    assert passes_per_step(run) == pytest.approx(7, abs=0.5)
    assert all(run.memory[name] is value and torch.equal(value, was) for name, (value, was) in kept.items())


def test_only_last_pt_holds_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = engine.train(config(epochs=3, val_size=16), splits=splits(), folder=folder)
    last, best = (checkpoint.load(folder / name) for name in (checkpoint.LAST, checkpoint.BEST))
    assert set(last["memory"]) == set(STORES) and all(len(t) == 48 for t in last["memory"].values())
    assert best["memory"] == {} and (folder / checkpoint.LAST).samefile(folder / checkpoint.LAST)
    (exported,) = folder.glob("model.*")
    assert exported.stat().st_size < 1.2 * sum(t.nbytes for t in run.model.state_dict().values()) + 10_000
    # Stopped before best.pt of the last epoch was written, and resumed elsewhere: it holds none either.
    engine.train(config(epochs=3, val_size=16, resume=str(folder)), splits=splits(), folder=tmp_path / "other")
    written = tmp_path / "other" / checkpoint.BEST
    assert written.exists() and checkpoint.load(written)["memory"] == {}


def test_what_goes_back_to_best_begins_anew_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lines = tmp_path / "run", Lines()
    engine.train(config(epochs=2, val_size=16), splits=splits(), folder=folder)
    resumed = config(epochs=4, val_size=16, resume=str(folder / checkpoint.BEST))
    run = engine.train(resumed, splits=splits(), folder=tmp_path / "more", display=lines)
    assert any("perturbations and momentum of the images begin anew" in line for line in lines.said)
    assert set(run.memory) == set(STORES) and run.epoch == 4


def test_other_data_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    engine.train(config(epochs=1), splits=splits(), folder=tmp_path)
    resume = config(epochs=2, resume=str(tmp_path))
    other = splits()
    turned = replace(other, train=Images(other.train.images.flip(0), other.train.labels.flip(0)))
    for given in (splits(train=80), turned):
        with pytest.raises(ValueError, match="was made on other data"):
            engine.train(resume, splits=given)
    shape = (64, 1, 8, 8)
    good = {name: torch.zeros(shape) for name in STORES}
    method = FGSMPGI(EPS)
    method.require_memory(good, shape)
    for bad, match in (
        ({STORES[0]: good[STORES[0]]}, "without the other"),
        (good | {"momentum": torch.zeros(63, 1, 8, 8)}, r"expected floats \[64, 1, 8, 8\]"),
        (good | {"momentum": torch.zeros(shape, dtype=torch.int64)}, "expected floats"),
        (good | {"momentum": good["momentum"].bfloat16()}, r"expected floats \[64, 1, 8, 8\] in torch.float32"),
        (good | {"perturbations": good["perturbations"] + 2 * EPS}, "within eps"),
        (good | {"momentum": good["momentum"] + float("nan")}, "finite numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            method.require_memory(bad, shape)


def test_too_little_memory_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    method = FGSMPGI(EPS)
    assert method.store_bytes((50_000, 3, 32, 32)) == 2 * 50_000 * 3072 * 4
    assert FGSMPGI(EPS, store="bfloat16").store_bytes((50_000, 3, 32, 32)) == 2 * 50_000 * 3072 * 2
    said = remembered.require_room(method, (50_000, 3, 32, 32), torch.device("cpu"))
    assert said == "fgsm_pgi keeps 1.2 GB on cpu: perturbations and momentum of 50,000 images"
    assert remembered.require_room(MMA(EPS), (50_000, 3, 32, 32), torch.device("cpu")) == ""
    monkeypatch.setattr(remembered, "_free", lambda device: 10_000)
    with pytest.raises(ValueError, match="keeps 0.0 MB on cpu.*0.0 MB are free there: take half by fgsm_pgi.store"):
        engine.train(config(), splits=splits())


class Refusing(Steps):
    """Every loss is found to be not finite."""

    def backward(self, loss: Tensor, metrics: Any = None) -> None:
        raise NonFiniteLoss(0, torch.zeros(0), {}, None)


@pytest.mark.parametrize("method", [FGSMPGI(EPS), AWP(FGSMPGI(EPS), 0.01), MMA(EPS)], ids=lambda m: m.name)
def test_a_batch_that_is_left_out_leaves_what_is_kept_as_it_was(method: Method) -> None:
    made = case(IMAGES)
    model, state = made.model.train(), State(size=IMAGES)
    batch = made.batch._replace(ids=torch.randperm(IMAGES))
    LeftOut(method)(model, batch, made.key, state, Steps(model))
    before = {name: (value, value.clone()) for name, value in state.memory.items()}
    assert before
    for other in (batch, Batch(*(t[:5] for t in batch))):
        method.step(model, other, made.key + 1, replace(state, memory=dict(state.memory)), Steps(model))
        assert any(not torch.equal(value, was) for value, was in before.values()), "a step that counts writes it"
        before = {name: (value, value.clone()) for name, value in state.memory.items()}
        with pytest.raises(NonFiniteLoss):
            LeftOut(method)(model, other, made.key + 2, state, Refusing(model))
        assert {*state.memory} == {*before}
        for name, (value, was) in before.items():
            assert state.memory[name] is value and torch.equal(value, was)


def test_rows_alone_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has a row for each image; what else there is, whole."""
    method, ids = FGSMPGI(EPS), torch.tensor([4, 1])
    memory = {name: torch.randn(IMAGES, 3, 2, 2) for name in STORES} | {"few": torch.zeros(3)}
    copied: list[tuple[int, ...]] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **how: copied.append(tuple(t.shape)) or clone(t, **how))
    before = {name: clone(t) for name, t in memory.items()}
    with remembered.unchanged(method, memory, ids):
        for t in memory.values():
            t[ids if len(t) == IMAGES else 0] = 7.0
        memory["new"] = torch.zeros(1)
    assert copied == [(3,)] and same(memory, before)
    monkeypatch.undo()
    state, batch = remembered.set_apart(method, State(memory=memory, size=IMAGES), Batch(torch.zeros(2), ids, ids))
    assert state.size == 2 and batch.ids.tolist() == [0, 1]
    assert torch.equal(state.memory[STORES[0]], memory[STORES[0]][ids]) and state.memory["few"] is not memory["few"]


def test_graphs_of_the_step_leave_the_store_in_its_place() -> None:
    def trained(graphs: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        made = case(IMAGES)
        model, method, state = made.model.train(), FGSMPGI(EPS, reset=0.5), State(total_steps=12, size=IMAGES)
        descent = OptimizerDescent(torch.optim.SGD(model.parameters(), 0.1, fused=True), lambda update: 0.125)
        step: Any = StepGraph(method, descent._optimizer, pytest.fail, recorded) if graphs else method.step
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
        for number in range(12):
            state.step, rows = number, order.roll(5 * number)[:8]
            step(model, Batch(made.batch.x[rows], made.batch.y[rows], rows), made.key + number, state, descent)
        return weights(model), state.memory

    for mine, theirs in zip(trained(True), trained(False), strict=True):
        assert same(mine, theirs)


def test_an_image_that_a_batch_holds_twice_is_kept_as_its_first_place_leaves_it() -> None:
    """Extra images are drawn with replacement."""
    made = case(IMAGES)
    ids = torch.tensor([3, 5, 3, 7, 3, 5, 0, 1, 2, 4, 6, 8])
    batch, noise = made.batch._replace(ids=ids), FGSMPGI(EPS)._noise
    state, grad = State(size=20, repeats=True), torch.randn_like(made.batch.x)
    noise.before_step(batch, made.key, state)
    before = {name: value.clone() for name, value in state.memory.items()}
    adv = noise.step(batch, grad, state)
    apart = State(size=12, memory={name: value[ids] for name, value in before.items()})
    expected = noise.step(batch._replace(ids=torch.arange(12)), grad, apart)
    assert torch.equal(adv, expected)
    for name in STORES:
        for row, place in {3: 0, 5: 1, 7: 3, 8: 11}.items():
            assert torch.equal(state.memory[name][row], apart.memory[name][place])
        assert torch.equal(state.memory[name][9:], before[name][9:])


def test_extra_images_have_rows_too() -> None:
    base = splits()
    extra = Images(base.train.images[:6].clone(), base.train.labels[:6].clone())
    run = engine.train(config(epochs=2, extra_share=0.5), splits=replace(base, extra=extra))
    assert all(len(run.memory[name]) == 70 for name in STORES)
    first = torch.full_like(run.memory["momentum"][64:], 0)
    assert not torch.equal(run.memory["momentum"][64:], first)


def test_a_loop_that_forgot_before_step_is_told() -> None:
    made = case()
    with pytest.raises(ValueError, match="fgsm_pgi: state.memory has no 'perturbations': before each step call"):
        FGSMPGI(EPS).loss(made.model.train(), made.batch, made.key)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weight": -1.0}, "weight must be a number >= 0"),
        ({"decay": float("inf")}, "decay must be a number >= 0"),
        ({"reset": 0.0}, "reset must be a number > 0 and <= 1"),
        ({"store": "float16"}, "store must be one of 'float32', 'bfloat16'"),
        ({"code": "both"}, "code must be one of 'authors', 'fastat'"),
        ({"norm": "l2"}, "the method is of the l_inf ball alone"),
    ],
)
def test_what_cannot_be_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FGSMPGI(EPS, **setting)


def test_sixteen_bits_train_as_well() -> None:
    runs: Iterator[Run] = (
        engine.train(config(epochs=8, hyper={"store": kind}), splits=splits()) for kind in ("float32", "bfloat16")
    )
    wide, narrow = runs
    assert narrow.memory["momentum"].dtype == torch.bfloat16
    assert abs(wide.history[-1]["adv"] - narrow.history[-1]["adv"]) < 0.15
