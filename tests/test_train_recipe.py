"""Settings of a modern recipe: smoothed labels, weight decay, clipping, schedules, warm-ups, mixed steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_train import engine, methods, models, optimizers, validation, watch
from atlas_train.config import TrainConfig
from atlas_train.methods import Batch, Curriculum, Method, State
from atlas_train.passes import passes_per_step
from atlas_train.run import Run
from atlas_train.schedules import learning_rate
from tiny_runs import EPS, TINY, Lines, same, splits, weights


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"probe_size": 0, "method": "adv", "hyper": {"steps": 2}} | changed)


def trained(config: TrainConfig, **more: Any) -> Run:
    return engine.train(config, splits=splits(), **more)


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
    "liet": [({"smoothing": 0.0}, of_given)],  # else the share spreads at random in its own way
} | dict.fromkeys(("standard", "backward_smoothing", "cure", "jacobian", "gat", "nuat"), [({}, of_clean)])


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
        plain.before_step(model, batch, noise_key(), state)
        given = plain.prepare(model, batch, noise_key(), state)
        expected, _ = plain.objective(model, batch, given)
        for weight, each, logits in smoothed(plain, model, batch, given):
            log_p = logits.log_softmax(1)
            gap = share * (log_p.gather(1, batch.y[:, None])[:, 0] - log_p.mean(1))
            expected = expected + weight * (gap * (1 if each is None else each)).mean()
        loss, _ = method.objective(model, batch, given)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        weight = next(model.parameters())
        mine, theirs = (torch.autograd.grad(each, weight)[0] for each in (loss, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
        assert method.in_use() == plain.in_use()  # it is the run's, and no hyper-parameter


def test_awp_is_around_smoothed_labels() -> None:
    built = config(awp=0.01, label_smoothing=0.2).build_method()
    assert isinstance(built, methods.AWP) and built.method.label_smoothing == built.label_smoothing == 0.2


# ---- weight decay and clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_spares_norms_and_biases_on_demand(optimizer: str) -> None:
    """A step on gradients of zero is decay alone."""
    for decay_norms in (True, False):
        model = models.build("digits_net", num_classes=4, in_channels=1, width=4)
        settings = config(optimizer=optimizer, lr=0.1, weight_decay=0.1, decay_norms=decay_norms)
        made = optimizers.make(settings, model)
        for weight in model.parameters():
            weight.data.add_(1.0)  # biases begin at 0
            weight.grad = torch.zeros_like(weight)
        before = [weight.detach().clone() for weight in model.parameters()]
        made.step()
        for weight, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(weight, old) == (weight.dim() <= 1 and not decay_norms)


def test_a_run_goes_on_with_the_decay_that_it_began_with(tmp_path: Path) -> None:
    settings = config(optimizer="sgd", lr=0.05, weight_decay=5e-3, decay_norms=False, epochs=2)
    whole = trained(settings)
    assert not same(weights(whole.model), weights(trained(replace(settings, decay_norms=True)).model))
    trained(settings, folder=tmp_path, on_epoch=lambda row: True)
    resumed = trained(replace(settings, resume=str(tmp_path)))
    assert same(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match="another decay_norms: it has False, you gave True"):
        trained(replace(settings, resume=str(tmp_path), decay_norms=True))


@pytest.mark.parametrize("method", ["adv", "free", "yopo"])
def test_gradients_longer_than_clip_norm_are_scaled_to_it_in_every_update(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.SGD.step

    def seen(optimizer: torch.optim.SGD, *args: Any) -> Any:
        grads = [w.grad for group in optimizer.param_groups for w in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", seen)
    how = {"method": method, "hyper": {}, "epochs": 1, "optimizer": "sgd", "lr": 1e-4}
    trained(config(**how))
    free, few = norms[:], sorted(norms)[len(norms) // 2]
    norms.clear()
    run = trained(config(clip_norm=few, **how))
    assert len(norms) == 4 * run.method.updates and max(free) > few
    clipped = [min(norm, few) for norm in free]
    assert norms[: len(norms) // 2] == pytest.approx(clipped[: len(norms) // 2], rel=0.02)
    assert max(norms) <= few * 1.0001
    assert same(weights(trained(config(clip_norm=1e6, **how)).model), weights(trained(config(**how)).model))


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "peak"), [(20, 0.3), (101, 0.45), (7, 0.3)])
def test_one_cycle_is_that_of_torch(total: int, peak: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total, pct_start=peak)
    for step in range(total):
        assert learning_rate("one_cycle", 0.2, step, total, peak) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


@pytest.mark.parametrize("step", ["epoch", "batch"])
def test_rate_and_momentum_of_a_run_are_those_that_torch_sets(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OneCycleLR with its defaults, momentum 0.95 -> 0.85 -> 0.95, stepped once an epoch or once a batch."""
    batches, epochs = len(splits().train) // 16, 7
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9)
    total = epochs * (1 if step == "epoch" else batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
    expected = []
    for number in range(1, epochs * batches + 1):
        expected.append((schedule.get_last_lr()[0], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if number < epochs * batches and (step == "batch" or number % batches == 0):
            schedule.step()
    seen: list[tuple[float, float]] = []
    made = torch.optim.SGD.step

    def noted(optimizer: torch.optim.SGD) -> None:
        seen.extend((group["lr"], group["momentum"]) for group in optimizer.param_groups[:1])
        made(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    how = CYCLE | {"optimizer": "sgd", "lr": 0.1, "cyclic_peak": None, "schedule_step": step}
    run = trained(config(epochs=epochs, **how))
    assert np.array(seen) == pytest.approx(np.array(expected), rel=1e-12)
    assert seen[0] == pytest.approx((0.004, 0.95)) and seen[-1] == pytest.approx((4e-7, 0.95))
    assert [row["momentum"] for row in run.history] == [momentum for _, momentum in seen[batches - 1 :: batches]]
    assert min(momentum for _, momentum in seen) == pytest.approx(0.85, abs=0.01)


def test_linear_falls_evenly_and_warm_up_rises_to_the_schedule() -> None:
    assert [learning_rate("linear", 0.4, step, 4) for step in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert learning_rate("one_cycle", 0.4, 0, 1) == pytest.approx(0.4)  # nothing is wasted where there is one step
    for schedule in ("linear", "cosine", "piecewise", "constant"):
        plain = [learning_rate(schedule, 0.4, step, 10) for step in range(10)]
        warm = [learning_rate(schedule, 0.4, step, 10, warmup=4) for step in range(10)]
        assert warm == pytest.approx([rate * min(1, (step + 1) / 4) for step, rate in enumerate(plain)])
    assert [learning_rate("constant", 0.4, step, 10, warmup=1.5) for step in range(3)] == pytest.approx(
        [0.4 / 1.5, 0.4, 0.4]
    )


def test_rates_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up is in epochs, and by updates where a batch has several."""
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda o: (rates.append(o.param_groups[0]["lr"]), step(o))[1])
    trained(config(method="free", hyper={"replays": 2}, schedule="constant", lr=0.008, lr_warmup=0.5, epochs=1))
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008, 0.008, 0.008, 0.008])
    peak = trained(config(schedule="one_cycle", cyclic_peak=None, epochs=1)).config.cyclic_peak
    assert peak == 0.3 and config(schedule="one_cycle").cyclic_peak == 0.4  # where it is given


# ---- large batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["atlas", "adr", "free", "mma", "llr"])
def test_batches_of_1024(method: str) -> None:
    run = engine.train(config(method=method, hyper={}, batch_size=1024, epochs=1), splits=splits(1100))
    assert run.step == 1 and run.history[0]["loss"] > 0


# ---- eps warm-up -----------------------------------------------------------------------------------------------------


def test_everything_measured_in_eps_grows_with_it() -> None:
    """An attack of half the eps is the method's own with everything halved."""
    cases: dict[str, dict[str, Any]] = {
        "atlas": {"step_size": 0.08, "radius": 0.06}, "yopo": {"sigma": 0.02}, "mma": {"d_max": 0.2, "min_eps": 0.02},
        "llr": {}, "cure": {}, "free": {"step_size": 0.05}, "adv": {},
    }  # fmt: skip
    for name, lengths in cases.items():
        built = Curriculum(methods.build(name, EPS, lengths), eps_warmup=1)
        half = {key: value / 2 for key, value in lengths.items()}
        assert built.now(State(epoch=0)) == methods.build(name, EPS / 2, half)
        assert built.now(State(epoch=1)) is built.now(State(epoch=7)) is built.method
        assert built.in_use() == built.method.in_use() and built.eps == EPS
    adv = Curriculum(methods.build("adv", EPS), eps_warmup=3)
    assert [adv.now(State(epoch=epoch)).eps / EPS for epoch in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("name", methods.names())
def test_lengths_are_all_that_has_one(name: str) -> None:
    """What a data set's defaults or a hyper-parameter's name say is a length; LLR's step is one of Adam's."""
    method = methods.get(name)
    declared = {key for values in method.defaults.values() for key, v in values.items() if isinstance(v, methods.OfEps)}
    named = {
        key for key in methods.hyper_parameters(method) if key in ("step_size", "radius", "sigma", "d_max", "min_eps")
    }
    assert declared | named == set(method.lengths) & set(methods.hyper_parameters(method)) or name == "llr"


def test_eps_grows_over_epochs_in_attack_and_log_and_evaluation_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    radii, probed = [], []
    objective, attack = methods.ADV.objective, validation.PGD

    def seen(method: methods.ADV, model: nn.Module, batch: Batch, given: Tensor) -> Any:
        radii.append((given - batch.x).abs().max().item())
        return objective(method, model, batch, given)

    def made(eps: float, *steps: Any, **how: Any) -> Any:
        probed.append(eps)
        return attack(eps, *steps, **how)

    monkeypatch.setattr(methods.ADV, "objective", seen)
    monkeypatch.setattr(validation, "PGD", made)
    run = trained(config(eps_warmup=2, epochs=4, probe_size=8))
    expected = [EPS * min(1.0, epoch / 3) for epoch in range(1, 5) for _ in range(4)]
    assert radii == pytest.approx(expected, abs=1e-6)
    assert probed == pytest.approx([EPS] * 8, abs=1e-6)
    assert [row.get("eps") for row in run.history] == pytest.approx([EPS / 3, 2 * EPS / 3, None, None])


def test_the_smaller_eps_of_a_warm_up_is_no_sign_of_a_collapse() -> None:
    assert watch.collapse({"adv": 0.9, "probe": 0.2}, [])
    assert watch.collapse({"adv": 0.9, "probe": 0.2, "eps": EPS / 3}, []) is None


# ---- mixed steps -----------------------------------------------------------------------------------------------------


def test_mixed_batches_are_a_share_by_seed_and_step() -> None:
    method = Curriculum(methods.build("atlas", EPS, {"step_size": 0.02}), mix_share=0.3, seed=4)
    kinds = [method.now(State(step=step)).in_use()["steps"] for step in range(2000)]
    assert set(kinds) == {1, 10} and kinds.count(10) / 2000 == pytest.approx(0.3, abs=0.03)
    assert method.now(State(step=kinds.index(10))).in_use()["step_size"] == pytest.approx(2.5 * EPS / 10)
    assert method.now(State(step=kinds.index(1))).in_use()["step_size"] == 0.02
    again = Curriculum(method.method, mix_share=0.3, seed=4)
    other = Curriculum(method.method, mix_share=0.3, seed=5)
    assert [again.now(State(step=step)).in_use()["steps"] for step in range(2000)] == kinds
    assert [other.now(State(step=step)).in_use()["steps"] for step in range(2000)] != kinds


@pytest.mark.parametrize("name", methods.names())
def test_a_method_mixes_or_says_that_it_cannot(name: str) -> None:
    settings = {"method": name, "hyper": {}, "mix_share": 0.5, "mix_steps": 3, "epochs": 1}
    of_one_step = ("n_fgsm", "grad_align", "liet", "fgsm_pgi", "fgsm_uap", "nuat", "gat", "stored_adv")
    if name in ("standard", "free", "yopo", "cure", "jacobian", *of_one_step):
        with pytest.raises(ValueError, match=f"mix_share needs a method that attacks in steps.*{name} is not: set"):
            config(**settings)
        return
    method = config(**settings).build_method()
    kinds = {kind.now(State(step=step)).in_use().get("steps", 1) for step in range(20) for kind in [method]}
    assert kinds == {3, method.method.in_use().get("steps", 1)}
    run = trained(config(**settings))
    assert run.history[0]["loss"] > 0


def test_one_step_adv_mixed_is_adv() -> None:
    made = methods.build("one_step_adv", EPS, {"attack_mode": "eval"}, 0.1).with_steps(4)
    assert made == methods.build("adv", EPS, {"steps": 4, "attack_mode": "eval"}, 0.1)


@pytest.mark.parametrize("name", ["atlas", "one_step_adv"])
def test_a_wide_start_is_of_the_batches_in_one_step_alone(name: str) -> None:
    mixed = config(method=name, hyper={"wide_start": 2.0}, mix_share=0.5, mix_steps=3, epochs=1)
    kinds = [part.in_use() for _, part in mixed.build_method().parts(State())]
    assert [(kind.get("steps", 1), kind.get("wide_start", 0.0)) for kind in kinds] == [(1, 2.0), (3, 0.0)]
    assert mixed.build_method().in_use()["wide_start"] == 2.0
    trained(mixed)


def test_passes_of_mixed_batches_are_the_mean() -> None:
    run = trained(config(method="one_step_adv", hyper={}, mix_share=0.25, mix_steps=3, epochs=1))
    one, three = (
        passes_per_step(trained(config(method="adv", hyper={"steps": steps}, epochs=1))) or 0 for steps in (1, 3)
    )
    assert passes_per_step(run) == pytest.approx(0.75 * one + 0.25 * three)


# ---- all of it together ----------------------------------------------------------------------------------------------

CYCLE = {"schedule": "one_cycle", "schedule_step": "epoch", "momentum": 0.95, "momentum_low": 0.85, "lr_warmup": 0}
ALL: dict[str, Any] = {
    "label_smoothing": 0.1, "decay_norms": False, "weight_decay": 1e-3, "clip_norm": 1.0, "schedule": "linear",
    "lr_warmup": 1.5, "eps_warmup": 2, "mix_share": 0.4, "mix_steps": 3, "averaging": "ema", "optimizer": "sgd",
    "lr": 0.05, "epochs": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "how", [{}, {"awp": 0.01, "awp_warmup": 1}, {"train_precision": "bf16"}, {"method": "atlas", "hyper": {}}, CYCLE]
)
def test_a_killed_run_goes_on_to_the_bit(how: dict[str, Any], tmp_path: Path) -> None:
    settings = config(**ALL | how)
    whole = trained(settings)
    assert all(row["loss"] > 0 for row in whole.history)
    trained(settings, folder=tmp_path, on_epoch=lambda row: row["epoch"] == 2)
    resumed = trained(replace(settings, resume=str(tmp_path)))
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.final_model), weights(whole.final_model))
    assert resumed.changes == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label_smoothing", 1.0, "must be a number >= 0 and < 1, got 1.0; write 0.1 for a tenth"),
        ("clip_norm", -1.0, "must be a number >= 0, got -1.0; 0: no limit"),
        ("decay_norms", "some", "must be true or false, got 'some'"),
        ("schedule", "onecycle", "must be one of 'cyclic', 'piecewise', 'cosine', 'linear', 'one_cycle'"),
        ("lr_warmup", -2, "must be a number >= 0, got -2"),
        ("lr_warmup", 4, "must be less than epochs, 4, .* got 4: set fewer, or more epochs"),
        ("lr_warmup", 1, "has no place before schedule='cyclic', .* choose schedule cosine"),
        ("eps_warmup", 4, "must be less than epochs, 4, .* got 4: set fewer, or more epochs"),
        ("eps_warmup", 1.5, "must be an integer >= 0, got 1.5; whole epochs"),
        ("mix_share", 1.0, "must be a number >= 0 and < 1, got 1.0; write 0.1 for a tenth"),
        ("mix_steps", 0, "must be an integer >= 1, got 0"),
        ("ema_warmup", 3, "must be true or false, got 3"),
        ("ema_decay", 1.0, "must be a number >= 0 and < 1, got 1.0"),
        ("swa_start", 1.0, "must be a number >= 0 and < 1, got 1.0"),
        ("momentum_low", 1.0, "must be a number >= 0 and < 1, got 1.0; 0: momentum stays the same"),
        ("momentum_low", 0.8, "=0.8 goes with schedule='one_cycle', got 'cyclic': set momentum_low=0"),
        ("schedule_step", "step", "must be one of 'batch', 'epoch', got 'step'"),
        ("average_bn", "none", "must be one of 'average', 'clean', 'method', got 'none'"),
    ],
)
def test_nonsense_is_refused_with_a_remedy(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"config: {name}.*{message}"):
        config(**{name: value})


def test_a_momentum_that_cannot_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum_low must be at most momentum, 0.8, got 0.85"):
        config(**CYCLE | {"momentum": 0.8})
    graphs = CYCLE | {"cuda_graphs": "step", "device": None}
    assert config(**graphs).momentum_low == 0.85
    with pytest.raises(
        ValueError, match="another momentum in every batch.* set schedule_step='epoch', momentum_low=0, or"
    ):
        config(**graphs | {"schedule_step": "batch"})
    lines = Lines()
    trained(config(**CYCLE | {"optimizer": "adam", "epochs": 1}), display=lines)
    assert "WARNING: momentum_low=0.85 changes nothing, as optimizer is adam" in lines.said


def test_mixing_the_same_number_of_steps_is_said() -> None:
    lines = Lines()
    trained(config(mix_share=0.5, mix_steps=2, epochs=1), display=lines)
    assert [text for text in lines.said if "WARNING" in text] == [
        "WARNING: mix_steps=2 is the number of attack steps of adv anyway, so nothing is mixed: set another number, or "
        "mix_share=0"
    ]
    with pytest.raises(ValueError, match="gairat: steps must be an integer >= 2, got 1"):
        config(method="gairat", hyper={}, mix_share=0.5, mix_steps=1)
