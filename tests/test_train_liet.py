"""LIET does what its published code does, to 1e-9, over two epochs, whatever it remembers and whenever it renews it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels.backends.reference.philox import below, noise, words
from atlas_train import config, data
from atlas_train.data import UpTo
from atlas_train.methods import LIET, Batch, Mixing, State
from beside_published import CLASSES, EPS, Case, Net, Outcome, Steps, _note, assert_same, case, close
from published import liet as published
from resume import resumed_and_whole

SMALL = 8 / 255


def numbers(key: Tensor, ids: Tensor, draw: int) -> Tensor:
    """Uniform in [0, 1], of the step's key: for a random smoothing."""
    return (noise((len(ids), 1, CLASSES), key, ids, draw, 0, 0, torch.float64)[:, 0] + 1 + 2.0**-24) / 2


def start_draws(key: Tensor, batch: Batch, eps: float, low: float, high: float) -> dict[str, Any]:
    """Which pixels are replaced and by what, and the sign: the words of noise, read anew."""
    shape = len(batch.x), 3, 36
    word = words(shape, key, batch.ids, 0, 3, 0).view(batch.x.shape)
    one, two = words((1, 1, 1), key, torch.zeros(1, dtype=torch.int64), 0, 3, 1)[0, 0, :2]
    share = round(4096 * low) + int(below(one, round(4096 * high) - round(4096 * low) + 1))
    uniform = ((word + 2**19) % 2**20 - 2**19).double() / 2**19
    return {"replaced": word >> 20 < share, "uniform": eps * uniform, "minus": int(two) >= 2**31}


def both(made: Case, method: LIET, every: int, how: dict[str, Any], low: float, high: float) -> None:
    """Two epochs of two batches by ours and by theirs."""
    mine, theirs = (copy.deepcopy(made.model).train() for _ in "12")
    my_steps, their_steps = Steps(mine), Steps(theirs)
    state, label_noise = State(total_steps=4, epochs=2), None
    weight = how.pop("weight")
    images: dict[str, list[Tensor]] = {"mine": [], "theirs": []}
    for name, model in (("mine", mine), ("theirs", theirs)):
        model.register_forward_pre_hook(lambda module, args, seen=images[name]: _note(seen, module, args[0]))
    for step in range(4):
        batch = Batch(*(t[4 * (step % 2) :][:4] for t in made.batch))
        key, state.step, state.epoch = made.key + step, step, step // 2
        if step % 2 % every == 0:
            label_noise = published.label_noise(
                theirs, batch.x, numbers(key, torch.arange(CLASSES), 1), eps=how["eps"], smoothing=how["smoothing"],
                classes=CLASSES,
            )  # fmt: skip
        drawn = start_draws(key, batch, (2 if how["large"] else 1) * how["eps"], low, high)
        adv, expected = published.liet(
            theirs, batch.x, batch.y, None, their_steps, noise=label_noise, **drawn, **how,
            numbers=[numbers(key, batch.ids, draw) for draw in (2, 3)], cur_lambda=weight * (state.epoch + 1) / 2,
        )  # fmt: skip
        loss, _ = method.step(mine, batch, key, state, my_steps)
        close(images["mine"][-1], adv, "x'")
        close(state.memory["label_noise"], label_noise, "label noise")
        assert_same(
            Outcome(loss, my_steps.grads, mine, []), Outcome(expected, their_steps.grads, theirs, []), statistics=True
        )


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("eps", [SMALL, EPS])
def test_liet(eps: float, every: int) -> None:
    large = eps > SMALL
    low, high = (0.0, 1.0) if large else (0.1, 0.5)
    how = {"eps": eps, "large": large, "smoothing": 0.4 if large else 0.6, "weight": 20.0 if large else 100.0}
    both(case(), LIET(eps, every=every), every, how, low, high)


def test_liet_with_options() -> None:
    how = {"eps": SMALL, "large": False, "smoothing": 0.3, "weight": 7.0}
    method = LIET(SMALL, every=1, smoothing=0.3, weight=7.0, share_low=0.25, share_high=0.25)
    both(case(seed=1), method, 1, how, 0.25, 0.25)


