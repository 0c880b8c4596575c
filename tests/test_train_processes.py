"""Training by several processes: what one process comes to, and how they agree, fail, stop and go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_train import checkpoint, cli, engine, methods, stored
from atlas_train.autoattack import autoattack
from atlas_train.config import TrainConfig
from atlas_train.data import DataSplits
from atlas_train.evaluate import evaluate
from atlas_train.nonfinite import NonFiniteLoss
from atlas_train.run import Run, require_shareable
from forked import in_processes
from test_train_rescue import ROLLBACK, SERIES
from test_train_validation import script
from tiny_runs import TINY, same, splits


class Plain(nn.Module):
    """Without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.softplus(self.conv(x)).flatten(1))


def plain() -> Plain:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # as a script may forget to do
    return Plain()


def config(method: str = "fgsm_pgi", **changes: Any) -> TrainConfig:
    return TrainConfig(method, **{**TINY, "val_size": 9, "batch_size": 15, "epochs": 4, **changes})


def of(run: Run) -> dict[str, Any]:
    """What a run has come to."""
    return {"weights": run.model.state_dict(), "memory": run.memory, "history": run.history, "best": run.best}


def alike(made: dict[str, Any], whole: dict[str, Any], within: float = 1e-4) -> None:
    for part in ("weights", "memory"):
        assert made[part].keys() == whole[part].keys()
        for name, value in whole[part].items():
            torch.testing.assert_close(made[part][name], value, rtol=within, atol=within)
    timed = ("images_per_s", "seconds")
    for row, other in zip(made["history"], whole["history"], strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == pytest.approx(
            {k: v for k, v in other.items() if k not in timed}, rel=within, abs=within
        )
    assert made["best"] == whole["best"]


def test_a_run_is_that_of_one_process_and_goes_on_with_others(tmp_path: Path) -> None:
    """Epochs by two, three and one process, with a store, EMA and validation; the last batch is left out."""

    def epochs(count: int, until: int, folder: Path | None, resume: Path | None) -> Callable[[int], None]:
        def body(rank: int) -> None:
            how = config(averaging="ema", resume=resume and str(resume))
            stop = lambda row: row["epoch"] == until  # noqa: E731
            run = engine.train(how, splits=splits(), model=plain(), folder=folder, on_epoch=stop)
            torch.save(of(run), tmp_path / f"{count}-{rank}")

        return body

    whole = of(engine.train(config(averaging="ema"), splits=splits(), model=plain()))
    first, second = tmp_path / "first", tmp_path / "second"
    assert in_processes(2, tmp_path, epochs(2, 2, first, None)) == [0, 0]
    assert in_processes(3, tmp_path, epochs(3, 3, second, first)) == [0, 0, 0]
    last = engine.train(config(averaging="ema", resume=str(second)), splits=splits(), model=plain())
    alike(of(last), whole)
    assert [change["changed"]["processes"] for change in last.changes] == [["2", "3"], ["3", "1"]]
    assert in_processes(2, tmp_path, epochs(2, 4, None, first)) == [0, 0]
    resumed = torch.load(tmp_path / "2-1")
    assert in_processes(2, tmp_path, epochs(2, 4, None, None)) == [0, 0]
    assert same(resumed["weights"], torch.load(tmp_path / "2-1")["weights"])  # to the bit
    ranks = [torch.load(tmp_path / f"3-{rank}") for rank in range(3)]
    assert ranks[1]["history"] == ranks[0]["history"] == ranks[2]["history"]  # seconds too: they are the first one's


def test_batchnorm_is_alike_and_a_loss_that_is_not_finite_is_everybodys(tmp_path: Path) -> None:
    """One image is of one process, whichever, and its loss is not finite."""

    class Odd(nn.Module):
        """Not finite in training for an image that is white in a corner."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.bn = Plain(), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            white = (x[:, :, 0, 0] == 1).any(1)
            return self.inner(self.bn(x)) / torch.where(white & self.training, 0.0, 1.0)[:, None]

    def body(rank: int) -> None:
        given, odd = splits(), splits()
        odd.train.images[7, :, 0, 0] = 255
        made: dict[str, Any] = {}
        for name, data, changes in (("fine", given, {}), ("skip", odd, {"on_nonfinite": "skip"}), ("stop", odd, {})):
            try:
                run = engine.train(config("standard", augment=False, **changes), splits=data, model=Odd())
                made[name] = of(run) | {"skipped": run.skipped}
            except NonFiniteLoss as error:
                made[name] = error.step
        torch.save(made, tmp_path / f"{rank}.pt")

    assert in_processes(2, tmp_path, body) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("fine", "skip"):
        assert same(first[name]["weights"], second[name]["weights"])
        assert first[name]["history"] == second[name]["history"]
        assert first[name]["weights"]["bn.running_mean"].abs().min() > 0.01
    assert 1 <= first["skip"]["skipped"] == second["skip"]["skipped"] <= 4
    assert first["stop"] == second["stop"] < 8


def test_a_rollback_is_everybodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)

    def body(rank: int) -> None:
        run = engine.train(TrainConfig(**ROLLBACK | {"epochs": 5}), splits=splits(), folder=tmp_path / "run")
        torch.save(of(run) | {"rescues": run.rescues, "steps": run.method.in_use()["steps"]}, tmp_path / f"{rank}.pt")

    assert in_processes(2, tmp_path, body) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [rescue["back_to"] for rescue in first["rescues"]] == [2] and first["steps"] == second["steps"] == 2
    assert same(first["weights"], second["weights"]) and first["history"] == second["history"]
    assert checkpoint.load(tmp_path / "run")["rescues"] == first["rescues"]


def test_an_evaluation_is_that_of_one_process(tmp_path: Path) -> None:
    """Of batches whose last has fewer images than there are processes; and AutoAttack."""

    def evaluated() -> dict[str, Any]:
        torch.manual_seed(0)
        model, images = Plain(), splits().test
        found = evaluate(model, images, 0.01, size=17, batch_size=8, dealt=True)
        attacked = autoattack(model, images, 0.01, 5, version="apgd", dealt=True)
        return asdict(found) | asdict(attacked) | {"seconds": 0}

    def body(rank: int) -> None:
        torch.save(evaluated(), tmp_path / f"{rank}.pt")

    assert in_processes(2, tmp_path, body) == [0, 0]
    whole = evaluated()
    assert 0 < whole["pgd"] < 1 and [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [whole] * 2


def test_what_cannot_be_is_refused_in_every_process(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        other, told = splits(), []
        other.train.images[3, 0, 0, 0] += rank
        wide = plain() if not rank else nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        tries: list[tuple[dict[str, Any], DataSplits, nn.Module]] = [
            ({}, other, plain()),
            ({"lr": 0.1 + rank}, splits(), plain()),
            ({}, splits(), wide),
            ({"sync_batchnorm": True}, splits(), plain()),
            ({"batch_size": 1}, splits(), plain()),
        ]
        for changes, data, network in tries:
            try:
                engine.train(config("standard", **changes), splits=data, model=network, folder=tmp_path / "run")
            except ValueError as error:
                told.append(str(error))
        for method, changes in (("adv", {"cuda_graphs": "step"}), ("mma", {}), ("llr", {}), ("atlas", {})):
            how = TrainConfig(method, {"local": "radius"} if method == "atlas" else {}, sync_batchnorm=True, **changes)
            with pytest.raises(ValueError) as error:
                require_shareable(how, methods.build(method, 0.1, how.hyper), torch.device("cuda"))
            told.append(str(error.value))
        torch.save(told, tmp_path / f"{rank}.pt")

    assert in_processes(2, tmp_path, body) == [0, 0]
    told, others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert told == others and not (tmp_path / "run").exists()
    wanted = [
        "process 1 of 2 has other data than process 0: {'train': .*sha256",
        "process 1 of 2 has other settings than process 0: {'lr': 1.1}, not {'lr': 0.1}",
        "process 1 of 2 has other weights in its network than process 0",
        "sync_batchnorm needs GPUs",
        "batch_size: a batch of 1 images cannot be dealt out to 2 processes",
        "cuda_graphs='step' cannot be had with several processes",
        "sync_batchnorm cannot be had with mma, ",
        "sync_batchnorm cannot be had with llr, ",
        "sync_batchnorm cannot be had with atlas with local='radius', ",
    ]
    assert len(told) == len(wanted)
    for text, pattern in zip(told, wanted, strict=True):
        assert re.search(pattern, text), text


DATA = """
import os
from test_train_rescue import ROLLBACK, SERIES
from test_train_validation import script
from tiny_runs import splits

def load():
    if os.environ.get("BROKEN") == os.environ["RANK"]:
        raise ValueError("this disk is gone")
    return splits()
"""


class Command:
    """``atlas train`` by two processes, as torchrun starts them."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "bars.py").write_text(DATA)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = f"train --method standard --dataset {folder}/bars.py:load --out-dir {self.run} --epochs 2000"
        words += " --beside none --model digits_net --width 2 --batch-size 32 --val-size 0 --probe-size 0"
        words += " --device cpu --threads 1 --lr 0.01"
        self.children = []
        for rank in range(2):
            if not (child := os.fork()):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
                os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", **environment})
                for stream, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
                status = 1
                try:
                    status = cli.main(words.split())
                finally:
                    os._exit(status)
            self.children.append(child)

    def said(self, rank: int, stream: str = "err") -> str:
        return (self.folder / f"{rank}.{stream}").read_text()

    def trained(self) -> None:
        """Waits until some epochs are done."""
        until = time.monotonic() + 60
        log = self.run / "standard" / "log.csv"
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert time.monotonic() < until and not self.said(0), self.said(0) + self.said(1)
            time.sleep(0.05)

    def ended(self) -> tuple[list[int], float]:
        """The exit codes, and how long the processes took to end."""
        started = time.monotonic()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        return codes, time.monotonic() - started


def test_ctrl_c_ends_all_after_a_whole_epoch(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.trained()
    for child in command.children:
        os.kill(child, signal.SIGINT)
    codes, seconds = command.ended()
    assert codes == [130, 130] and seconds < 15
    assert command.said(0) == "\natlas: stopped\n" and command.said(1) == command.said(1, "out") == ""
    assert f"atlas train --resume {command.run}/standard" in command.said(0, "out")
    state = checkpoint.load(command.run / "standard")
    assert state["epoch"] >= 3 and state["step"] == 2 * state["epoch"] == 2 * len(state["history"])
    assert not (command.run / "standard" / ".lock").exists()


def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.trained()
    os.kill(command.children[1], signal.SIGKILL)
    codes, seconds = command.ended()
    assert codes == [2, -signal.SIGKILL] and seconds < 15
    assert "another of 2 processes ended without a word (killed, or out of memory)" in command.said(0)
    kept = checkpoint.load(command.run / "standard")
    run = stored.resume(command.run / "standard", splits=splits(), epochs=kept["epoch"] + 1)
    assert run.epoch == kept["epoch"] + 1 and run.history[:-1] == kept["history"]


def test_a_process_that_fails_ends_the_others_with_its_message(tmp_path: Path) -> None:
    command = Command(tmp_path, BROKEN="1")
    codes, seconds = command.ended()
    assert codes == [2, 2] and seconds < 30
    assert "this disk is gone" in command.said(1) and "process 1 of 2 ended: " in command.said(0)
    assert "this disk is gone" in command.said(0) and not command.run.exists()
