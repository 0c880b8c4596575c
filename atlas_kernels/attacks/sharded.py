"""AutoAttack by several processes, each of which attacks some of the samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import saved
from .arguments import require_count
from .autoattack import AutoAttack
from .ensemble import AutoAttackResult, Say, merged
from .processes import LostProcesses as LostProcesses
from .processes import together
from .progress import counted, duration


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

    Sample i belongs to shard i modulo ``shards``, and shard s to process s modulo their number. Default: as many shards
    as there are in the files of ``state_path``, or else as processes. A verdict goes by the sample's number in ``ids``,
    so it is the same for any number of either.

    state_path: each of several shards has a file of its own, this path with the shard's number added. What was lost is
    resumed by the same call, in any number of processes. say: told what the first process does, which is of its own
    shards alone, and at the end the figure of all. More options: as in ``AutoAttack.run``.

    Raises LostProcesses in the first process where others ended early; it says which, and holds the other verdicts.
    (torchrun ends the others, too, as soon as one is lost; then nothing but the files holds what they knew.)
    """
    if shards is not None:
        require_count("shards", shards, 1)
    ids = torch.arange(len(x), device=x.device) if ids is None else ids

    with together() as processes:
        rank, count = processes.rank, processes.count
        if shards is None:
            found = None if state_path is None or rank else _shards_of(Path(state_path), len(x))
            shards = processes.share(found or count)
        told = None if rank else say
        if told and shards < count:
            told(f"{state_path} is of {counted(shards, 'shard')}: of {count} processes as many go on from it")
        mine: dict[int, AutoAttackResult] = {}
        for shard in range(rank, min(shards, len(x)), count):
            part = slice(shard, None, shards)
            path = state_path if state_path is None or shards == 1 else f"{state_path}.{shard}-of-{shards}"
            whose = f"shard {shard + 1} of {shards} ({len(x[part]):,} of {counted(len(x), 'image')}): "
            tell = told and partial(_tell, told, whose if shards > 1 else "")
            made = attack.run(model, x[part], y[part], ids=ids[part], state_path=path, say=tell, **options)
            mine[shard] = AutoAttackResult(made.correct.cpu(), made.fooled_by.cpu(), made.adv.cpu(), made.record)
        results = {shard: made for each in processes.gather(mine).values() for shard, made in each.items()}
    if rank:
        return None
    rows = [torch.arange(shard, len(x), shards) for shard in results]
    known = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    result = _joined(list(results.values()), known) if rows else None
    if result is not None and say and len(results) > 1:
        say(
            f"{counted(len(results), 'shard')}, {counted(len(known), 'image')}: robust accuracy {result.accuracy:.2%} "
            f"after {duration(result.record.seconds)}"
        )
    if len(known) < len(x):
        again = "" if state_path is None else " Run it again with this state_path to go on there."
        raise LostProcesses(
            f"{processes.about_lost()}: of {counted(len(x), 'sample')} the verdicts of {len(x) - len(known):,} are not "
            f"known.{again}",
            known.sort().values,
            result,
        )
    return result


def _tell(say: Say, whose: str, line: str) -> None:
    say(f"{whose}{line}")


def _shards_of(path: Path, samples: int) -> int | None:
    """In how many shards the state lies there; None: there is none. Raises ValueError where all of its files are there
    and together of another number of samples."""
    if path.exists():
        return 1
    pattern = re.compile(re.escape(path.name) + r"\.\d+-of-(\d+)")
    matches = [pattern.fullmatch(each.name) for each in path.parent.glob("*-of-*")]
    found = sorted({int(match[1]) for match in matches if match})
    if len(found) > 1:
        raise ValueError(
            f"state_path {path} has files of {' and of '.join(map(str, found))} shards, of which only one kind can go "
            "on: remove the others, or name another file"
        )
    if not found:
        return None
    counts = [saved.size_of(path.with_name(f"{path.name}.{shard}-of-{found[0]}")) for shard in range(found[0])]
    known = [count for count in counts if count is not None]
    if len(known) == found[0] and sum(known) != samples:
        raise ValueError(
            f"state_path {path} is of another evaluation: its {counted(found[0], 'file')} are of "
            f"{counted(sum(known), 'image')}, here {'is' if samples == 1 else 'are'} {samples:,}. Name another file, "
            "or remove them to begin anew"
        )
    return found[0]


def _joined(results: Sequence[AutoAttackResult], rows: Tensor) -> AutoAttackResult:
    """Of samples that ``rows`` numbers, in the order of their numbers."""
    if len(results) == 1:
        return results[0]
    order = rows.argsort()
    correct, fooled_by, adv = (
        torch.cat([getattr(result, name) for result in results])[order] for name in ("correct", "fooled_by", "adv")
    )
    record = merged([result.record for result in results], fooled_by)
    return AutoAttackResult(correct, fooled_by, adv, record)