class Logits(nn.Module):
    """A network that gives an object with its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"logits": self.net(x)})()


def test_a_network_that_gives_an_object_with_logits() -> None:
    made, losses = case(), []
    for wrap in (nn.Identity(), None):
        model = copy.deepcopy(made.model)
        model = (Logits(model) if wrap is None else model).train()
        losses.append(LIET(SMALL).step(model, made.batch, made.key, State(), Steps(model))[0])
    assert torch.equal(*losses)


def test_gray_images_come_in_chunks_of_a_batch_and_leave_the_network_alone() -> None:
    """Two images a batch and five classes: the noise is that of one forward, and nothing of the network moves."""
    made = case()
    before = copy.deepcopy(made.model.train().state_dict())
    sizes: list[int] = []
    made.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    states = [State(), State()]
    for state, size in zip(states, (2, 8), strict=True):
        small = Batch(*(t[:size] for t in made.batch))
        LIET(SMALL).before_step(made.model, small, made.key, state)
    assert sizes == [1, 2, 2, 1, 1, 5]
    chunks, whole = (state.memory["label_noise"] for state in states)
    assert torch.equal(chunks, whole) and set(whole.unique().tolist()) == {-SMALL, SMALL}
    assert made.model.training and all(map(torch.equal, before.values(), made.model.state_dict().values()))


def test_the_noise_is_renewed_in_its_place_and_on_time() -> None:
    """Every two batches from the first of an epoch of three; a graph goes on reading the same tensor."""
    made, method = case(), LIET(SMALL, every=2)
    state, renewed = State(total_steps=6, epochs=2), []
    for step in range(6):
        state.step = step
        before = state.memory.get("label_noise")
        kept = None if before is None else before.clone()
        with torch.no_grad():
            made.model.linear.weight.add_(torch.randn_like(made.model.linear.weight))
        method.before_step(made.model, made.batch, made.key, state)
        assert before is None or state.memory["label_noise"] is before
        renewed.append(kept is None or not torch.equal(kept, state.memory["label_noise"]))
    assert renewed == [True, False, True, True, False, True]


def test_random_labels_spread_over_the_wrong_classes_anew_at_every_call() -> None:
    made, method = case(), LIET(SMALL, smoothing=0.6)
    z = torch.zeros(8, CLASSES, dtype=torch.float64)
    first, second = (method._targets(z, made.batch.y, made.key, made.batch.ids, draw) for draw in (2, 3))
    for targets in (first, second):
        torch.testing.assert_close(targets.sum(1), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(targets.gather(1, made.batch.y[:, None]), torch.full((8, 1), 0.4).double())
        assert (targets > 0).all() and targets.std(1).min() > 0
    assert not torch.isclose(first, second).all()
    two = method._targets(z[:, :2], made.batch.y % 2, made.key, made.batch.ids, 2)
    torch.testing.assert_close(two.amin(1), torch.full((8,), 0.4).double())


def test_defaults_by_radius_and_data_set() -> None:
    small, large = LIET(SMALL).in_use(), LIET(2 * SMALL).in_use()
    assert [small[n] for n in ("weight", "smoothing", "share_low", "share_high", "noise_magnitude")] == [
        100, 0.6, 0.1, 0.5, 1,
    ]  # fmt: skip
    assert [large[n] for n in ("weight", "smoothing", "share_low", "share_high", "noise_magnitude")] == [
        20, 0.4, 0, 1, 2,
    ]  # fmt: skip
    assert LIET(SMALL, label_smoothing=0.4).in_use()["smoothing"] == 0.6
    every = LIET.defaults["cifar10"]["every"]
    assert isinstance(every, UpTo) and (every.at(SMALL), every.at(16 / 255)) == (20, 10)
    assert LIET.defaults["cifar100"]["weight"].at(SMALL) == 200 and LIET.defaults["cifar100"]["smoothing"].at(1) == 0.4


def test_a_smaller_radius_of_a_warm_up_keeps_the_settings_of_the_whole() -> None:
    scaled = LIET(2 * SMALL, step_size=2 * SMALL).scaled(0.25)
    expected = LIET(2 * SMALL, step_size=0.5 * SMALL, project="no").in_use()
    assert scaled.eps == SMALL / 2 and scaled.in_use() == expected
    assert LIET(SMALL).scaled(0.5).in_use()["project"] == "yes"


@pytest.mark.parametrize(("eps", "every"), [(SMALL, 20), (16 / 255, 10)])
def test_a_run_on_cifar10_has_the_defaults_of_its_radius(eps: float, every: int) -> None:
    settings = config.TrainConfig(method="liet", dataset="cifar10", eps=eps, beside=())
    filled = config._published(settings, data.get("cifar10"))
    assert filled == {"liet.every": every}
    assert replace(settings, hyper=filled).build_method().in_use()["every"] == every


def test_random_smoothing_is_in_the_place_of_the_runs() -> None:
    """Which counts where there is none."""
    made, z = case(), torch.zeros(8, CLASSES, dtype=torch.float64)

    def targets(**how: float) -> Tensor:
        return LIET(SMALL, **how)._targets(z, made.batch.y, made.key, made.batch.ids, 2)

    assert torch.equal(targets(label_smoothing=0.4), targets())
    uniform = 0.8 * F.one_hot(made.batch.y, CLASSES).double() + 0.2 / CLASSES
    torch.testing.assert_close(targets(label_smoothing=0.2, smoothing=0.0), uniform)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="liet: share_low is 0.6 and share_high 0.5: give a low one"):
        LIET(SMALL, share_low=0.6)
    with pytest.raises(ValueError, match="mixup cannot be had with liet, which starts from the noise of"):
        Mixing(LIET(SMALL), "mixup")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="liet: weight must be a number >= 0, got"):
            LIET(SMALL, weight=bad)
    made = case()
    with pytest.raises(ValueError, match="liet: state.memory has no 'label_noise': before each step call before_step"):
        LIET(SMALL).loss(made.model, made.batch, made.key, State())
    one = Net().double()
    one.linear = nn.Linear(72, 1).double()
    with pytest.raises(ValueError, match=r"model returns logits \[1, 1\], of one class, and the method needs two"):
        LIET(SMALL).step(one.train(), made.batch, made.key, State(), Steps(one))
    with pytest.raises(TypeError, match=r"model must return logits \[1, classes\], got shape \[1, 8, 3, 3\]"):
        LIET(SMALL).before_step(one.conv2, Batch(torch.rand(4, 6, 6, 6).double(), *made.batch[1:]), made.key, State())
    with pytest.raises(
        ValueError, match=r"memory label_noise is torch.float32 \[5, 3, 8, 8\], expected floats of an im"
    ):
        LIET(SMALL).require_memory({"label_noise": torch.zeros(5, 3, 8, 8)}, (50, 3, 6, 6))
    LIET(SMALL).require_memory({"label_noise": torch.full((5, 3, 6, 6), SMALL)}, (50, 3, 6, 6))
    for bad in (2 * SMALL, float("nan")):
        with pytest.raises(ValueError, match="memory label_noise must be perturbations within eps"):
            LIET(SMALL).require_memory({"label_noise": torch.full((5, 3, 6, 6), bad)}, (50, 3, 6, 6))
    for classes in (CLASSES - 1, CLASSES + 1):
        memory = {"label_noise": torch.zeros(classes, 3, 6, 6).double()}
        with pytest.raises(ValueError, match=f"memory label_noise is of {classes} classes, the network of {CLASSES}"):
            LIET(SMALL).before_step(made.model, made.batch, made.key, State(memory=memory))


def test_a_resumed_run_comes_to_the_same_bits(tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole("liet", {"every": 2}, tmp_path)
    assert resumed.keys() == whole.keys() and any(name.startswith("memory.") for name in whole)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
