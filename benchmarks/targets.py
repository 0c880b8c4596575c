"""What a machine is to reach, beside what it reached.

    python benchmarks/targets.py benchmarks/results/GPU
    python benchmarks/targets.py benchmarks/results/training-step-cpu-preact_resnet18.json

The first reads what the benchmarks wrote there: GPU.json of the operators, GPU-training-step.json and
GPU-training-step-compiled.json of whole steps at batch 128. Writes the table to GPU-targets.md, and its JSON beside it.
The second prints the targets of a CPU's steps, at batch 64.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from step_table import StepRow
from tables import Table, aligned, markdown, write

HEADER = ("target", "wanted", "found", "")
SIZE = "512x3x224x224"
#: Of the bandwidth of a copy, at that size; noise costs arithmetic beside the memory, the noise of labels a read more.
COPY = {"pgd_step": 0.9, "apgd_step": 0.85, "random_start": 0.9, "label_noise_start": 0.45,
        "sample_neighbours n=2": 0.85, "pgd_step_neighbours n=2": 0.85, "stored_start": 0.85,
        "stored_step": 0.85}  # fmt: skip
NETWORK = {"network": "preact_resnet18", "batch_size": 128}
#: Methods whose loss ties two forwards to each other.
TIED = ("liet", "fgsm_pgi", "fgsm_uap", "nuat", "gat")
#: Of a step by the fastest kind of ours in bf16: milliseconds, the published step's time over it, the share of its
#: passes, of the same kind.
MILLISECONDS, FACTOR, SHARE = {"atlas": 7.5}, {"trades": 5.0}, {"atlas": 0.9, "trades": 0.9}
FACTOR |= dict.fromkeys(TIED, 3.0)
#: The same of a CPU, in fp32.
ON_CPU = {"network": "preact_resnet18", "batch_size": 64}
FACTOR_ON_CPU = dict.fromkeys(TIED[:3], 1.3) | dict.fromkeys(TIED[3:], 1.45)
SHARE_ON_CPU = 0.94


def table(results: str) -> Table:
    return [list(HEADER), *of_operators(results), *of_steps(results)]


def of_operators(results: str) -> Iterator[list[str]]:
    rows = {row["op"]: row for row in _read(f"{results}.json").get("rows", ()) if row["size"] == SIZE}
    for op, share in COPY.items():
        row = rows.get(op)
        found = row and row["bytes"] / row["times"]["ours"] / row["copy_bandwidth"]
        yield _line(f"{op} at {SIZE}, of copy", found, least=share, percent=True)


def of_steps(results: str) -> Iterator[list[str]]:
    for step in dict.fromkeys((*SHARE, *FACTOR)):
        row, ours = _fastest(results, step)
        bare, what = ours.replace("ours", "bare"), f"{step} step, batch 128" + f", {ours}" * bool(ours)
        if step in MILLISECONDS:
            found = 1e3 * statistics.median(row.seconds[ours]) if ours else None
            yield _line(f"{what}, ms", found, most=MILLISECONDS[step])
        if step in FACTOR:
            found = statistics.median(row.quotients(row.published[0], ours)) if ours else None
            yield _line(f"{what}, x", found, least=FACTOR[step])
        if step in SHARE:
            found = statistics.median(row.quotients(bare, ours)) if ours else None
            yield _line(f"{what}, its passes", found, least=SHARE[step], percent=True)


def of_steps_on_cpu(results: str) -> Iterator[list[str]]:
    read = _read(results)
    if not read or any(read["settings"][name] != value for name, value in ON_CPU.items()):
        raise SystemExit(f"{results} holds no steps of {ON_CPU}: measure them with bench_training_step.py")
    rows = {row["step"]: StepRow.of(row) for row in read["rows"]}
    for step, factor in FACTOR_ON_CPU.items():
        seconds = rows[step].seconds if step in rows else {}
        ours, what = "ours fp32", f"{step} step, batch {ON_CPU['batch_size']}, fp32"
        found = statistics.median(rows[step].quotients(rows[step].published[0], ours)) if seconds else None
        yield _line(f"{what}, x", found, least=factor)
        found = statistics.median(rows[step].quotients("bare fp32", ours)) if seconds else None
        yield _line(f"{what}, its passes", found, least=SHARE_ON_CPU, percent=True)


def _fastest(results: str, step: str) -> tuple[StepRow, str]:
    """The fastest contender of ours in bf16 ("" where none was measured), and its row."""
    found = [(StepRow(step), "")]
    for read in (_read(f"{results}-training-step{kind}.json") for kind in ("", "-compiled")):
        if read and all(read["settings"][name] == value for name, value in NETWORK.items()):
            rows = [StepRow.of(row) for row in read["rows"] if row["step"] == step]
            found += [(row, name) for row in rows for name in row.seconds if name.startswith("ours bf16")]
    return min(found, key=lambda one: statistics.median(one[0].seconds[one[1]]) if one[1] else inf)


def _read(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SystemExit(f"{path} is not whole JSON ({error}): measure it again") from error


def _line(what: str, found: float | None, *, least: float = 0, most: float = inf, percent: bool = False) -> list[str]:
    form = ".1%" if percent else ".2f"
    wanted = f">= {least:{form}}" if least else f"<= {most:{form}}"
    if found is None:
        return [what, wanted, "-", "not measured"]
    return [what, wanted, f"{found:{form}}", "reached" if least <= found <= most else "missed"]


def main(results: str) -> None:
    if results.endswith(".json"):
        print(aligned([list(HEADER), *of_steps_on_cpu(results)]))
        return
    lines = table(results)
    print(f"\n{aligned(lines)}")
    command = "python benchmarks/targets.py RESULTS"
    write(Path(f"{results}-targets.json"), "Targets of a GPU", command, {"targets": lines[1:]}, [markdown(lines)])


if __name__ == "__main__":
    main(*sys.argv[1:])
