"""The benchmarks of attacks refuse a wrong attack, their statistics are right, and both scripts run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attack_precision
import bench_attacks
import bench_autoattack
import l1_attacks
import tables
from atlas_kernels import PGD
from atlas_train import data
from attack_precision import Row, Setting, paired_interval
from bench_attacks import PLAIN, SMALL, Task, make_task, plain_pgd, problem_with, strength


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(SMALL, torch.device("cpu"))


def far(task: Task) -> Tensor:
    return (task.x + 1.01 * task.eps).clamp(0, 1)


def outside(task: Task) -> Tensor:
    return task.x - 0.1 * task.eps


def weak(task: Task) -> Tensor:
    return plain_pgd(replace(task, steps=1))


def too_small(task: Task) -> Tensor:
    return plain_pgd(replace(task, eps=0.8 * task.eps))


def not_a_number(task: Task) -> Tensor:
    return torch.full_like(task.x, torch.nan)


def short(task: Task) -> Tensor:
    return task.x[1:]


WRONG = [
    (far, "left the ball"), (outside, "left the range"), (weak, "loss"), (too_small, "loss"),
    (not_a_number, "finite"), (short, "finite"),
]  # fmt: skip


@pytest.mark.parametrize("attack, reason", WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_attack_is_refused(task: Task, attack: Callable[[Task], Tensor], reason: str) -> None:
    right = strength(task, plain_pgd(task))
    assert reason in str(problem_with(task, attack(task), right, stops=False))
    assert problem_with(task, plain_pgd(task), right, stops=False) is None


def test_where_an_attack_may_stop_early_the_share_fooled_counts(task: Task) -> None:
    adv = plain_pgd(task)
    right = strength(task, adv)
    fooled = (task.model(adv).argmax(1) != task.y).view(-1, 1, 1, 1)
    weaker = torch.where(fooled, adv, task.x)  # other samples are left as they are: less loss, as many fooled
    assert problem_with(task, weaker, right, stops=True) is None
    assert "loss" in str(problem_with(task, weaker, right, stops=False))
    assert "fools" in str(problem_with(task, task.x, right, stops=True))


def test_a_refused_contender_is_not_timed(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attacks, "our_pgd", lambda task, precision, compact: lambda: far(task))
    rows = {row.name: row for row in bench_attacks.measure(task, 1, compact=False, compiled=False)}
    assert "left the ball" in str(rows["ours fp32"].problem) and rows["ours fp32"].seconds is None
    lines = {line[0]: line[1:] for line in bench_attacks.table(list(rows.values()))}
    assert set(lines["ours fp32"]) == {"-"} and "-" not in lines[PLAIN][4:5]


def test_with_restarts_whoever_leaves_fooled_samples_out_makes_fewer_passes(task: Task) -> None:
    several = replace(task, steps=4, restarts=3)
    found, _ = bench_attacks.contenders(several, compact=True, compiled=False)
    made = {c.name: bench_attacks.examine(several, c, strength(several, c.run())) for c in found}
    passes = {name: row.passes for name, row in made.items()}
    assert passes["ours fp32"] == passes["ours bf16"] == passes["bare passes fp32"] == 3 * (2 * 4 + 1)
    assert passes["ours fp32 compact"] < passes[PLAIN] < passes["ours fp32"]


def test_a_peer_that_is_missing_says_so(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in bench_attacks.PEERS:
        monkeypatch.setitem(sys.modules, name, None)
    found, absent = bench_attacks.contenders(task, compact=False, compiled=False)
    assert [row.name for row in absent] == list(bench_attacks.PEERS)
    assert all("peers.txt" in str(row.problem) for row in absent)
    assert not {contender.name for contender in found} & set(bench_attacks.PEERS)


def test_the_allocator_is_set_for_ours_and_the_bare_passes_alone(task: Task) -> None:
    found, _ = bench_attacks.contenders(task, compact=True, compiled=True)
    assert all(contender.keeps == contender.name.startswith(("ours", "bare")) for contender in found)


def test_the_benchmark_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "attacks.json"
    assert bench_attacks.main(["--only", "small", "--rounds", "1", "--compact", "--results", str(results)]) == 0
    rows = {row["name"]: row for row in json.loads(results.read_text())["workloads"][0]["rows"]}
    assert rows["ours fp32"]["passes"] == rows[PLAIN]["passes"] == rows["bare passes bf16"]["passes"] == 20
    assert rows["ours fp32 compact"]["passes"] < 20
    assert all(row["seconds"] > 0 for row in rows.values() if row["passes"])
    markdown, shown = results.with_suffix(".md").read_text(), capsys.readouterr().out
    assert "| ours bf16 |" in markdown and "ours bf16" in shown
    assert "--results RESULTS" in markdown and str(tmp_path) not in markdown + results.read_text()


def test_trained_networks_are_measured_beside_their_targets(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"dataset": "digits", "model": "digits_net", "width": 16, "eps": 0.1}
    monkeypatch.setattr(bench_attacks, "load_model", lambda run: (task.model, config))
    assert bench_attacks.main(["--runs", "runs/mine", "--images", "16", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "mine, digits_net width 16, batch 16, PGD-20, eps 0.1" in shown and "bf16" not in shown


def test_the_targets_beside_the_peers() -> None:
    def measured(name: str, fooled: float, *samples: float) -> bench_attacks.Row:
        return bench_attacks.Row(name, strength=bench_attacks.Strength(1.0, fooled), samples=list(samples))

    peers = [measured("torchattacks", 0.60, 3.0, 2.0), measured("foolbox", 0.61, 5.0, 4.0)]
    strong, fast = bench_attacks.targets([*peers, measured("ours fp32", 0.606, 1.9, 9.0)])
    assert strong == (
        "robust accuracy: ours fp32 39.4%, torchattacks 40.0%, foolbox 39.0%; target at most 0.5 points above the "
        "lowest peer's: reached"
    )
    assert fast == "time: 1.05 times as fast as the fastest peer, target 1.00: reached"
    weak, slow = bench_attacks.targets([*peers, measured("ours fp32", 0.604, 2.1)])
    assert weak.endswith("MISSED") and slow.endswith("MISSED")
    assert "no target can be checked" in bench_attacks.targets([measured("ours fp32", 0.6, 1.0)])[0]


def test_what_two_processes_gain_and_cpu_seconds_beside_seconds() -> None:
    def row(who: str, seconds: float, cpu: float) -> bench_autoattack.Row:
        return bench_autoattack.Row("net", "all", who, 0.5, 1.0, 10, 20, seconds, cpu)

    rows = [row("1 process", 10.0, 9.0), row("2 processes", 5.9, 5.0)]
    assert bench_autoattack.gain(rows, 2) == (
        "net: 2 processes are 1.69 times as fast as one (by CPU s 1.80), a thread each; target 1.70: MISSED"
    )
    assert bench_autoattack.gain([rows[0], row("", 5.8, 5.0)], 2).endswith("reached")
    assert [line[-4:] for line in bench_autoattack.table(rows)] == [
        ["s", "times as fast", "CPU s", "ratio"], ["10.0", "1.00", "9.0", "1.00"], ["5.9", "1.69", "5.0", "1.80"],
    ]  # fmt: skip
    for wrong in (["--processes", "1"], ["--processes", "2", "--bf16"]):
        with pytest.raises(SystemExit, match="--processes takes 2 or more, on CPUs"):
            bench_autoattack.main(["runs/mine", "--device", "cpu", *wrong])


def shares(both: int, lost: int, gained: int, neither: int) -> tuple[Tensor, Tensor]:
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return torch.tensor(before), torch.tensor(after)


def test_the_paired_interval_by_hand() -> None:
    """Of 100, 5 are lost and 15 gained: (16 - 6)/102 +- 1.95996 sqrt((22/102 - (10/102)^2)/102), p = 2 P(X <= 5)."""
    found = paired_interval(*shares(50, 5, 15, 30))
    assert found.difference == pytest.approx(0.10)
    assert (found.low, found.high) == pytest.approx((0.0099421, 0.1861363), abs=1e-6)
    assert found.p == pytest.approx(2 * 21700 / 2**20)  # 1 + 20 + 190 + 1140 + 4845 + 15504


def test_the_paired_interval_goes_by_pairs_and_knows_its_doubt() -> None:
    forth, back = paired_interval(*shares(3, 4, 1, 2)), paired_interval(*shares(3, 1, 4, 2))
    assert (back.low, back.high, back.p) == pytest.approx((-forth.high, -forth.low, forth.p))
    assert paired_interval(*shares(900, 5, 15, 80)).high < paired_interval(*shares(500, 205, 215, 80)).high
    none = paired_interval(*shares(60, 0, 0, 40))
    assert none.low < 0 == none.difference < none.high and none.p == 1


def row(gained: int, lost: int, loss: float) -> Row:
    difference = paired_interval(*shares(500, lost, gained, 500 - gained - lost))
    return Row(Setting("ce", "eval", 1), 1000, 0.5, 0.5, gained, lost, difference, 2.0, 2 + loss, loss, 0.1, 0.0, 2.0)


def test_the_conclusion_is_made_of_the_numbers() -> None:
    said = attack_precision.conclusion([row(0, 0, 0.0), row(30, 0, -0.02), row(0, 1, 0.01)])
    assert "3 comparisons on 1,000 images" in said and "by -0.1 to +3.0 points" in said
    assert "weaker by more than its interval in 1 of them and stronger in 0" in said and "at least 99.00%" in said
    high = 100 * row(30, 0, 0).difference.high
    assert f"beyond {high:+.2f}" in said


class RightOffTheGrid(torch.nn.Module):
    """Wrong about images of whole pixel values, right about all others."""

    def forward(self, x: Tensor) -> Tensor:
        off = (255 * x - (255 * x).round()).abs().amax((1, 2, 3)) > 1e-3
        return torch.stack([off.float(), (~off).float()], 1) + 0 * x.sum()


def test_an_image_that_is_wrong_clean_is_not_robust() -> None:
    batch = data.Batch(torch.full((4, 1, 2, 2), 0.2), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    key = torch.tensor([1, 0])
    made = attack_precision.judged(RightOffTheGrid(), PGD(0.1, 0.0), batch, key, "fp32")
    assert made.right.all()
    found = attack_precision.compare(RightOffTheGrid(), [batch], 0.1, Setting("ce", "eval", 1), key)
    assert found.robust_fp32 == found.robust_bf16 == 0


def test_the_study_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "precision.json"
    toy = ["--size", "60", "--batch-size", "30", "--train-size", "64", "--epochs", "1", "--threads", "1"]
    toy += ["--steps", "1", "3", "--other-steps", "1", "--results", str(results)]
    assert attack_precision.main(toy) == 0
    written = json.loads(results.read_text())
    kinds = [(r["setting"]["objective"], r["setting"]["attack_mode"], r["setting"]["steps"]) for r in written["rows"]]
    assert kinds == [
        ("ce", "eval", 1), ("ce", "eval", 3), ("ce", "train", 1),
        ("kl", "eval", 1), ("kl", "train", 1), ("margin", "eval", 1), ("margin", "train", 1),
    ]  # fmt: skip
    for found in written["rows"]:
        change = found["robust_bf16"] - found["robust_fp32"]
        assert found["n"] == 60 and change == pytest.approx((found["only_fp32"] - found["only_bf16"]) / 60)
        assert 0 < found["signs"] < 0.5 and found["loss_fp32"] > 0
    assert written["conclusion"] in results.with_suffix(".md").read_text()
    assert written["conclusion"] in capsys.readouterr().out


def test_commands_name_no_folders() -> None:
    given = ["--data-dir", "/somewhere/else", "--results=/x/y.json", "--plots", "/z"]
    shown = tables.command_line("/home/me/benchmarks/attack_precision.py", given)
    assert shown == "python benchmarks/attack_precision.py --data-dir DATA-DIR --results=RESULTS --plots PLOTS"


def test_l1_attacks_at_their_defaults_are_as_strong_as_the_published_ones():
    """On digits, at equal steps; dense steps leave 61 % robust where the best published attack leaves 22 %."""
    pytest.importorskip("pyautoattack", reason="pip install --no-deps -r tests/peers.txt")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    x, y = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = x[:600], y[:600]
    for eps in (2.0, 3.0):
        row = l1_attacks.compare(net, x, y, "digits", eps, 20, starts=1)
        robust = {name: values[0] for name, values in row.robust.items()}
        best = min(robust["SLIDE, any step"], robust["APGD-L1, any step"])
        assert robust["PGD"] <= best + 1 and robust["PGD, any step"] <= best + 1, robust
        assert robust["PGD, dense"] > best + 5, robust  # there is something to be lost
