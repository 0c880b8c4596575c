"""FGSM-UAP and FGSM-CUAP do what the published code does, to 1e-9, over two epochs, with what they remember."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.backends.reference.philox import noise
from atlas_train.methods import FGSMUAP, Batch, Mixing, State
from beside_published import CLASSES, EPS, Net, Outcome, Steps, _note, assert_same, case, close
from published import fgsm_uap as published
from resume import resumed_and_whole


def first_perturbation(key: Tensor, radius: float, count: int) -> Tensor:
    u = noise((count, 3, 36), key, torch.arange(count), 1, 0, 0, torch.float64).view(count, 3, 6, 6)
    return radius * torch.where(u < 0, -1.0, 1.0).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("per_class", [False, True])
def test_fgsm_uap(per_class: bool, smoothing: float) -> None:
    made = case()
    made.batch.y[:4] = torch.tensor([3, 3, 0, 3])  # the first batch has no image of most classes
    mine, theirs = (copy.deepcopy(made.model).train() for _ in "12")
    my_steps, their_steps, state = Steps(mine), Steps(theirs), State(total_steps=4, epochs=2)
    method, radius = FGSMUAP(EPS, per_class=per_class, label_smoothing=smoothing), 1.25 * EPS
    uaps = first_perturbation(made.key, radius, CLASSES if per_class else 1)
    uaps = uaps if per_class else uaps[0]
    momentum = torch.zeros_like(uaps)
    images: list[Tensor] = []
    mine.register_forward_pre_hook(lambda module, args: _note(images, module, args[0]))
    for step in range(4):
        batch = Batch(*(t[4 * (step % 2) :][:4] for t in made.batch))
        state.step, state.epoch = step, step // 2
        adv, expected = published.fgsm_uap(
            theirs, batch.x, batch.y, None, their_steps, uaps=uaps, momentum=momentum, per_class=per_class, eps=EPS,
            uap_eps=radius, smoothing=smoothing,
        )  # fmt: skip
        loss, _ = method.step(mine, batch, made.key + step, state, my_steps)
        close(images[-1], adv, "x'")
        for name, kept in (("perturbation", uaps), ("momentum", momentum)):
            close(state.memory[name], kept.view(-1, 3, 6, 6), name)
        assert_same(
            Outcome(loss, my_steps.grads, mine, []), Outcome(expected, their_steps.grads, theirs, []), statistics=True
        )


def remembered(method: FGSMUAP, grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = case()
    state = State()
    method.before_step(made.model, made.batch, made.key, state)
    before = [state.memory[name].clone() for name in ("perturbation", "momentum")]
    batch = made.batch._replace(y=y)
    method.adversary(batch, batch.x, None, grad, made.key, state)
    return (*before, state.memory["perturbation"], state.memory["momentum"])


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_says_nothing_leaves_all_as_it_was(per_class: bool, value: float) -> None:
    grad = torch.zeros(8, 3, 6, 6, dtype=torch.float64)
    grad[3, 1, 2, 2] = value
    y = torch.arange(8) % CLASSES
    u, m, new_u, new_m = remembered(FGSMUAP(EPS, per_class=per_class), grad, y)
    assert torch.equal(u, new_u) and torch.equal(m, new_m)


def test_a_class_without_images_keeps_its_own() -> None:
    y = torch.tensor([1, 1, 3, 3, 3, 1, 3, 3])
    u, m, new_u, new_m = remembered(FGSMUAP(EPS, per_class=True), torch.randn(8, 3, 6, 6).double(), y)
    for c in range(CLASSES):
        assert torch.equal(m[c], new_m[c]) == (c not in (1, 3))
        assert torch.equal(u[c], new_u[c]) or c in (1, 3)
    assert float(new_u.abs().max()) == 1.25 * EPS


def test_memory_is_an_image_and_stays_in_its_place() -> None:
    made = case()
    for per_class, count in ((False, 1), (True, CLASSES)):
        method, state = FGSMUAP(EPS, per_class=per_class), State()
        model = copy.deepcopy(made.model).train()
        method.step(model, made.batch, made.key, state, Steps(model))
        before = dict(state.memory)
        assert {name: tuple(t.shape) for name, t in before.items()} == dict.fromkeys(
            ("perturbation", "momentum"), (count, 3, 6, 6)
        )
        method.step(model, made.batch, made.key + 1, state, Steps(model))
        assert all(state.memory[name] is t for name, t in before.items())


def test_what_cannot_be_is_refused() -> None:
    made = case()
    one = Net().double()
    one.linear = nn.Linear(72, 1).double()
    with pytest.raises(ValueError, match=r"model returns logits \[1, 1\], of one class, and the method needs two"):
        FGSMUAP(EPS, per_class=True).step(one.train(), made.batch, made.key, State(), Steps(one))
    with pytest.raises(ValueError, match="cutmix cannot be had with fgsm_uap with per_class, which starts from"):
        Mixing(FGSMUAP(EPS, per_class=True), "cutmix")
    Mixing(FGSMUAP(EPS), "cutmix")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fgsm_uap: weight must be a number >= 0, got"):
            FGSMUAP(EPS, weight=bad)
    shape, good = (50, 3, 6, 6), {"perturbation": torch.zeros(1, 3, 6, 6), "momentum": torch.zeros(1, 3, 6, 6)}
    FGSMUAP(EPS).require_memory(good, shape)
    for bad_memory in (
        {**good, "momentum": torch.zeros(1, 3, 8, 8)},
        {**good, "perturbation": torch.zeros(CLASSES, 3, 6, 6)},
        {**good, "perturbation": torch.zeros(1, 3, 6, 6, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError, match=r"memory (momentum|perturbation) is torch.* expected floats of an image"):
            FGSMUAP(EPS).require_memory(bad_memory, shape)
    for bad_memory, message in (
        ({"perturbation": good["perturbation"]}, "memory has no momentum"),
        (
            {**good, "perturbation": good["perturbation"] + 2 * EPS},
            "memory perturbation must hold finite numbers, a pert",
        ),
        ({**good, "momentum": good["momentum"].log()}, "memory momentum must hold finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            FGSMUAP(EPS).require_memory(bad_memory, shape)
    unknown = made.batch._replace(y=made.batch.y + CLASSES)
    with pytest.raises(ValueError, match=r"labels\[0\] = \d is not a class: the perturbations have 5, from 0 on"):
        FGSMUAP(EPS, per_class=True).step(made.model, unknown, made.key, State(), Steps(made.model))


def test_a_resumed_run_comes_to_the_same_bits(tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole("fgsm_uap", {"per_class": True}, tmp_path)
    assert resumed.keys() == whole.keys() and any(name.startswith("memory.") for name in whole)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
