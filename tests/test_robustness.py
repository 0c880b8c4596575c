"""Evaluation with attacks by name: the figures, the signs that one cannot be trusted, and what it may be given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import FGSM, MIFGSM
from atlas_train.data import Images
from atlas_train.evaluate import evaluate, evaluating
from atlas_train.robustness import signs
from atlas_train.robustness.named import named
from atlas_train.robustness.outcome import Outcome
from atlas_train.robustness.report import RECORD, Report
from atlas_train.robustness.signs import Probe
from atlas_train.robustness.tally import Progress
from tiny_runs import EPS, splits

FLAT, WIDE = 128 / 255, 0.25


class Along(nn.Module):
    """Two classes; the margin of the first goes by how far the mean pixel is above that of a flat image, in WIDE."""

    def __init__(self, margin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.margin, self.scale = margin, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        margin = self.scale * self.margin((x.flatten(1).mean(1) - FLAT) / WIDE)
        return torch.stack([3 + margin, torch.full_like(margin, 3.0)], 1)


def flat(n: int = 20) -> tuple[Tensor, Tensor]:
    return torch.full((n, 1, 8, 8), FLAT), torch.zeros(n, dtype=torch.int64)


def stuck(u: Tensor) -> Tensor:
    """Falls a little, rises, and falls below 0 where only a long step gets to."""
    return torch.where(u < 0.1, 1 - 4 * u, torch.where(u < 0.5, 0.5 + u, 3 - 4 * u))


def linear() -> nn.Module:
    """What classifies the bars, and can be fooled."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    rows = torch.zeros(4, 8, 8)
    for label in range(4):
        rows[label, 2 * label : 2 * label + 2] = 1.0
    net[1].weight.data, net[1].bias.data = rows.flatten(1), torch.zeros(4)  # type: ignore[union-attr]
    return net


def found(report: Report) -> set[str]:
    return {sign.sign for sign in report.signs}


# --- figures


def test_figures_are_those_of_the_attacks() -> None:
    model, images = linear(), splits().test
    x, y, radii = images.images.float() / 255, images.labels, (0.2, 0.35)
    report = evaluate(model, images, radii, attacks=("fgsm", "pgd-3-2", "cw-3", "mifgsm-2"), seed=3)
    assert report.clean == 1 and report.radii == radii and len(report.outcomes) == 9
    for eps in radii:
        for name, attack in {"fgsm": FGSM(eps), "mifgsm-2": MIFGSM(eps, steps=2)}.items():
            right = model(attack(model, x, y)).argmax(1) == y
            assert torch.equal(report.outcome(name, eps).right, right), name
        outcome = report.outcome("pgd-3-2", eps)
        assert outcome.settings["restarts"] == 2 and outcome.settings["step_size"] == pytest.approx(2.5 * eps / 3)
        assert 0.9 * eps < outcome.distance <= eps * (1 + 1e-4) and 0 <= outcome.low <= outcome.high <= 1
        every = torch.stack([o.right for o in report.outcomes if o.eps == eps]).all(0)
        assert torch.equal(report.standing(eps), every) and report.accuracy("all", eps) == every.double().mean()
    assert report.accuracy("fgsm") > report.accuracy("fgsm", 0.35)
    assert report.outcome("clean").eps is None and not report.signs


def test_noise_goes_by_the_image_whatever_the_batch() -> None:
    model, images = linear(), splits().test
    reports = [evaluate(model, images, 0.3, attacks=["pgd-2", "cw-2-2"], batch_size=size) for size in (40, 7)]
    for one, other in zip(*(report.outcomes for report in reports), strict=True):
        assert torch.equal(one.right, other.right) and one.distance == other.distance


class Held:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Held:
        return Held(self.inner(x))


