"""AutoAttack by several processes, each of which attacks some of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import require_count
from .autoattack import AutoAttack
from .ensemble import AutoAttackResult, Say, merged

_FOREVER = timedelta(days=365)  # a process may be done long before the others


class LostProcesses(RuntimeError):
    """Some processes did not come to an end. rows: the samples whose verdicts are known; result: these verdicts, None
    if there are none."""

    def __init__(self, message: str, rows: Tensor, result: AutoAttackResult | None) -> None:
        super().__init__(message)
        self.rows, self.result = rows, result


def run_sharded(
    attack: AutoAttack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    ids: Tensor | None = None,
    shards: int | None = None,
    state_path: str | Path | None = None,
    say: Say | None = None,
    **options: Any,
) -> AutoAttackResult | None:
    """``attack.run`` by all processes of ``torch.distributed``, each of which has the model and all of x and y. The
    first process returns the result of all samples, on the CPU, and is the one to write it; the others return None.

    Sample i belongs to shard i modulo ``shards`` (default: as many as processes), and shard s to process s modulo their
    number. A verdict goes by the sample's number in ``ids``, so it is the same for any number of either.

    state_path: each shard has a file of its own, this path with the shard's number added. What was lost is resumed by
    the same call, and by other numbers of processes if ``shards`` is given. say: told what the first process does. More
    options: as in ``AutoAttack.run``.

    Raises LostProcesses in the first process where others ended early; it says which, and holds the other verdicts.
    (torchrun ends the others, too, as soon as one is lost.)
    """
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shards = count if shards is None else shards
    require_count("shards", shards, 1)
    ids = torch.arange(len(x), device=x.device) if ids is None else ids

    def run(shard: int) -> AutoAttackResult:
        path = None if state_path is None else f"{state_path}.{shard}-of-{shards}"
        part = slice(shard, None, shards)
        told = say if rank == 0 else None
        result = attack.run(model, x[part], y[part], ids=ids[part], state_path=path, say=told, **options)
        return AutoAttackResult(result.correct.cpu(), result.fooled_by.cpu(), result.adv.cpu(), result.record)

    mine = [shard for shard in range(rank, shards, count) if shard < len(x)]
    with _group(count) as group:
        results = {shard: run(shard) for shard in mine}
        if rank:
            dist.send_object_list([results], dst=0, group=group)
            return None
        lost = _collect(results, count, group)
    rows = [torch.arange(shard, len(x), shards) for shard in results]
    known = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    result = _joined(list(results.values()), known) if rows else None
    if lost:
        again = "" if state_path is None else f" Run it again with shards={shards} and this state_path to go on there."
        raise LostProcesses(
            f"{', '.join(f'process {r} ({error})' for r, error in lost.items())} of {count} ended early: of {len(x):,} "
            f"samples the verdicts of {len(x) - len(known):,} are not known.{again}",
            known.sort().values,
            result,
        )
    return result


@contextmanager
def _group(count: int) -> Iterator[Any]:
    """Of all processes, on their CPUs."""
    if count == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _collect(results: dict[int, AutoAttackResult], count: int, group: Any) -> Mapping[int, str]:
    """Adds those of the other processes; says which ended before they could tell, and the error."""
    lost = {}
    for rank in range(1, count):
        box: list[Any] = [None]
        try:
            dist.recv_object_list(box, src=rank, group=group)
            results.update(box[0])
        except RuntimeError as error:
            lost[rank] = str(error).strip().split("\n")[0][-80:]
    return lost


def _joined(results: Sequence[AutoAttackResult], rows: Tensor) -> AutoAttackResult:
    """Of samples that ``rows`` numbers, in the order of their numbers."""
    order = rows.argsort()
    correct, fooled_by, adv = (
        torch.cat([getattr(result, name) for result in results])[order] for name in ("correct", "fooled_by", "adv")
    )
    record = merged([result.record for result in results], fooled_by)
    return AutoAttackResult(correct, fooled_by, adv, record)
