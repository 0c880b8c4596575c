"""AutoAttack: verdicts that are sound and do not depend on how they were come to, and what it says of bad input."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import Execution
from atlas_kernels.attacks import (
    AutoAttack,
    AutoAttackResult,
    Batch,
    Search,
    Square,
    ensemble,
    pool,
    progress,
    row_noise,
    saved,
    square,
)
from atlas_kernels.attacks.apgd import APGD
from atlas_kernels.attacks.execution import current_execution
from atlas_kernels.attacks.fab import FAB
from atlas_kernels.attacks.pool import State
from atlas_kernels.attacks.sound import distances, within
from test_attack_contract import Net, Snapshot
from test_attack_search import Climb
from test_attacks import CLASSES, Rowwise, images

EPS = 0.03


@dataclass(frozen=True)
class Guess(Search):
    """Corners of the ball, each further draw another: needs no gradient."""

    gradients = False

    def begin(self, model: nn.Module, batch: Batch, draw: Tensor) -> State:
        state = {
            "adv": batch.x,
            "draw": draw,
            "number": torch.zeros_like(draw),
            "fooled": torch.zeros_like(draw).bool(),
        }
        return self.advance(model, batch, state) | {"number": state["number"]}

    def advance(self, model: nn.Module, batch: Batch, state: State) -> State:
        signs = row_noise.signs(batch, state["draw"], state["number"], batch.x.shape[1:])
        at = batch.inside(batch.x + batch.eps * signs)
        _, fooled = batch.goal.judge(batch.goal.predict(model, at))
        return {**state, "adv": at, "number": state["number"] + 1, "fooled": fooled}


def plan(eps: float = EPS, **more: Any) -> AutoAttack:
    parts = {"climb": Climb(eps, steps=3), "more": Climb(eps, steps=4, restarts=2), "guess": Guess(eps, steps=10)}
    return AutoAttack(eps, version="custom", parts=parts, **more)


@pytest.fixture
def case(device: torch.device) -> tuple[Rowwise, Tensor, Tensor]:
    """A float32 network; labels as it has them, but for two."""
    model = Rowwise(torch.float32).to(device).eval()
    x = images(40, torch.float32).to(device)
    y = model(x).argmax(1)
    y[2:4] = (y[2:4] + 1) % CLASSES
    return model, x, y


def test_verdicts_are_sound(case, device) -> None:
    model, x, y = case
    result = plan().run(model, x, y)
    record = result.record
    wrong = model(result.adv).argmax(1) != y
    assert torch.equal(result.correct, ~wrong)
    assert torch.equal(result.correct, result.fooled_by == -1)
    assert (result.fooled_by == 0).nonzero()[:, 0].tolist() == [2, 3]
    assert set(result.fooled_by.tolist()) >= {-1, 0, 1, 2}
    untouched = result.fooled_by <= 0
    assert torch.equal(result.adv[untouched], x[untouched])
    away = (result.adv.double() - x.double()).abs()
    assert away.max() <= EPS and record.largest_norm == away.max()
    assert (record.least, record.most) == tuple(v.item() for v in result.adv[~untouched].aminmax())
    assert record.least >= 0 and record.most <= 1
    shares = [
        (result.fooled_by[:, None] != torch.arange(k + 1, device=device)).all(1).double().mean() for k in range(4)
    ]
    assert list(record.accuracy.values()) == pytest.approx([float(share) for share in shares])
    assert list(record.accuracy) == ["clean", "climb", "more", "guess"] == ["clean", *record.parts]
    assert result.accuracy == record.accuracy["guess"]
    assert record.nan_adversaries == record.nan_logits == record.unconfirmed == 0
    assert record.to_dict()["parts"]["climb"].startswith("Climb(eps=0.03, steps=3")


def test_only_who_stands_is_attacked_and_passes_are_counted(case) -> None:
    model, x, y = case
    seen = [0]
    handle = model.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    record = plan().run(model, x, y).record
    handle.remove()
    assert sum(seen) == sum(record.forwards.values())
    standing = round(record.accuracy["climb"] * 40)
    assert record.backwards["more"] <= standing * 2 * 4
    assert record.backwards["guess"] == 0 and record.backwards["climb"] > 0
    after = round(record.accuracy["more"] * 40)
    assert after <= record.forwards["guess"] <= after * 12  # 11 guesses, and the judgement


@pytest.mark.parametrize("batch_size", [1, 25])
def test_neither_batch_size_nor_order_nor_the_rest_of_the_set_counts(case, device, batch_size: int) -> None:
    model, x, y = case
    whole = plan(seed=3).run(model, x, y)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 7 + batch_size].to(device)
    some = plan(seed=3).run(model, x[rows], y[rows], ids=rows, batch_size=batch_size)
    assert torch.equal(some.fooled_by, whole.fooled_by[rows])
    assert torch.equal(some.adv, whole.adv[rows])


def test_a_seed_repeats_it_and_all_is_left_as_it_was(device) -> None:
    torch.manual_seed(0)
    model = Net().to(device).eval()
    x = torch.rand(12, 3, 4, 4, device=device)
    y = torch.arange(12, device=device) % 5
    before, state = Snapshot(model), torch.get_rng_state()
    first, again, other = (plan(0.2, seed=seed).run(model, x, y).adv for seed in (0, 0, 1))
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert current_execution().precision == "keep"


def test_images_may_lie_elsewhere(case, device) -> None:
    model, x, y = case
    here, there = plan().run(model, x, y), plan().run(model, x.cpu(), y.cpu())
    assert there.adv.device.type == there.correct.device.type == "cpu"
    assert torch.equal(there.fooled_by, here.fooled_by.cpu())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_network_sees_the_memory_format_of_the_images(norm: str, device) -> None:
    torch.manual_seed(0)
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    model = Net().to(device).eval()
    x = torch.rand(9, 3, 4, 4, device=device)
    y = model(x).argmax(1)
    seen: list[bool] = []
    handle = model.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    attack = AutoAttack(
        eps, norm=norm, version="custom", parts={
            "ce": APGD(eps, steps=3, norm=norm), "fab": FAB(eps, steps=3, norm=norm),
            "square": Square(eps, steps=3, norm=norm),
        }
    )  # fmt: skip
    last = attack.run(model, x.to(memory_format=torch.channels_last), y, batch_size=4)
    assert all(seen)
    handle.remove()
    plain = attack.run(model, x, y, batch_size=4)
    assert (last.fooled_by == plain.fooled_by).double().mean() > 0.8  # but for rounding
    assert last.adv.is_contiguous(memory_format=torch.channels_last) and plain.adv.is_contiguous()


class LowPrecision(nn.Module):
    """Wrong about everything under autocast, and a good network without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return -logits if torch.is_autocast_enabled(x.device.type) else logits