def test_images_come_in_every_form() -> None:
    images = splits().test
    x, y = images.images.float() / 255, images.labels
    forms: dict[str, Any] = {
        "images": images,
        "tensors": (x, y),
        "bytes": [images.images, y.int()],
        "arrays": (x.double().numpy(), y.numpy().astype(np.uint8)),
        "loader": [(x[i : i + 7], y[i : i + 7]) for i in range(0, 40, 7)],
        "generator": ((x[i : i + 9], y[i : i + 9]) for i in range(0, 40, 9)),
        "torch loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16),
    }
    wanted = evaluate(linear(), images, 0.3, attacks="pgd-2")
    for name, form in forms.items():
        report = evaluate(Wrapped(linear()), form, 0.3, attacks="pgd-2")
        assert torch.equal(report.outcome("pgd-2").right, wanted.outcome("pgd-2").right), name
    first = evaluate(linear(), forms["loader"], 0.3, attacks="pgd-2", size=10)
    assert first.numbers.tolist() == list(range(10)) and torch.equal(first.labels, y[:10])
    drawn = evaluate(linear(), (x, y), 0.3, attacks="pgd-2", size=8)
    assert drawn.labels.bincount().tolist() == [2, 2, 2, 2] and torch.equal(y[drawn.numbers], drawn.labels)
    old = evaluate(linear(), (x, y), 0.3, steps=2)
    assert old.pgd == wanted.accuracy("pgd-2") and old.signs == []


def test_a_normalisation_that_is_given_apart() -> None:
    images, mean, std = splits().test, [0.3], [0.2]
    inside = nn.Sequential(nn.BatchNorm2d(1, eps=0.0, affine=False), linear()).eval()
    inside[0].running_mean, inside[0].running_var = torch.tensor(mean), torch.tensor(std) ** 2  # type: ignore[union-attr]
    apart = evaluate(linear(), images, 0.3, attacks=("fgsm", "pgd-2"), mean=mean, std=std)
    whole = evaluate(inside, images, 0.3, attacks=("fgsm", "pgd-2"))
    assert [o.accuracy for o in apart.outcomes] == [o.accuracy for o in whole.outcomes]
    assert evaluate(linear(), images, 0.3, steps=2, mean=mean, std=std).pgd == apart.accuracy("pgd-2")
    with pytest.raises(ValueError, match="mean and std go together, got mean .* give both"):
        evaluate(linear(), images, 0.3, attacks="fgsm", mean=mean)


def test_the_network_and_the_random_state_are_as_before() -> None:
    model, random = nn.Sequential(linear(), nn.Dropout(0.5)), torch.get_rng_state()
    model[1].eval()
    lines: list[str] = []
    report = evaluate(model, splits().test, 0.3, attacks=("fgsm", "pgd-2"), say=lines.append)
    assert "random" not in found(report), "in train mode it would be"
    assert lines[1] == "the model is in train mode: it is evaluated in eval mode, and then as it was"
    assert model.training and not model[1].training and torch.equal(torch.get_rng_state(), random)
    model.train()
    assert "random" not in found(evaluate(model, splits().test, 0.3, attacks="fgsm")) and model[1].training


# --- signs


def test_a_collapsed_network_is_told() -> None:
    """FGSM's step lands beyond the adversaries, as it does in a network that overfitted it: 100 and 0 %."""
    report = evaluate(Along(lambda u: 1 - 8 * u + 8 * u * u), flat(), WIDE, attacks=("fgsm", "pgd-20"))
    assert (report.accuracy("fgsm"), report.accuracy("pgd-20")) == (1, 0)
    assert found(report) == {"hides from one step"} and report.to_dict()["unreliable"]
    row = report.table().splitlines()[2]
    assert "100.0 % !" in row and row.count("!") == 1
    assert "! FGSM at 0.25 (l_inf): FGSM leaves 100.0 % right, PGD-20 0.0 %" in report.table()
    told = evaluate(Along(lambda u: 1 - 8 * u + 8 * u * u), flat(), WIDE).signs
    assert len(told) == 1 and "catastrophic overfitting" in told[0]


