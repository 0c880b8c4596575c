"""Training and evaluation in the l2 and l1 balls: adversaries, radii, tables, and who cannot have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_kernels import PGD
from atlas_train import checkpoint, cli, data, engine, methods, validation
from atlas_train.compare import compare
from atlas_train.config import TrainConfig, resolved
from atlas_train.data import DataSplits, Images
from atlas_train.evaluate import evaluate
from atlas_train.methods import AWP, State, atlas_local
from atlas_train.stored import evaluate_checkpoint
from beside_published import case, close, ours
from tiny_runs import TINY, same, splits, weights

IN_EVERY_NORM = ("atlas", "adv", "one_step_adv", "trades", "mart", "gairat", "adr")
RADII = {"linf": 0.1, "l2": 0.8, "l1": 6.0}


def length(d: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(d.flatten(1), {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", IN_EVERY_NORM)
def test_adversaries_live_in_the_ball_of_the_norm(name: str, norm: str) -> None:
    made, eps = case(), RADII[norm]
    method = methods.build(name, eps, {} if name == "one_step_adv" else {"steps": 3}, norm=norm)
    given = method.prepare(made.model.train(), made.batch, made.key, State(epochs=1))
    adv = given if isinstance(given, Tensor) else given.images.chunk(3)[1] if name == "atlas" else given.adv
    size = length(adv - made.batch.x, norm)
    assert (size <= eps * (1 + 1e-9)).all() and (size > 0.5 * eps).all()
    assert length(adv - made.batch.x, "linf").max() > 0.15  # further than the others go in a pixel
    assert adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_adv_is_trained_on_that_attack(norm: str) -> None:
    made, eps = case(), RADII[norm]
    method = methods.build("adv", eps, {"steps": 4}, norm=norm)
    expected = PGD(eps, steps=4, norm=norm, attack_mode="train")(
        made.model.train(), made.batch.x, made.batch.y, key=made.key, ids=made.batch.ids
    )
    assert torch.equal(method.prepare(made.model, made.batch, made.key, State()), expected)
    assert method.in_use()["step_size"] == (None if norm == "l1" else pytest.approx(2.5 * eps / 4))


def test_trades_in_l2_is_its_published_adversary_but_for_the_projection() -> None:
    """The step of Zhang et al.: along the gradient of the KL over its length; here the ball comes before the range."""
    made, eps = case(), 0.5
    method = methods.build("trades", eps, {"steps": 1, "step_size": 0.3}, norm="l2")
    adv = method.prepare(made.model.train(), made.batch, made.key, State())
    start = methods.trades.near_start(made.batch, made.key).requires_grad_()
    model = made.model.eval()
    p = model(made.batch.x).softmax(1).detach()
    (grad,) = torch.autograd.grad((p * (p.log() - model(start).log_softmax(1))).sum(), start)
    moved = start.detach() + 0.3 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    close(adv, moved.clamp(0, 1), "x'")


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("local", ["neighbours", "worst"])
def test_the_local_ball_of_atlas_is_of_the_norm(local: str, norm: str) -> None:
    made, eps = case(size=32), RADII[norm]
    how = {"local": local} | ({"count": 2} if local == "neighbours" else {})
    x, adv, *points = (
        methods.build("atlas", eps, how, norm=norm)
        .prepare(made.model.train(), made.batch, made.key, State())
        .images.chunk(4 if local == "neighbours" else 3)
    )
    plain = methods.build("adv", eps, {"steps": 1, "step_size": 1.25 * eps}, norm=norm)
    assert torch.equal(x, made.batch.x) and torch.equal(adv, plain.prepare(made.model, made.batch, made.key, State()))
    ways = [point - adv for point in points]
    for way in ways:
        size = length(way, norm)
        assert (size <= eps / 2 * (1 + 1e-9)).all() and size.median() > 0.6 * eps / 2
    if local == "neighbours":  # none goes the way of another, or of the attack's start
        starts = [made.start(1.0) - x, *ways]
        for i, a in enumerate(starts):
            for b in starts[i + 1 :]:
                cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().abs()
                assert cosine < 0.1
    inside = methods.build("atlas", eps, how | {"project": True}, norm=norm)
    for point in inside.prepare(made.model, made.batch, made.key, State()).images.chunk(2 + len(points))[2:]:
        assert (length(point - x, norm) <= eps * (1 + 1e-9)).all()


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("l1", torch.inf)])
def test_the_slopes_of_atlas_are_of_the_dual_norm(norm: Any, dual: float) -> None:
    made = case()
    made.model.eval().requires_grad_(False)
    x = made.batch.x.clone().requires_grad_()
    logits, y = made.model(x), made.batch.y
    jacobian = torch.stack([torch.autograd.functional.jacobian(made.model, row[None])[0, :, 0] for row in made.batch.x])
    rival = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
    rows = torch.arange(len(y))
    slope = torch.linalg.vector_norm((jacobian[rows, y] - jacobian[rows, rival]).flatten(1), dual, 1)
    close(atlas_local.margin_penalty(logits, x, y, 0.3, norm).detach(), 0.3 * slope, "margin")
    gap = (logits[rows, y] - logits[rows, rival]).detach().clamp_min(0)
    close(atlas_local.first_order_radius(logits, x, y, 1, norm).detach(), gap / slope, "radius")
    for form in ("margin", "radius", "jacobian"):
        method = methods.build("atlas", RADII[norm], {"local": form}, norm=norm)
        assert ours(method, case()).loss.isfinite()


def test_methods_of_the_l_inf_ball_say_so() -> None:
    have = {name for name in methods.names() if "l2" in methods.get(name).norms}
    assert have == {*IN_EVERY_NORM, "standard", "cure", "jacobian"}
    for name in set(methods.names()) - have:
        with pytest.raises(
            ValueError, match=f"norm: {name} is a method of the l_inf ball; in l2 there are .*adv, trades"
        ):
            TrainConfig(method=name, norm="l2", eps=1)
        with pytest.raises(ValueError, match=f"{name}: norm 'l1' cannot be had"):
            methods.get(name)(eps=0.5, norm="l1")
    with pytest.raises(ValueError, match="norm: free is a method of the l_inf ball"):
        TrainConfig(method="adv", norm="l2", beside=("free",))
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', 'l1', got 'l3'"):
        TrainConfig(norm="l3")  # type: ignore[arg-type]
    assert AWP(methods.build("adv", 3.0, norm="l1"), 0.01).norm == "l1"


def test_radii_go_by_the_norm() -> None:
    assert TrainConfig(method="adv", norm="l1", eps=12).eps == 12
    assert TrainConfig(method="adv", norm="l2", eps="128/255").eps == 128 / 255  # type: ignore[arg-type]
    for eps in (0, -1):
        with pytest.raises(ValueError, match=f"eps must be a number > 0, got {eps}"):
            TrainConfig(method="adv", norm="l2", eps=eps)
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    cifar = DataSplits("cifar10", Images(pixels, torch.arange(4)), Images(pixels, torch.arange(4)), 10, 8 / 255)
    found = {norm: resolved(TrainConfig(method="adv", norm=norm), cifar) for norm in RADII}
    assert {norm: c.eps for norm, c in found.items()} == {"linf": 8 / 255, "l2": 128 / 255, "l1": 12}
    assert found["linf"].hyper["adv.step_size"] == 2 / 255
    with pytest.raises(ValueError, match="atlas: radius must be a number > 0 and <= 1, got 2"):
        methods.build("atlas", 0.1, {"radius": 2})
    assert methods.build("atlas", 12.0, {"radius": 2}, norm="l1").in_use()["radius"] == 2
    assert all(found[norm].hyper == {"adv.steps": 10} for norm in ("l2", "l1"))  # published steps are of l_inf
    assert data.get("mnist").radius("l2") is None
    with pytest.raises(ValueError, match=r"eps must be less than 55.43 in l2.*got 128: write 128/255 instead of 128"):
        resolved(TrainConfig(method="adv", norm="l2", eps=128), cifar)
    with pytest.raises(ValueError, match=r"the data set bars has no usual eps in l1: set it \(--eps\)"):
        resolved(TrainConfig(**TINY | {"method": "adv", "eps": None, "norm": "l1"}), splits())
    with pytest.raises(ValueError, match="data set x: eps must be a number > 0, got 0"):
        declared = data.Dataset(name="x", load=lambda *_: (), num_classes=4, eps=0.1, radii={"l2": 0})
        resolved(TrainConfig(), replace(splits(), declared=declared))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_run_in_another_norm_is_evaluated_and_resumed_in_it(norm: str, tmp_path: Path) -> None:
    settings = TrainConfig(
        **TINY | {"method": "adv", "hyper": {"steps": 2}, "epochs": 2, "eps": RADII[norm], "norm": norm},
        out_dir=str(tmp_path / "run"),
    )
    said: list[str] = []
    results = compare(settings, splits=splits(), show="silent", say=said.append)
    evaluation = results["adv"].evaluation
    assert (evaluation.norm, evaluation.eps) == (norm, RADII[norm])
    text = (tmp_path / "run" / "adv" / "results.md").read_text()
    assert {"l2": "eps 0.8 (l2)", "l1": "eps 6 (l1)"}[norm] in text
    assert {"l2": "PGD step 0.1", "l1": "PGD steps down to 0.3"}[norm] in text
    written = json.loads((tmp_path / "run" / "adv" / "results.json").read_text())
    assert written["config"]["norm"] == written["methods"]["adv"]["norm"] == norm
    folder = tmp_path / "run" / "adv"
    (again,) = evaluate_checkpoint(folder, splits=splits(), say=said.append).values()
    assert replace(again.evaluation, seconds=0) == replace(evaluation, seconds=0)
    with pytest.raises(ValueError, match=f"does not say what eps is in {'l1' if norm == 'l2' else 'l2'}: give it"):
        evaluate_checkpoint(folder, splits=splits(), norm="l1" if norm == "l2" else "l2", say=said.append)
    (other,) = evaluate_checkpoint(folder, splits=splits(), norm="linf", say=said.append).values()
    assert (other.evaluation.eps, other.evaluation.norm) == (splits().eps, "linf")
    part = engine.train(settings, splits=splits(), folder=tmp_path / "part", on_epoch=lambda row: row["epoch"] == 1)
    more = replace(settings, resume=str(tmp_path / "part"), out_dir=None)
    with pytest.raises(ValueError, match=f"with other hyper-parameters: it has .*'norm': '{norm}'"):
        engine.train(replace(more, norm="linf", eps=0.1), splits=splits())
    whole = checkpoint.load(folder)["model"]
    assert same(weights(engine.train(more, splits=splits()).model), whole) and not same(weights(part.model), whole)


def test_evaluation_attacks_in_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both attacks, against the attacks themselves on the images that are right."""
    run = engine.train(TrainConfig(**TINY | {"method": "standard", "epochs": 2}), splits=splits())
    images = splits().test
    x = images.images.float() / 255
    with torch.no_grad():
        right = run.model.eval()(x).argmax(1) == images.labels
    moved: list[tuple[str, Tensor]] = []
    loop = PGD.loop

    def watched(self: Any, whole: Any, model: nn.Module, batch: Any, **how: Any) -> Any:
        result = loop(self, whole, model, batch, **how)
        moved.append((type(self).__name__, result.adv - batch.x))
        return result

    monkeypatch.setattr(PGD, "loop", watched)
    for norm in ("l2", "l1"):
        moved.clear()
        evaluate(run.model, images, RADII[norm], norm=norm, steps=20)  # type: ignore[arg-type]
        assert [kind for kind, _ in moved] == ["FGSM", "PGD"]
        for _, d in moved:
            size = length(d, norm)
            assert len(d) == right.sum() and (size <= RADII[norm] * (1 + 1e-5)).all() and size.max() > 0.8 * RADII[norm]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_what_watches_a_run_attacks_in_its_norm(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks: list[PGD] = []
    monkeypatch.setattr(validation, "PGD", lambda *how, **more: attacks.append(PGD(*how, **more)) or attacks[-1])
    how = {"method": "adv", "hyper": {"steps": 1}, "epochs": 1, "eps": RADII[norm], "norm": norm}
    for look in ({"val_size": 16, "probe_size": 0}, {"probe_size": 8}):
        engine.train(TrainConfig(**TINY | how | look), splits=splits())
        assert {(attack.norm, attack.eps) for attack in attacks} == {(norm, RADII[norm])}
        attacks.clear()


def test_the_command_line_knows_norms(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--method", "free", "--norm", "l2", "--eps", "1"]
    assert cli.main(flags) == 2 and "norm: free is a method of the l_inf ball" in capsys.readouterr().err
    assert cli.main(["train", "--norm", "l2", "--method", "adv", "--beside", "--epochs", "1"]) == 2
    assert "the data set digits has no usual eps in l2" in capsys.readouterr().err
