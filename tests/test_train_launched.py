"""`evaluate` and `atlas evaluate` in several processes: the verdicts of one, one writer, and who says what."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from atlas_kernels.attacks.processes import LostProcesses
from atlas_train import cli, engine
from atlas_train.autoattack import autoattack
from atlas_train.config import TrainConfig
from atlas_train.evaluate import evaluate
from atlas_train.robustness.samples import gathered
from forked import in_processes
from test_robustness import linear
from tiny_runs import TINY, splits

ATTACKS = ("fgsm", "pgd-1", "apgd-ce")  # whose steps are so small here that PGD ends at its noise


def figures(report: Any) -> list[Any]:
    return [(o.attack.name, o.eps, o.right.tolist(), o.nan, o.distance, o.low, o.high) for o in report.outcomes]


def launched(words: list[str]) -> list[int]:
    """The exit statuses of a command in two processes, with what torchrun sets in the environment; each writes what it
    says to a file of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("over").unlink(missing_ok=True)
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = 9
            try:
                with open(f"out {rank}", "w") as out, redirect_stdout(out), redirect_stderr(out):
                    status = cli.main(words)
                    status = 9 if dist.is_initialized() and not status else status
            except SystemExit as end:
                status = int(str(end.code))
            finally:
                if rank:
                    Path("over").touch()
                while not Path("over").exists():  # the first has the store, which torchrun keeps until all have ended
                    time.sleep(0.02)
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_every_process_gets_the_verdicts_of_one(tmp_path: Path) -> None:
    model, images = linear(), splits(test=13).test
    how: dict[str, Any] = {"eps": (0.2, 0.35), "attacks": ATTACKS, "seed": 7, "step_size": 1e-6, "batch_size": 3}

    def body(rank: int) -> None:
        lines: list[str] = []
        report = evaluate(model, images, say=lines.append, state=tmp_path / "state", dealt=True, **how)
        usual = evaluate(model, images, 0.3, steps=2, dealt=True)
        whole = autoattack(model, images, 0.3, 9, version="apgd", dealt=True)
        made = [figures(report), report.numbers.tolist(), usual.pgd, usual.fgsm, whole.accuracy, lines]
        (tmp_path / f"of {rank}").write_text(json.dumps(made))

    assert in_processes(3, tmp_path, body) == [0, 0, 0]
    report, usual = evaluate(model, images, **how), evaluate(model, images, 0.3, steps=2)
    whole = autoattack(model, images, 0.3, 9, version="apgd")
    wanted = [figures(report), report.numbers.tolist(), usual.pgd, usual.fgsm, whole.accuracy]
    made = [json.loads((tmp_path / f"of {rank}").read_text()) for rank in range(3)]
    for each in made:
        assert each[:-1] == json.loads(json.dumps(wanted))
    assert "evaluating 13 images, dealt out to 3 processes, at eps" in made[0][-1][0] and not made[1][-1]
    said = made[0][-1]
    assert any(line.startswith("shard 1 of 3 (5 of 13 images): apgd-ce: robust accuracy ") for line in said)
    alone = f"3 shards, 13 images: robust accuracy {report.accuracy('apgd-ce', 0.2):.2%} after "
    assert any(line.startswith(alone) for line in said)
    assert any(line.startswith("  process 1 of 3, its images alone: about ") for line in said)
    assert {each.name for each in tmp_path.glob("state*")} == {
        f"state.apgd-ce-{eps}.{shard}-of-3" for eps in (0.2, 0.35) for shard in range(3)
    }


def test_parts_have_the_noise_of_the_whole() -> None:
    whole = gathered(splits(test=11).test)
    for number in range(3):
        part = whole.part(number, 3)
        _, y, ids = next(part.batches(linear(), 50, torch.device("cpu")))
        assert ids.tolist() == part.numbers.tolist() == list(range(number, 11, 3))
        assert torch.equal(y, whole.y[number::3])
        assert next(part.part(1, 2).batches(linear(), 50, torch.device("cpu")))[2].tolist() == ids[1::2].tolist()


def test_more_processes_than_images_and_other_data(tmp_path: Path) -> None:
    model = linear()

    def body(rank: int) -> None:
        report = evaluate(model, splits(test=1).test, 0.3, attacks=("fgsm", "apgd-ce"), dealt=True)
        assert len(report.labels) == 1
        with pytest.raises(ValueError, match="process 1 has other images or labels than process 0"):
            evaluate(model, splits(test=4 + 4 * rank).test, 0.3, attacks="fgsm", dealt=True)
        model[1].bias.data[0] += rank  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="process 1 has other weights than process 0: give every process the same"):
            evaluate(model, splits(test=4).test, 0.3, dealt=True)
        if rank:  # who was not asked to share does not wait for the others
            alone = evaluate(model, splits(test=4).test, 0.3, attacks=("fgsm", "apgd-ce"))
            assert autoattack(model, splits(test=4).test, 0.3, 4, version="apgd").images == len(alone.labels) == 4

    assert in_processes(2, tmp_path, body) == [0, 0]


def test_a_process_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int) -> None:
        if rank:
            monkeypatch.setattr("atlas_train.evaluate._tallied", lambda *_: 1 / 0)
        with pytest.raises((LostProcesses, ZeroDivisionError)) as caught:
            evaluate(linear(), splits(test=9).test, 0.3, attacks="fgsm", dealt=True)
        (tmp_path / f"said {rank}").write_text(str(caught.value))

    assert in_processes(2, tmp_path, body) == [0, 0]
    said = (tmp_path / "said 0").read_text()
    assert said.startswith("process 1 (ZeroDivisionError: division by zero) of 2 ended early: ")


def test_the_command_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torchrun sets in the environment; the run's two threads are those of one process."""
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from tiny_runs import splits as bars\n")
    engine.train(TrainConfig(**TINY | {"epochs": 1, "method": "standard"}), splits=splits(), folder="run")
    files = ["--json", "e.json", "--per-sample", "e.csv", "--state", "e.state"]
    command = ["evaluate", "run", "--dataset", "own.py:bars", "--device", "cpu", "--attacks", "pgd-2", "apgd-ce"]
    assert cli.main([*command, "--per-sample", "one.csv"]) == 0
    assert launched([*command, *files]) == [0, 0]
    first, second = (Path(f"out {rank}").read_text() for rank in range(2))
    assert "40 images, dealt out to 2 processes" in first and first.count("wrote e.json") == 1 and not second
    assert Path("e.csv").read_text() == Path("one.csv").read_text()
    assert json.loads(Path("e.json").read_text())["evaluation"]["environment"]["threads"] == torch.get_num_threads()
    assert "e.state.* (2 files) may be removed" in first


def test_what_is_wrong_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    for words, text in ((["nowhere"], "no checkpoint nowhere"), (["run", "--bogus"], "--bogus")):
        assert launched(["evaluate", *words]) == [2, 2]
        said = "".join(Path(f"out {rank}").read_text() for rank in range(2))
        assert said.count(text) == 1, said
