"""stored_adv does what it says, beside the same written out, over two epochs with crops and flips; 3 passes; what it
keeps survives a stop; and it makes a network robust."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_kernels import noise_key
from atlas_train import data, engine
from atlas_train.config import TrainConfig
from atlas_train.data import Images
from atlas_train.evaluate import evaluate
from atlas_train.methods import Batch, State, StoredADV
from atlas_train.methods.views import Views
from atlas_train.passes import passes_per_step
from beside_published import EPS, Outcome, Steps, assert_same, case, close
from published import stored_adv as written_out
from resume import resumed_and_whole
from tiny_runs import TINY, same, splits

IMAGES = 12
STORES = StoredADV.stores


def views_of(batch: Batch, key: Tensor) -> list[tuple[int, int, bool]]:
    """Where each image's view begins, and whether it is mirrored, as an image of coordinates shows."""
    height, width = batch.x.shape[-2:]
    places = torch.arange(1.0, 1 + height * width, dtype=torch.float64).view(1, 1, height, width)
    found = []
    for seen in Views(batch, key).of(places.expand(len(batch.x), 1, height, width))[:, 0]:
        i, j = seen.nonzero()[0].tolist()
        row, column = divmod(int(seen[i, j]) - 1, width)
        beside = seen[i, j + 1] if j + 1 < width and seen[i, j + 1] else None
        mirrored = beside is not None and beside < seen[i, j]
        assert beside is not None
        found.append((row - i, column + j - (width - 1) if mirrored else column - j, bool(mirrored)))
    return found


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"local_weight": 0.5, "step_size": EPS / 2, "reset": 0.5},
        {"local_weight": 2.0, "local_objective": "kl", "decay": 0.0, "replays": 2},
    ],
    ids=["plain", "logit", "kl"],
)
def test_two_epochs_beside_the_same_written_out(hyper: dict[str, Any], augment: bool) -> None:
    """Batches of 8 and 4 of 12 images, in another order in each epoch."""
    made = case(IMAGES)
    mine, theirs = (copy.deepcopy(made.model).train() for _ in "12")
    my_steps, their_steps = Steps(mine), Steps(theirs)
    state = State(total_steps=4, epochs=2, size=IMAGES, augment=augment)
    method = StoredADV(EPS, label_smoothing=0.2, **hyper)
    kept: dict[str, Tensor] = {}
    for step in range(4):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step // 2))
        rows = order[8 * (step % 2) :][:8]
        batch = Batch(made.batch.x[rows], made.batch.y[rows], rows)
        state.step, state.epoch, key = step, step // 2, made.key + step
        method.before_step(mine, batch, key, state)
        if not kept or (step == 2 and "reset" in hyper):
            logits = kept.get("logits", state.memory["logits"])
            kept = {name: state.memory[name].clone() for name in STORES} | {"logits": logits.clone()}
            assert (kept["perturbations"].abs() == EPS).all() and not kept["momentum"].any()
        loss, _ = method.train_step(mine, batch, key, state, my_steps)
        _, expected = written_out.stored_adv(
            theirs, batch.x, batch.y, None, their_steps, idx=rows, eps=EPS, step_size=hyper.get("step_size", EPS),
            decay=hyper.get("decay", 0.3), weight=hyper.get("local_weight", 0.0),
            distance=hyper.get("local_objective", "logit"), smoothing=0.2, replays=hyper.get("replays", 1),
            views=views_of(batch, key) if augment else None, **kept,
        )  # fmt: skip
        for name in STORES:
            assert torch.equal(state.memory[name].isnan(), kept[name].isnan())
            close(state.memory[name].nan_to_num(), kept[name].nan_to_num(), name)
        assert_same(
            Outcome(loss, my_steps.grads, mine, []), Outcome(expected, their_steps.grads, theirs, []), statistics=True
        )


def test_views_are_crops_and_flips_and_their_way_back_is_the_adjoint() -> None:
    torch.manual_seed(0)
    x, ids = torch.rand(400, 3, 8, 6), torch.arange(400)
    views = Views(Batch(x, ids, ids), noise_key())
    seen = views.of(x)
    padded = F.pad(x, (4,) * 4)
    drawn = views_of(Batch(x, ids, ids), torch.zeros(2, dtype=torch.int64))
    assert {row for row, _, _ in drawn} == {column for _, column, _ in drawn} == set(range(-4, 5))
    assert 140 < sum(mirrored for _, _, mirrored in drawn) < 260
    views = Views(Batch(x, ids, ids), torch.zeros(2, dtype=torch.int64))
    for image, view, (row, column, mirrored) in zip(padded, views.of(x), drawn, strict=True):
        crop = image[:, 4 + row : 12 + row, 4 + column : 10 + column]
        assert torch.equal(view, crop.flip(-1) if mirrored else crop)
    g = torch.randn(seen.shape, dtype=torch.float64)
    assert (views.of(x.double()) * g).sum().item() == pytest.approx((x.double() * views.back(g)).sum().item())
    last = x.to(memory_format=torch.channels_last)
    assert views.of(last).is_contiguous(memory_format=torch.channels_last) and torch.equal(views.of(last), views.of(x))


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"method": "stored_adv"} | changed)