def test_what_only_low_precision_sees_does_not_count(case) -> None:
    model, x, y = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bfloat16 may be slow here
        plain = plan(search_precision := 1e-5).run(LowPrecision(model).eval(), x, y)
        low = plan(search_precision).run(LowPrecision(model).eval(), x, y, search_precision="bf16")
        assert torch.equal(low.correct, plain.correct) and low.correct.sum() == 38
        strong = plan(0.2).run(model, x, y, search_precision="bf16")
    assert strong.record.search_precision == "bf16"
    assert torch.equal(strong.correct, model(strong.adv).argmax(1) == y)
    assert strong.record.forwards["guess"] >= low.record.forwards["guess"] * 0
    # Each of its iterates is an adversary to bfloat16, and each is asked about.
    assert low.record.forwards["climb"] > 1.5 * plain.record.forwards["climb"]


def test_user_autocast_does_not_reach_the_judgement(case, device) -> None:
    model, x, y = case
    with torch.autocast(device.type, torch.bfloat16), Execution("bf16"):
        inside = plan(1e-5).run(LowPrecision(model).eval(), x, y)
    assert inside.correct.sum() == 38


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_stored_points_are_in_the_ball_for_certain(norm: str, device) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(60, 3, 8, 8, generator=g).to(device)
    y, exceeding = torch.zeros(60, dtype=torch.int64, device=device), 0
    for eps in (8 / 255, 0.5, 0.999):
        batch = Climb(eps, norm=norm).batch(x, y, key=torch.zeros(2, dtype=torch.int64, device=device))
        far = torch.randn(x.shape, generator=g).to(device)
        for points in (x + 2 * eps * far.sign(), x + eps * far):
            kept = within(batch, points)
            exceeding += int((distances(batch.inside(points), x, norm) > eps).sum())
            assert kept.min() >= 0 and kept.max() <= 1
            reached = distances(kept, x, norm)
            assert (reached <= eps).all()
            assert torch.allclose(kept, batch.inside(points), atol=eps * 1e-5 + 1e-7)
    assert exceeding  # so the projection alone would not do


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_no_way_of_adding_up_takes_a_stored_point_of_doubles_out_of_the_ball(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(40, 3, 16, 16, generator=g, dtype=torch.float64)
    for eps in (0.5, 3.0, 40.0):
        points = x + eps * torch.randn(x.shape, generator=g, dtype=torch.float64)
        batch = Climb(eps, norm=norm).batch(x, torch.zeros(40, dtype=torch.int64))
        kept = within(batch, points)
        for order in (torch.arange(768), torch.arange(768).flip(0), torch.randperm(768, generator=g)):
            mixed = [t.flatten(1)[:, order] for t in (kept, x)]
            assert (distances(*mixed, norm) <= eps).all()
        assert eps > 1 or torch.allclose(distances(kept, x, norm), torch.tensor(eps).double(), rtol=1e-10, atol=0)


# Versions


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_are_the_published_ones(norm: str, version: str) -> None:
    package = pytest.importorskip("pyautoattack")
    theirs = package.AutoAttack(nn.Identity(), eps=EPS, norm=norm.capitalize(), version=version)
    ours, changes = AutoAttack(EPS, norm=norm, version=version).searches(10)
    assert list(ours) == theirs.attacks_to_run and changes == ()
    for name, part in ours.items():
        assert (part.eps, part.norm) == (EPS, norm)
        if isinstance(part, APGD):
            same = theirs.apgd_targeted if part.targeted else theirs.apgd
            assert (part.steps, part.eot_iter, part.rho) == (same.n_iter, same.eot_iter, same.thr_decr)
            assert (part.restarts, part.large_radii) == (same.n_restarts, same.use_largereps)
            assert part.objective == {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr_targeted"}[name]
            if part.targeted:
                assert part.target_classes == same.n_target_classes
        elif isinstance(part, FAB):
            restarts = 1 if part.targeted else theirs.fab.n_restarts  # as its run sets it for fab-t
            assert (part.steps, part.restarts) == (theirs.fab.n_iter, restarts)
            assert (part.alpha_max, part.eta, part.beta) == (theirs.fab.alpha_max, theirs.fab.eta, theirs.fab.beta)
            assert part.targeted == (name == "fab-t")
            assert not part.targeted or part.target_classes == theirs.fab.n_target_classes
        else:
            assert isinstance(part, Square)
            assert (part.steps, part.p_init) == (theirs.square.n_queries, theirs.square.p_init)
            assert (part.restarts, part.stretched) == (theirs.square.n_restarts, theirs.square.rescale_schedule)


@pytest.mark.parametrize("stretched", [True, False])
def test_square_shrinks_as_in_autoattack(stretched: bool, monkeypatch: pytest.MonkeyPatch, case) -> None:
    package = pytest.importorskip("pyautoattack.square", exc_type=ImportError)
    theirs = package.SquareAttack(None, n_queries=200, p_init=0.8, resc_schedule=stretched)
    shares = []
    level = square._Patterns.level

    def seen(patterns: Any, *arguments: Any) -> Tensor:
        found = level(patterns, *arguments)
        shares.append(0.8 / 2 ** int(found[0]))
        return found

    monkeypatch.setattr(square._Patterns, "level", seen)
    model, x, y = case
    Square(1e-4, steps=200, stretched=stretched).run(model, x[:1], y[:1])
    assert shares == pytest.approx([theirs.p_selection(query) for query in range(200)])


def test_few_classes() -> None:
    def names(version: str, classes: int) -> tuple[list[str], int]:
        parts, changes = AutoAttack(EPS, norm="l1", version=version).searches(classes)
        for part in parts.values():
            assert part.rounds(classes)
        if version == "standard" and classes == 3:
            dlr = parts["apgd-dlr"]
            assert isinstance(dlr, APGD) and (dlr.objective, dlr.large_radii, dlr.restarts) == ("dlr", True, 5)
        return list(parts), len(changes)

    assert names("standard", 4) == (["apgd-ce", "apgd-t", "fab-t", "square"], 0)
    assert names("standard", 3) == (["apgd-ce", "apgd-dlr", "fab-t", "square"], 1)
    assert names("standard", 2) == (["apgd-ce", "fab-t", "square"], 1)
    assert names("apgd", 3) == (["apgd-ce", "apgd-dlr"], 1)
    assert names("apgd", 2) == (["apgd-ce"], 1)
    assert names("rand", 3) == (["apgd-ce", "apgd-dlr"], 0)
    assert names("rand", 2) == (["apgd-ce"], 1)
    assert names("plus", 3) == (["apgd-ce", "apgd-dlr", "fab", "square", "fab-t"], 1)
    assert names("plus", 2) == (["apgd-ce", "fab", "square", "fab-t"], 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_said(case, classes: int) -> None:
    model, x, _ = case
    few = Changed(model, lambda logits: logits[:, :classes]).eval()
    y = few(x[:4]).argmax(1)
    with pytest.warns(UserWarning, match="no apgd-t, whose DLR loss takes four classes"):
        record = AutoAttack(EPS, version="apgd").run(few, x[:4], y).record
    assert list(record.parts) == (["apgd-ce"] if classes == 2 else ["apgd-ce", "apgd-dlr"])
    assert record.instead[0].startswith(f"no apgd-t, whose DLR loss takes four classes, as the model has {classes}")


# What was saved


def stopped(after: int) -> Callable[..., None]:
    """``saved.save`` that stops the process, as it were, after so many times."""
    count = [0]

    def save(*arguments: Any) -> None:
        SAVE(*arguments)
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    return save


SAVE = saved.save


def test_it_goes_on_in_the_middle_of_an_attack(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case
    whole = plan().run(model, x, y, batch_size=16)
    path, said = tmp_path / "state.pt", []
    for after in (3, 1, 5, 2, 4):
        monkeypatch.setattr(saved, "save", stopped(after))
        with pytest.raises(KeyboardInterrupt):
            plan().run(model, x, y, batch_size=16, state_path=path, save_every=0, say=said.append)
    monkeypatch.setattr(saved, "save", SAVE)
    torch.manual_seed(7)
    result = plan().run(model, x, y, batch_size=16, state_path=path, save_every=0)
    assert torch.equal(result.fooled_by, whole.fooled_by) and torch.equal(result.adv, whole.adv)
    assert result.record.accuracy == whole.record.accuracy
    for name in ("climb", "more", "guess"):
        assert result.record.forwards[name] == whole.record.forwards[name]
        assert result.record.backwards[name] == whole.record.backwards[name]
    assert sum("going on from" in line for line in said) == 4
    # Once more, when all is done, it is only judged.
    again = plan().run(model, x, y, state_path=path)
    assert torch.equal(again.adv, whole.adv) and again.record.forwards["more"] == whole.record.forwards["more"]
    assert [each.name for each in tmp_path.iterdir()] == ["state.pt"]


def test_a_stop_within_an_iteration_loses_nothing(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes in the middle of a forward: what is saved is where all stood before that iteration."""
    model, x, y = case
    whole = plan().run(model, x, y, batch_size=16)
    path, calls, forward = tmp_path / "state.pt", [0], ensemble.Counted.forward

    def stops(self: ensemble.Counted, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] % 13 == 0:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(ensemble.Counted, "forward", stops)
    stopped_in, done = 0, None
    while done is None:
        try:
            done = plan().run(model, x, y, batch_size=16, state_path=path, save_every=1e9)
        except KeyboardInterrupt:
            stopped_in += bool(torch.load(path, weights_only=True)["state"]["pool"]) if path.exists() else 0
        assert calls[0] < 1000, "it does not go on from where it was stopped"
    assert stopped_in > 2
    assert torch.equal(done.fooled_by, whole.fooled_by) and torch.equal(done.adv, whole.adv)


def test_published_attacks_go_on_too(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states can be saved in the middle, and looks that are rarer change no verdict."""
    model, x, y = case[0], case[1][:16], case[2][:16]
    parts: dict[str, Search] = {
        "ce": APGD(EPS, steps=9), "dlr": APGD(EPS, steps=7, objective="dlr_targeted"), "fab": FAB(EPS, steps=5),
        "square": Square(EPS, steps=12),
    }  # fmt: skip
    attack = AutoAttack(EPS, version="custom", parts=parts)
    whole, path = attack.run(model, x, y, batch_size=8), tmp_path / "state.pt"
    assert 0 < whole.correct.sum() < 14 and whole.record.unconfirmed == 0
    for after in (4, 15, 30):
        monkeypatch.setattr(saved, "save", stopped(after))
        with suppress(KeyboardInterrupt):
            attack.run(model, x, y, batch_size=8, state_path=path, save_every=0)
    monkeypatch.setattr(saved, "save", SAVE)
    result = attack.run(model, x, y, batch_size=8, state_path=path)
    assert torch.equal(result.fooled_by, whole.fooled_by) and torch.equal(result.adv, whole.adv)
    monkeypatch.setattr(pool.Pool, "turn", rarely(pool.Pool.turn))
    assert torch.equal(attack.run(model, x, y, batch_size=7).adv, whole.adv)


def rarely(turn: Callable[..., bool]) -> Callable[..., bool]:
    """``Pool.turn`` that looks after every third iteration, as on a GPU."""

    def made(self: pool.Pool, model: nn.Module) -> bool:
        self.every = 3
        return turn(self, model)

    return made


def test_killing_it_loses_nothing(case, tmp_path: Path) -> None:
    model, x, y = case[0].cpu(), case[1][:20].cpu(), case[2][:20].cpu()
    whole, path = plan().run(model, x, y, batch_size=8), tmp_path / "state.pt"
    draw, killed = random.Random(0), 0

    def goes_on() -> bool:
        begun = torch.load(path, weights_only=True)["state"]
        return bool(begun["done"] or begun["pool"]["numbers"])

    while killed < 3 or not goes_on():
        child, before = os.fork(), path.stat().st_mtime_ns if path.exists() else 0
        if not child:
            try:
                plan().run(model, x, y, batch_size=8, state_path=path, save_every=0)
            finally:
                os._exit(0)
        ended = 0
        while not ended and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.001)  # until it has gone on by an iteration at least
            ended = os.waitpid(child, os.WNOHANG)[0]
        if ended:  # all was done: begin again
            assert before, "it ended without a file"
            path.unlink()
            killed = 0
            continue
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    result = plan().run(model, x, y, batch_size=8, state_path=path, save_every=0)
    assert torch.equal(result.fooled_by, whole.fooled_by) and torch.equal(result.adv, whole.adv)


def test_a_file_of_something_else_is_refused(case, tmp_path: Path) -> None:
    model, x, y = case
    path = tmp_path / "state.pt"
    plan().run(model, x, y, state_path=path)
    other = Rowwise(torch.float32).to(x.device).eval()
    with torch.no_grad():
        other.last += 1e-3
    calls: dict[str, Callable[[], AutoAttackResult]] = {
        "its weights are not the ones given": lambda: plan().run(other, x, y, state_path=path),
        "its images are not the ones": lambda: plan().run(model, x.clamp(max=0.9), y, state_path=path),
        "its labels are not the ones": lambda: plan().run(model, x, (y + 1) % CLASSES, state_path=path),
        "its ids are not": lambda: plan().run(model, x, y, ids=torch.arange(40, device=x.device) + 1, state_path=path),
        "its eps is 0.03, here 0.04": lambda: plan(0.04).run(model, x, y, state_path=path),
        "its seed is 0, here 1": lambda: plan(seed=1).run(model, x, y, state_path=path),
        "its search_precision is 'fp32', here 'bf16'": lambda: plan().run(
            model, x, y, state_path=path, search_precision="bf16"
        ),
        "its attacks is": lambda: replace(plan(), parts={"climb": Climb(EPS)}).run(model, x, y, state_path=path),
        "its climb has other settings. Name": lambda: replace(
            plan(), parts={**(plan().parts or {}), "climb": Climb(EPS, steps=77)}
        ).run(model, x, y, state_path=path),
    }
    for told, call in calls.items():
        with pytest.raises(ValueError, match=told):
            call()

    class Same(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.1

    with pytest.raises(ValueError, match="clean logits differ by 10.0%"):
        plan().run(Same(torch.float32).to(x.device).eval(), x, y, state_path=path)
    held, whole = torch.load(path), path.read_bytes()
    for name, value in (("fooled_by", held["state"]["fooled_by"].clamp(max=0)), ("done", 2), ("seconds", 0.5)):
        torch.save({**held, "state": {**held["state"], name: value}}, path)
        with pytest.raises(ValueError, match="is damaged, its contents are not those that were written"):
            plan().run(model, x, y, state_path=path)
    path.write_bytes(whole)
    assert plan().run(model, x, y, state_path=path).accuracy < 0.95
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="holds no state of an evaluation"):
        plan().run(model, x, y, state_path=path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        plan().run(model, x, y, state_path=tmp_path / "no" / "state.pt")
    with pytest.raises(IsADirectoryError):
        plan().run(model, x, y, state_path=tmp_path)


def test_it_says_how_it_goes(case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case
    clock = [0.0]

    def tick() -> float:
        clock[0] += 0.25
        return clock[0]

    said: list[str] = []
    for module in (ensemble, progress):
        monkeypatch.setattr(module.time, "monotonic", tick)
    monkeypatch.setattr(progress, "SAY_EVERY", 2.0)
    monkeypatch.setattr(progress, "WARM_UP", 4.0)
    plan().run(model, x, y, batch_size=4, say=said.append)
    assert said[0] == "AutoAttack custom, linf, eps 0.03: 40 images, 95.00% right without an attack"
    of_climb = [line for line in said if line.startswith("climb")]
    assert "left" not in of_climb[0] and "so far" in of_climb[0]  # before the warm-up nothing is known
    assert any(", about " in line and line.endswith("left") for line in of_climb)
    shares = [float(line.split("accuracy ")[1].split("%")[0]) for line in said if "accuracy" in line]
    assert shares == sorted(shares, reverse=True) and len(shares) > 6
    assert said[-1].startswith("robust accuracy ")


def test_durations() -> None:
    assert [progress.duration(s) for s in (3.4, 99, 100, 5000, 7200)] == ["3 s", "99 s", "2 min", "83 min", "2.0 h"]


# Bad input


class Changed(nn.Module):
    """A network whose logits are made something else."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


def test_nan_logits_are_counted_and_never_robust(case) -> None:
    model, x, y = case
    bright = x.flatten(1).mean(1).median()

    class Silent(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.where(x.flatten(1).mean(1, keepdim=True) > bright, torch.nan, logits)

    with pytest.warns(UserWarning, match="the gradient of 20 of the first 40 images is 0"):
        result = plan(1e-5).run(Silent(torch.float32).to(x.device).eval(), x, y)
    silent = x.flatten(1).mean(1) > bright
    assert 10 < silent.sum() < 30
    assert not result.correct[silent].any()
    assert result.record.nan_logits >= silent.sum()
    assert result.record.nan_adversaries == 0


class Beside(nn.Module):
    """A network whose logits depend on the other images of a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if len(x) == 40 else -self.model(x)


class Holed(torch.autograd.Function):
    """x, whose first pixel has NaN as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:, 0, 0, 0] = torch.nan
        return grad


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0), ("l1", 9.0)])
def test_pixels_without_a_finite_gradient_do_not_keep_the_others_from_moving(norm: str, eps: float, case) -> None:
    model, x, y = case

    class Hole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(Holed.apply(x))

    for attack in (APGD(eps, 5, norm=norm), FAB(eps, 5, norm=norm), FAB(eps, 5, norm=norm, targeted=False)):
        found = AutoAttack(eps, norm=norm, version="custom", parts={"only": attack})
        whole = found.run(model, x, y)
        with pytest.warns(UserWarning, match="the gradient of 40 of the first 40 images is 0, or not finite"):
            result = found.run(Hole().eval(), x, y)
        assert whole.accuracy < 0.5 and result.accuracy <= whole.accuracy + 0.1


def test_inside_inference_mode(case) -> None:
    model, x, y = case
    whole = plan().run(model, x, y)
    with torch.inference_mode():
        inside = plan().run(model, x.clone(), y.clone())
    assert torch.equal(inside.fooled_by, whole.fooled_by) and torch.equal(inside.adv, whole.adv)
    assert not inside.adv.is_inference()


def test_warnings(case) -> None:
    model, x, y = case
    noise = Changed(model, lambda logits: logits + 0.1 * torch.randn_like(logits))
    softmax = Changed(model, lambda logits: logits.softmax(1))
    rounded = Changed(model, lambda logits: (logits * 100).round() / 100)
    cases = [
        (noise, 'Use version="rand"'),
        (softmax, "probabilities, not logits"),
        (model, "train mode"),
        (rounded, "the gradient of 40 of the first 40 images is 0"),
        (Beside(model), "an adversary that the last check did not confirm, and count as robust"),
    ]
    for network, told in cases:
        with pytest.warns(UserWarning, match=told):
            record = plan().run(network.train(network is model), x, y).record
        assert network.training == (network is model)
        assert any(told in note for note in record.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan().run(model, x, y).record.notes == ()


def test_without_a_gradient_it_goes_on_with_what_needs_none(case) -> None:
    model, x, y = case
    blind = Changed(model, torch.Tensor.detach).eval()
    with pytest.warns(UserWarning) as told:
        result = plan().run(blind, x, y)
    messages = [str(each.message) for each in told]
    assert any("has no gradient" in message for message in messages)
    assert any("no climb, more, as the model has no gradient" in message for message in messages)
    assert list(result.record.parts) == ["guess"] and result.record.instead
    assert 0 < result.correct.sum() < 38
    only = AutoAttack(EPS, version="custom", parts={"climb": Climb(EPS)})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no gradient, which climb would follow"):
        only.run(blind, x, y)


def test_images_that_a_later_part_does_not_take_are_refused_before_the_first_runs(device) -> None:
    net, lines = nn.Linear(12, 5).to(device), []
    x, y = torch.rand(3, 12, device=device), torch.arange(3, device=device)
    with pytest.raises(ValueError, match=r"Square needs images \[B, C, H, W\], got x \[3, 12\]"):
        AutoAttack(EPS).run(net, x, y, say=lines.append)
    assert not lines


def test_bad_calls(case) -> None:
    model, x, y = case
    calls: dict[str, Callable[[], Any]] = {
        "divided by 255": lambda: plan().run(model, x * 255, y),
        r"y\[0\] = 4 is not a class: the model has 4": lambda: plan().run(model, x, torch.full_like(y, 4)),
        r"y\[0\] = -1 is not a class": lambda: plan().run(model, x, torch.full_like(y, -1)),
        "the model has 1 class": lambda: plan().run(Changed(model, lambda z: z[:, :1]).eval(), x, y),
        "no images": lambda: plan().run(model, x[:0], y[:0]),
        "batch_size": lambda: plan().run(model, x, y, batch_size=0),
        "search_precision must be one of": lambda: plan().run(model, x, y, search_precision="fp8"),
        "eps=8 covers all": lambda: AutoAttack(8),
        "version must be one of": lambda: AutoAttack(EPS, version="apdg"),
        "norm must be one of": lambda: AutoAttack(EPS, norm="Linf"),
        "name the attacks": lambda: AutoAttack(EPS, version="custom"),
        "must have the ball of AutoAttack": lambda: AutoAttack(0.1, version="custom", parts={"a": Climb(EPS)}),
        "name one attack at least": lambda: AutoAttack(EPS, version="custom", parts={}),
        'and none "clean"': lambda: AutoAttack(EPS, version="custom", parts={"clean": Climb(EPS)}),
        "seed must be": lambda: AutoAttack(EPS, version="custom", parts={"a": Climb(EPS)}, seed=-1),
    }
    for told, call in calls.items():
        with pytest.raises(ValueError, match=told):
            call()
    for told, call in {
        "must be float32 or float64": lambda: plan().run(model, x.bfloat16(), y),
        "model must be a torch.nn.Module": lambda: plan().run(model.forward, x, y),  # type: ignore[arg-type]
        "one number for all samples": lambda: AutoAttack(x[:, 0, 0, 0]),  # type: ignore[arg-type]
        "must be a Search": lambda: AutoAttack(EPS, version="custom", parts={"a": 3}),  # type: ignore[dict-item]
    }.items():
        with pytest.raises(TypeError, match=told):
            call()
