"""What a GPU is to reach, beside what it reached.

    python benchmarks/targets.py benchmarks/results/GPU

reads what the benchmarks wrote there: GPU.json of the operators, GPU-training-step.json of whole steps at batch 128.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from harness import Row
from step_table import StepRow
from tables import Table, aligned

SIZE = "512x3x224x224"
#: Of the bandwidth of a copy, at that size.
COPY = {"random_start": 0.9, "sample_neighbours n=2": 0.85, "pgd_step_neighbours n=2": 0.85}
NETWORK = {"network": "preact_resnet18", "batch_size": 128}
#: Of a step by the fastest kind of ours in bf16: milliseconds, the published step's time over it, the share of its
#: passes, of the same kind.
MILLISECONDS, FACTOR, SHARE = {"atlas": 7.5}, {"trades": 5.0}, {"atlas": 0.9, "trades": 0.9}


def table(results: str) -> Table:
    return [["target", "wanted", "found", ""], *of_operators(results), *of_steps(results)]


def of_operators(results: str) -> Iterator[list[str]]:
    rows = {row["op"]: Row(**row) for row in _read(f"{results}.json").get("rows", ()) if row["size"] == SIZE}
    for op, share in COPY.items():
        found = rows[op].of_copy if op in rows else None
        yield _line(f"{op} at {SIZE}, of copy", found, least=share, percent=True)


def of_steps(results: str) -> Iterator[list[str]]:
    read = _read(f"{results}-training-step.json")
    fits = read and all(read["settings"][name] == value for name, value in NETWORK.items())
    rows = {row["step"]: row for row in read["rows"]} if fits else {}
    for step in SHARE:
        row = StepRow(**{key: value for key, value in rows.get(step, {"step": step}).items() if key != "published"})
        times = {name: statistics.median(t) for name, t in row.seconds.items() if name.startswith("ours bf16")}
        ours = min(times, key=times.__getitem__, default="")
        kind, what = ours.removeprefix("ours "), f"{step} step, batch 128" + f", {ours}" * bool(ours)
        if step in MILLISECONDS:
            yield _line(f"{what}, ms", 1e3 * times[ours] if ours else None, most=MILLISECONDS[step])
        if step in FACTOR:
            yield _line(f"{what}, x", _quotient(row, row.published, ours), least=FACTOR[step])
        yield _line(f"{what}, its passes", _quotient(row, [f"bare {kind}"], ours), least=SHARE[step], percent=True)


def _quotient(row: StepRow, above: list[str], below: str) -> float | None:
    return statistics.median(row.quotients(above[0], below)) if below else None


def _read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}  # type: ignore[no-any-return]


def _line(what: str, found: float | None, *, least: float = 0, most: float = inf, percent: bool = False) -> list[str]:
    form = ".1%" if percent else ".2f"
    wanted = f">= {least:{form}}" if least else f"<= {most:{form}}"
    if found is None:
        return [what, wanted, "-", "not measured"]
    return [what, wanted, f"{found:{form}}", "reached" if least <= found <= most else "missed"]


if __name__ == "__main__":
    print(f"\n{aligned(table(*sys.argv[1:]))}")