def test_the_run_leaves_crops_and_flips_to_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    images, asked = splits(), []
    seen = Views.of
    monkeypatch.setattr(Views, "of", lambda views, x: asked.append(len(x)) or seen(views, x))
    run = engine.train(config(epochs=1, augment=True, mixup=0.0), splits=images)
    batch = next(iter(run.batches))
    assert torch.equal(batch.x, images.train.images[batch.ids].float() / 255) and len(asked) == 4
    engine.train(config(epochs=1, augment=False, cutmix=0.5), splits=images)
    assert len(asked) == 4
    assert engine.train(config(epochs=1, augment=True, method="fgsm_pgi"), splits=images).batches.augment


def test_a_step_takes_three_passes_and_counting_leaves_what_is_kept_alone() -> None:
    run = engine.train(config(epochs=1), splits=splits())
    kept = {name: (value, value.clone()) for name, value in run.memory.items()}
    assert {*kept} == {*STORES} and run.memory["logits"].shape == (64, 4) and not run.memory["logits"].isnan().any()
    assert passes_per_step(run) == pytest.approx(3, abs=0.3)
    assert all(run.memory[name] is value and torch.equal(value, was) for name, (value, was) in kept.items())


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    mine, whole = resumed_and_whole("stored_adv", {"local_weight": 0.5, "reset": 0.5}, tmp_path)
    assert {f"memory.{name}" for name in STORES} <= set(mine) and same(mine, whole)


def test_digits_become_robust_well_above_standard_training() -> None:
    digits = data.load("digits")

    def robust(method: str) -> float:
        settings = TrainConfig(
            method, dataset="digits", train_size=600, epochs=8, width=4, lr=0.02, probe_size=0, beside=(), device="cpu",
            threads=1, optimizer="adam", weight_decay=0.0, val_size=0,
        )  # fmt: skip
        run = engine.train(settings, splits=digits)
        return evaluate(run.model, digits.test, 0.1, size=200, steps=10).pgd

    assert robust("stored_adv") > robust("standard") + 0.2


def test_an_image_that_a_batch_holds_twice_keeps_the_logits_of_its_first_place() -> None:
    """Extra images are drawn with replacement."""
    made = case(4)
    ids = torch.tensor([3, 1, 3, 1])
    state = State(size=6, repeats=True)
    StoredADV(EPS).step(made.model.train(), made.batch._replace(ids=ids), made.key, state, Steps(made.model))
    apart = State(size=4, memory={name: value[[0, 1, 2, 3]] for name, value in state.memory.items()})
    assert apart.memory["logits"].isnan().any(1).tolist() == [True, False, True, False]
    base = splits()
    extra = Images(base.train.images[:6].clone(), base.train.labels[:6].clone())
    run = engine.train(config(epochs=2, extra_share=0.5), splits=replace(base, extra=extra))
    assert all(len(run.memory[name]) == 70 for name in STORES)


def test_memory_of_another_kind_is_refused() -> None:
    shape = (64, 1, 8, 8)
    good = {name: torch.zeros(shape) for name in STORES[:2]} | {"logits": torch.full((64, 4), torch.nan)}
    method = StoredADV(EPS)
    method.require_memory(good, shape)
    method.require_memory({}, shape)
    assert method.store_bytes((50_000, 3, 32, 32)) == 2 * 50_000 * 3072 * 4
    for bad, match in (
        ({name: good[name] for name in STORES[:2]}, "perturbations without logits"),
        ({"logits": good["logits"]}, "logits without perturbations"),
        (good | {"logits": good["logits"][1:]}, r"expected floats \[64, C\]"),
        (good | {"logits": torch.zeros(64, 4).int()}, r"expected floats \[64, C\]"),
        (good | {"logits": torch.full((64, 4), torch.inf)}, r"expected floats \[64, C\]"),
        (good | {"perturbations": good["perturbations"] + 2 * EPS}, "within eps"),
    ):
        with pytest.raises(ValueError, match=match):
            method.require_memory(bad, shape)
