"""AutoAttack by several processes: the verdicts of one, and what is lost with a process is said and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from atlas_kernels.attacks import AutoAttackResult, saved
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
    model, x, y = case[0], case[1][:10], case[2][:10]
    result = run_sharded(plan(), model, x, y, shards=shards)
    assert result is not None
    same(result, plan().run(model, x, y))


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
        result = run_sharded(plan(), model, x, y, state_path=path, save_every=0, shards=3)
        assert (result is None) == (rank > 0)
        if result is not None:
            torch.save([result], tmp_path / "result")

    assert in_processes(3, tmp_path, killed) == [0, -signal.SIGKILL, 0]
    whole = plan().run(model, x, y)
    told, rows, fooled_by = torch.load(tmp_path / "lost", weights_only=True)
    assert "process 1 (" in told and "of 21 samples the verdicts of 7 are not known" in told
    assert "shards=3" in told
    assert rows.tolist() == [row for row in range(21) if row % 3 != 1]
    assert torch.equal(fooled_by, whole.fooled_by[rows])
    assert in_processes(2, tmp_path, again) == [0, 0]  # with a process less
    (result,) = torch.load(tmp_path / "result", weights_only=False)
    same(result, whole)
    assert {each.name for each in tmp_path.glob("state*")} == {f"state.{shard}-of-3" for shard in range(3)}


def test_bad_calls(case) -> None:
    model, x, y = case
    with pytest.raises(ValueError, match="shards"):
        run_sharded(plan(), model, x, y, shards=0)
    with pytest.raises(ValueError, match="divided by 255"):
        run_sharded(plan(), model, x * 255, y)