def test_an_iterative_attack_that_is_stuck_is_told() -> None:
    report = evaluate(Along(stuck), flat(), WIDE, attacks=("fgsm", "pgd-20"))
    assert (report.accuracy("fgsm"), report.accuracy("pgd-20")) == (0, 1)
    assert "one step stronger than many" in found(report)
    (sign,) = (sign for sign in report.signs if sign.sign == "one step stronger than many")
    assert sign.attack == "pgd-20" and sign.eps == WIDE and "too high" in sign.text


def test_a_network_without_gradients_is_told() -> None:
    """It rounds, so that the gradient is 0; and no attack moves it at any radius."""
    flatten = nn.Flatten()

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([3 + (0 * flatten(x)).round().sum(1), 0 * x.mean((1, 2, 3))], 1)

    report = evaluate(Rounds(), flat(), EPS, attacks="pgd-3")
    assert found(report) == {"zero gradients", "loss does not rise", "robust at any eps"}
    assert report.probe and report.probe.zero_gradients == 20
    assert (report.probe.left, report.probe.large_eps) == (1, 0.5)
    assert "clean" not in [sign.attack for sign in report.signs] and "100.0 % !" in report.table()


class Lets(torch.autograd.Function):
    """x, through which there is no way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("no way back")


@pytest.mark.parametrize("stop", [Tensor.detach, Lets.apply])
def test_a_gradient_to_the_weights_is_none_to_the_image(stop: Callable[[Tensor], Tensor]) -> None:
    x, y = flat()
    for margin, able in ((stop, False), (torch.neg, True)):
        network = Along(margin)
        with evaluating(network):
            probe = signs.probe(network, x, y, EPS, "linf", noise_key("cpu"), torch.arange(20))
        assert probe.differentiable == able and network.scale.requires_grad


def test_inside_inference_mode() -> None:
    wanted = evaluate(linear(), splits().test, 0.3, attacks=("pgd-2", "apgd-ce"))
    with torch.inference_mode():
        report = evaluate(linear(), splits().test, 0.3, attacks=("pgd-2", "apgd-ce"))
    assert [o.attack.name for o in report.outcomes] == ["clean", "pgd-2", "apgd-ce"] and not report.signs
    assert torch.equal(report.standing(), wanted.standing())


def test_probabilities_and_random_networks_are_told() -> None:
    soft = nn.Sequential(linear(), nn.Softmax(1))
    assert "probabilities" in found(evaluate(soft, splits().test, 0.3, attacks="fgsm"))

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear()(x + 0.05 * torch.randn_like(x))

    report = evaluate(Noisy(), splits().test, 0.3, attacks="fgsm")
    assert "random" in found(report) and "--autoattack-version rand" in report.table()


def test_nan_is_counted_and_never_robust() -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = linear()(x)
            return torch.where((x.amax((1, 2, 3)) > 0.9)[:, None], z * math.nan, z)

    x, y = splits().test.images.float() / 255, splits().test.labels
    x[:3] = (x[:3] * 1.2).clamp(0, 1)
    assert (x[3:].amax((1, 2, 3)) < 0.87).all() and (x[:3].amax((1, 2, 3)) > 0.9).all()
    report = evaluate(Nan(), (x, y), 0.01, attacks="fgsm")
    clean, attacked = report.outcome("clean"), report.outcome("fgsm")
    assert clean.nan == attacked.nan == 3 and not clean.right[:3].any() and clean.right[3:].all()
    assert [s.attack for s in report.signs if s.sign == "nan"] == ["clean", "fgsm"]
    assert report.to_dict()["evaluation"]["attacks"][0]["nan"] == 3


def outcome(name: str, right: list[int] | Tensor, eps: float | None = EPS, **more: Any) -> Outcome:
    return Outcome(named(name)[-1], eps, "linf", torch.as_tensor(right).bool(), **more)


def shares(count: int, total: int = 1000) -> Tensor:
    return torch.arange(total) < count


@pytest.mark.parametrize(
    "outcomes, expected",
    [
        ([outcome("fgsm", shares(600)), outcome("pgd-20", shares(14))], {("hides from one step", "fgsm")}),
        ([outcome("fgsm", shares(500)), outcome("pgd-20", shares(468))], set()),
        ([outcome("fgsm", shares(500)), outcome("pgd-20", shares(503))], set()),
        ([outcome("fgsm", shares(500)), outcome("pgd-20", shares(520))], {("one step stronger than many", "pgd-20")}),
        ([outcome("fgsm", shares(78)), outcome("pgd-20", shares(24))], set()),
        ([outcome("square", shares(500)), outcome("pgd-20", shares(520))],
         {("black box stronger than white box", "pgd-20")}),
        ([outcome("square", shares(500)), outcome("pgd-20", shares(501))], set()),
        ([outcome("pgd-20", shares(300), 0.1), outcome("pgd-20", shares(400), 0.2)],
         {("accuracy rises with eps", "pgd-20")}),
        ([outcome("pgd-20", shares(400), 0.1), outcome("pgd-20", shares(300), 0.2)], set()),
        ([outcome("pgd-20", shares(400), distance=0.2)], {("outside", "pgd-20")}),
        ([outcome("clean", shares(400), None, nan=2)], {("nan", "clean")}),
        ([outcome("autoattack", shares(400), settings={"unconfirmed": 2})], {("unconfirmed", "autoattack")}),
        ([outcome("autoattack", shares(400), parts={"apgd-ce": 0.5, "fab-t": 0.45, "square": 0.4})],
         {("black box stronger than white box", "autoattack")}),
        ([outcome("square", shares(400), parts={"clean": 0.9, "square": 0.4})], set()),  # beside no other
        ([outcome("autoattack", shares(449), parts={"apgd-ce": 0.5, "fab-t": 0.45, "square": 0.449})], set()),
    ],
)  # fmt: skip
def test_what_figures_say_of_each_other(outcomes: list[Outcome], expected: set[tuple[str, str]]) -> None:
    assert {(sign.sign, sign.attack) for sign in signs.of_outcomes(outcomes)} == expected


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, set()),
        ({"losses": (1.0, 1.2, 1.1, 1.2)}, {"loss does not rise"}),
        ({"losses": (1.0, math.nan, math.nan, math.nan)}, {"loss does not rise"}),
        ({"left": 0.04}, {"robust at any eps"}),
        ({"zero_gradients": 1}, {"zero gradients"}),
        ({"differs": 0.01}, {"random"}),
        ({"probabilities": True}, {"probabilities"}),
        ({"differentiable": False, "losses": (), "left": None, "zero_gradients": None}, {"no gradient"}),
    ],
)
def test_what_few_images_say(changed: dict[str, Any], expected: set[str]) -> None:
    healthy: dict[str, Any] = {"images": 100, "classes": 4, "differs": 0.0, "probabilities": False}
    healthy |= {
        "differentiable": True,
        "zero_gradients": 0,
        "losses": (1.0, 1.1, 1.5, 2.0),
        "large_eps": 0.5,
        "left": 0.0,
    }
    assert {sign.sign for sign in signs.of_probe(Probe(**healthy | changed), "linf")} == expected


def test_the_grey_image_is_within_the_large_radius_in_every_norm() -> None:
    x = torch.cat([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)]).flatten(1)
    for norm, order in (("linf", math.inf), ("l2", 2), ("l1", 1)):
        reach = signs.large_radius((3, 4, 4), norm)  # type: ignore[arg-type]
        assert torch.linalg.vector_norm(x - 0.5, order, dim=1).max().item() == pytest.approx(reach)


# --- what it writes


def test_tables_and_records() -> None:
    images = splits().test
    report = evaluate(linear(), images, (0.2, 0.35), attacks=("fgsm", "pgd-2"))
    header, _, first, second = report.table().splitlines()[:4]
    assert header.split() == ["eps", "clean", "FGSM", "PGD-2", "all"]
    assert first.split()[:4] == ["0.2", "(l_inf)", "100.0", "%"]
    assert f"{100 * report.accuracy('all', 0.35):.1f} %" == " ".join(second.split()[-2:])
    assert "without autoattack these figures are upper bounds" in report.table()
    assert report.table("markdown").startswith("| eps | clean | FGSM | PGD-2 | all |\n| --- | ---: |")
    latex = report.table("latex")
    assert r"\begin{tabular}{lrrrr}" in latex and r"0.2 ($\ell_\infty$) & 100.0 \% &" in latex
    assert all(line.startswith("%") for line in latex.splitlines()[latex.splitlines().index(r"\end{tabular}") + 1 :])
    classes = report.class_table().splitlines()
    assert classes[0].split() == ["class,", "eps", "0.2", "(l_inf)", "images", "clean", "FGSM", "PGD-2", "all"]
    assert classes[7].split() == ["class,", "eps", "0.35", *classes[0].split()[3:]] and len(classes) == 13
    for eps, row in ((0.2, classes[2]), (0.35, classes[9])):
        mine = report.standing(eps)[images.labels == 0].double().mean().item()
        assert row.split()[:4] == ["0", "10", "100.0", "%"] and row.split()[-2] == f"{100 * mine:.1f}"
    assert report.class_table("latex").count(r"\begin{tabular}{lrrrrr}") == 2
    assert r"class, eps 0.35 ($\ell_\infty$) & images & clean & FGSM & PGD-2 & all" in report.class_table("latex")
    assert report.class_table("markdown").count("| class, eps 0.2") == 1
    alone = evaluate(linear(), images, 0.2, attacks="fgsm").class_table().splitlines()
    assert alone[0].split() == ["class", "images", "clean", "FGSM"] and len(alone) == 6
    assert evaluate(linear(), images, 0.2, attacks="clean").table().splitlines()[:3] == ["clean", "-------", "100.0 %"]
    rows = report.samples_csv().splitlines()
    assert rows[0] == "image,label,clean,fgsm@0.2,pgd-2@0.2,fgsm@0.35,pgd-2@0.35" and len(rows) == 41
    assert sum(int(row.split(",")[3]) for row in rows[1:]) == 40 * report.accuracy("fgsm", 0.2)
    written = json.loads(json.dumps(report.to_dict()))
    assert list(written)[: len(RECORD)] == list(RECORD)
    assert (written["eps"], written["clean_acc"]) == ("0.2", "100.00")
    assert written["autoattack_acc"] is None, "which is of the standard version alone"
    attacks = written["evaluation"]["attacks"]
    assert [(a["attack"], a["eps"]) for a in attacks][:3] == [("clean", None), ("fgsm", 0.2), ("pgd-2", 0.2)]
    assert attacks[1]["per_class"]["0"] == report.outcome("fgsm", 0.2).right[images.labels == 0].double().mean().item()
    assert report.curves()["PGD-2"] == [(0.0, 1.0), *((eps, report.accuracy("pgd-2", eps)) for eps in (0.2, 0.35))]
    assert repr(report) == report.table()


def test_what_was_not_run_has_no_figure() -> None:
    report = evaluate(linear(), splits().test, (0.2, 0.35), attacks="fgsm")
    with pytest.raises(KeyError, match="no attack was run at eps 0.3: there are clean, fgsm, at eps 0.2, 0.35"):
        report.accuracy("all", 0.3)
    with pytest.raises(KeyError, match="fgsm was not run at eps 0.3: there are clean, fgsm, at eps 0.2, 0.35"):
        report.accuracy("fgsm", 0.3)
    with pytest.raises(KeyError, match="pgd was not run: there are clean, fgsm, at"):
        report.accuracy("pgd")


def test_a_record_has_the_radius_as_robustbench_writes_it() -> None:
    assert evaluate(linear(), splits().test, 8 / 255, attacks="fgsm").record()["eps"] == "8/255"
    assert evaluate(linear(), splits().test, 0.5, attacks="fgsm", norm="l2").record()["eps"] == "0.5"
    assert evaluate(linear(), splits().test, 12, attacks="fgsm", norm="l1").record()["eps"] == "12"


def test_clean_accuracy_alone() -> None:
    report = evaluate(linear(), splits().test, 0.2, attacks="clean")
    assert report.radii == () and report.accuracy("all") == report.clean == 1 and not report.signs
    assert report.table().splitlines()[:3] == ["clean", "-------", "100.0 %"] and json.dumps(report.to_dict())


def test_only_the_standard_version_is_a_record_of_autoattack() -> None:
    def report(**settings: Any) -> Report:
        found = (outcome("clean", shares(900), None), outcome("autoattack", shares(444), settings=settings))
        return Report(torch.zeros(1000).long(), torch.arange(1000), found, "linf", 0, "cpu", 1.0)

    assert report(version="standard", instead=()).record()["autoattack_acc"] == "44.40"
    for other in ({"version": "apgd", "instead": ()}, {"version": "standard", "instead": ("no apgd-t",)}):
        assert report(**other).record()["autoattack_acc"] is None


def test_time_is_told_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch on a GPU takes far longer than any other: 169 s were foretold for 13."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("atlas_train.robustness.tally.time.perf_counter", lambda: clock.now)
    for warm, first in ((False, []), (True, ["  about 400 s in all"])):
        lines: list[str] = []
        clock.now = 0.0
        progress = Progress(1000, warm, lines.append)
        clock.now = 100.0
        progress.after(250, {"PGD-20": 0.5})
        assert lines == first
        clock.now = 110.0
        progress.after(250, {"PGD-20": 0.5})
        if not warm:
            assert lines == ["  about 40 s in all"]
        clock.now = 130.0
        progress.after(250, {"PGD-20": 0.437})
        assert lines[-1].startswith("  750 of 1,000 images: PGD-20 43.7 %; about ")


# --- what it may be given


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"attacks": ["pdg-20"]}, ValueError, "attacks: nothing known as 'pdg-20'; the nearest is 'pgd-20'"),
        ({"attacks": ["pgd-0"]}, ValueError, "pgd takes steps from 1 to .* got 'pgd-0'"),
        ({"attacks": []}, ValueError, "attacks must name one or more"),
        ({"state": "s"}, ValueError, "state 's' is where AutoAttack goes on, and nothing of it is run: name it"),
        ({"state": "s", "attacks": None}, ValueError, "or leave state out"),
        ({"eps": None}, ValueError, "eps must be a number > 0 or several, got None"),
        ({"eps": (0.1, -0.1)}, ValueError, "eps must be a number > 0"),
        ({"eps": (0.1, 8.0)}, ValueError, "eps must be < 1 in l_inf, got 8, .* write 8/255 for 8 grey levels$"),
        ({"eps": 8.0, "attacks": None}, ValueError, "eps must be < 1 in l_inf, got 8, .* write 8/255"),
        ({"eps": None, "attacks": None}, ValueError, "eps must be a number, got None: write 8 / 255, say"),
        ({"num_classes": 5}, ValueError, "the model gives 4 logits, and the data have 5 classes"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 4]))}, ValueError,
         r"labels must be in 0..3, for the model gives 4 logits, got labels from 0 to 4"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.tensor([0, -1, 2, 3]))}, ValueError, "got labels from -1 to 3"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.rand(4))}, ValueError, "labels must be integers"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.arange(3))}, ValueError,
         r"must be as many, got \[4, 1, 8, 8\] and \[3\]"),
        ({"data": (2 * torch.rand(4, 1, 8, 8) - 1, torch.arange(4))}, ValueError,
         r"images must be in \[0, 1\].* they look normalised; give the images as they are before it, and mean and std"),
        ({"data": (255 * torch.rand(4, 1, 8, 8), torch.arange(4))}, ValueError, "divide by 255"),
        ({"data": (torch.full((4, 1, 8, 8), math.nan), torch.arange(4))}, ValueError, "got NaN in 4 of them"),
        ({"data": (torch.randint(0, 9, (4, 1, 8, 8)), torch.arange(4))}, ValueError, "must be float in .* or uint8"),
        ({"data": torch.rand(4, 1, 8, 8)}, TypeError, "data must be Images, a pair .* got Tensor"),
        ({"data": [torch.rand(4, 1, 8, 8)] * 3}, TypeError, "this loader gives Tensor"),
        ({"data": [(torch.rand(1, 8, 8), 3)] * 3}, ValueError, "put a data set of single images into"),
        ({"data": []}, ValueError, "the loader gave none"),
        ({"norm": "Linf"}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 'Linf'; did you mean 'linf'"),
        ({"mean": [0.5] * 3, "std": [0.2] * 3}, ValueError, "mean and std must have a number for each of 1 channels"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], error: Any, text: str) -> None:
    given = {"data": splits().test, "eps": 0.3, "attacks": ["pgd-2"]} | change
    with pytest.raises(error, match=text):
        evaluate(linear(), given.pop("data"), **given)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got .*function.*: put what it does into one"):
        evaluate(torch.flatten, splits().test, 0.3, attacks="fgsm")  # type: ignore[call-overload]


def test_labels_are_checked_where_no_attacks_are_named() -> None:
    x = splits().test.images
    with pytest.raises(ValueError, match=r"labels must be in 0..3, .* got labels from 1 to 4"):
        evaluate(linear(), (x, splits().test.labels + 1), 0.3)


def test_radii_come_as_arrays_and_tensors() -> None:
    for eps in (np.float32(0.25), np.array([0.25, 0.5]), torch.tensor([0.25, 0.5]), torch.tensor(0.25)):
        report = evaluate(linear(), splits().test, eps, attacks="fgsm")  # type: ignore[arg-type]
        assert report.radii == ((0.25, 0.5) if len(np.shape(eps)) else (0.25,))


def test_apgd_t_is_refused_for_three_classes_before_any_attack_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_train.evaluate.ensembles.outcome", lambda *a, **k: pytest.fail("an attack ran"))
    model = nn.Sequential(linear(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="DLR loss of apgd-t takes four classes, and the model has 3: name apgd"):
        evaluate(model, (torch.rand(3, 1, 8, 8), torch.arange(3)), 0.3, attacks=("apgd", "apgd-t"))


def test_several_radii_need_attacks() -> None:
    with pytest.raises(ValueError, match="eps must be a number, got .* name the attacks too"):
        evaluate(linear(), splits().test, (0.1, 0.2))  # type: ignore[call-overload]


def test_images_of_the_trainer_may_be_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_train.evaluate.CPU_SIZE", 8)
    many = splits().test
    assert len(evaluate(linear(), many, 0.3, attacks="fgsm").labels) == 8
    assert len(evaluate(linear(), (many.images, many.labels), 0.3, attacks="fgsm").labels) == 40
    assert len(evaluate(linear(), many, 0.3, attacks="fgsm", size=20).labels) == 20
    assert isinstance(many, Images)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 2.5), ("l1", 14.0)])
def test_other_norms(norm: Any, eps: float) -> None:
    report = evaluate(linear(), splits().test, eps, attacks=("fgsm", "pgd-5"), norm=norm)
    assert report.outcome("pgd-5").distance <= eps * (1 + 1e-4) and report.outcome("pgd-5").distance > 0.5 * eps
    assert report.accuracy("pgd-5") < 1 and f"({norm})" in report.table()
    assert report.probe and report.probe.left == 0
