"""AutoAttack by several processes: the verdicts of one, and what is lost with a process is said and resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from atlas_kernels.attacks import AutoAttackResult, saved
from atlas_kernels.attacks.processes import alone, together
from atlas_kernels.attacks.sharded import LostProcesses, run_sharded
from forked import in_processes
from test_attack_autoattack import plan
from test_attacks import CLASSES, Rowwise, images


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    model = Rowwise(torch.float32).eval()
    x = images(21, torch.float32).cpu()
    y = model(x).argmax(1)
    y[3] = (y[3] + 1) % CLASSES
    return model, x, y


def same(result: AutoAttackResult, whole: AutoAttackResult) -> None:
    assert torch.equal(result.fooled_by, whole.fooled_by) and torch.equal(result.adv, whole.adv)
    assert torch.equal(result.correct, whole.correct)
    for name in ("accuracy", "largest_norm", "least", "most", "samples", "parts", "unconfirmed", "nan_logits"):
        assert getattr(result.record, name) == pytest.approx(getattr(whole.record, name), abs=1e-12)
    assert result.record.backwards["climb"] == whole.record.backwards["climb"]


@pytest.mark.parametrize("shards", [2, 30])
def test_shards_in_one_process(case, shards: int) -> None:
    model, x, y = case[0], case[1][:10].clamp(0.2, 0.8), case[2][:10]
    result = run_sharded(plan(), model, x, y, shards=shards)
    assert result is not None
    same(result, plan().run(model, x, y))
    assert result.record.least > 0 and result.record.unconfirmed == 0  # though a shard has no adversary


def test_several_processes_one_of_which_is_lost(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case
    path, keep = tmp_path / "state", saved.save

    def save(*arguments: object) -> None:
        keep(*arguments)  # type: ignore[arg-type]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(rank: int) -> None:
        saved.save = save  # type: ignore[assignment]
        try:
            run_sharded(plan(), model, x, y, state_path=path, save_every=0)
        except LostProcesses as error:
            result = error.result
            assert result is not None
            torch.save([str(error), error.rows, result.fooled_by], tmp_path / "lost")

    def again(rank: int) -> None:
        result = run_sharded(plan(), model, x, y, state_path=path, save_every=0)
        assert (result is None) == (rank > 0)
        if result is not None:
            torch.save([result], tmp_path / "result")

    assert in_processes(3, tmp_path, killed) == [0, -signal.SIGKILL, 0]
    whole = plan().run(model, x, y)
    told, rows, fooled_by = torch.load(tmp_path / "lost", weights_only=True)
    assert "process 1 (" in told and "of 21 samples the verdicts of 7 are not known" in told
    assert "killed perhaps) of 3 ended early" in told and "Run it again with this state_path" in told
    assert rows.tolist() == [row for row in range(21) if row % 3 != 1]
    assert torch.equal(fooled_by, whole.fooled_by[rows])
    assert in_processes(2, tmp_path, again) == [0, 0]  # with a process less
    (result,) = torch.load(tmp_path / "result", weights_only=False)
    same(result, whole)
    assert {each.name for each in tmp_path.glob("state*")} == {f"state.{shard}-of-3" for shard in range(3)}


def test_the_state_says_in_how_many_shards_it_is(case, tmp_path: Path) -> None:
    model, x, y = case[0], case[1][:6], case[2][:6]
    path, lines = tmp_path / "state", list[str]()
    whole = plan().run(model, x, y)
    for shards in (2, None):
        result = run_sharded(plan(), model, x, y, shards=shards, state_path=path, say=lines.append)
        assert result is not None
        same(result, whole)
    assert {each.name for each in tmp_path.iterdir()} == {"state.0-of-2", "state.1-of-2"}
    assert sum(line.startswith("shard 2 of 2 (3 of 6 images): going on from") for line in lines) == 1
    shares = [line for line in lines if line.startswith("2 shards, 6 images: robust accuracy ")]
    assert len(shares) == 2 and f"accuracy {whole.accuracy:.2%} after" in shares[0]
    with pytest.raises(ValueError, match="state is of another evaluation: its 2 files are of 6 images, here are 5"):
        run_sharded(plan(), model, x[:5], y[:5], state_path=path)
    (tmp_path / "state.1-of-3").touch()
    with pytest.raises(ValueError, match="files of 2 and of 3 shards"):
        run_sharded(plan(), model, x, y, state_path=path)
    run_sharded(plan(), model, x, y, shards=1, state_path=path)
    assert path.exists()


def test_a_process_that_is_told_to_end_names_the_one_that_was_killed(tmp_path: Path) -> None:
    """As torchrun does as soon as one is lost; one that leaves in order is not called lost."""
    ready = tmp_path / "ready"

    def body(rank: int) -> None:
        how = (tmp_path / "how").read_text()
        try:
            with together() as processes:
                processes.share(None)
                if rank:
                    ready.touch()
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise SystemExit(143)
                while not ready.exists():
                    time.sleep(0.01)
                time.sleep(0.2)
                raise SystemExit(143)
        except (LostProcesses, SystemExit) as error:
            (tmp_path / f"said {rank}").write_text(f"{type(error).__name__} {error}")

    for how, said in (("killed", "LostProcesses process 1 (gone without a word"), ("ended", "SystemExit 143")):
        (tmp_path / "how").write_text(how)
        ready.unlink(missing_ok=True)
        in_processes(2, tmp_path, body)
        assert (tmp_path / "said 0").read_text().startswith(said)


def test_an_error_in_one_process_reaches_the_others(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        said = []
        for wrong in (0, 1):
            try:
                with together() as processes:
                    with alone(), together() as by_itself:
                        assert by_itself.gather(rank) == {0: rank} and by_itself.share(rank) == rank
                    with together() as inner:
                        assert inner is processes
                    if rank == wrong:
                        raise ValueError("no memory here")
                    processes.gather(rank)
                    said.append(str(processes.lost))
            except (ValueError, LostProcesses) as error:
                said.append(f"{type(error).__name__} {error}")
        with together() as processes:
            try:
                processes.require_same({"images": rank, "labels": 3})
            except ValueError as error:
                said.append(str(error))
        torch.save(said, tmp_path / f"said {rank}")

    assert in_processes(2, tmp_path, body) == [0, 0]
    first, second = (torch.load(tmp_path / f"said {rank}") for rank in range(2))
    assert first[:2] == ["ValueError no memory here", "{1: 'ValueError: no memory here'}"]
    assert second[:2] == [
        "LostProcesses process 0 (ValueError: no memory here) of 2 ended early", "ValueError no memory here",
    ]  # fmt: skip
    assert first[2] == second[2] and first[2].startswith("process 1 has other images than process 0: give every")


def test_bad_calls(case) -> None:
    model, x, y = case
    with pytest.raises(ValueError, match="shards"):
        run_sharded(plan(), model, x, y, shards=0)
    with pytest.raises(ValueError, match="divided by 255"):
        run_sharded(plan(), model, x * 255, y)
